"""Hugging Face's Trainer: every route to an optimizer, its arguments, its logs and its checkpoints."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lowmem.optim import APOLLOAdamW, Fira, GaLore, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, param_groups
from lowmem.optim.compat import install, uninstall
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tests.tiny import assert_equal, batch, llama, rows

LR, STEPS = 1e-2, 4
PLAIN = {"galore_adamw": GaLoreAdamW, "galore_adamw_8bit": GaLoreAdamW8bit, "galore_adafactor": GaLoreAdafactor}
PLAIN |= {"apollo_adamw": APOLLOAdamW}
OPTIM_ARGS = "rank=32, update_proj_gap=3, scale=0.5, proj_type=reverse_std"


@pytest.fixture(autouse=True)
def restored() -> Any:
    original = dict(vars(Trainer))
    yield
    uninstall()
    assert dict(vars(Trainer)) == original


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    options = {"max_steps": STEPS, "learning_rate": LR, "save_strategy": "no", **options}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def by_string(folder: Path, optim: str = "galore_adamw", **options: Any) -> Trainer:
    options = {"optim_target_modules": ["attn", "mlp"], "optim_args": OPTIM_ARGS, **options}
    if optim.endswith("layerwise"):
        options.setdefault("max_grad_norm", 0)
    return Trainer(llama(), arguments(folder, optim=optim, **options), train_dataset=rows(16))


def bare(trainer: Trainer) -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Factory:
    """The Trainer's own protocol for optimizers that need to see the model."""

    def __call__(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return GaLore(param_groups(model, rank=8), **options)


ROUTES = {
    "optimizers": lambda model: {"optimizers": (GaLore(param_groups(model, rank=8), lr=LR), None)},
    "class": lambda model: {"optimizer_cls_and_kwargs": (GaLore, {"rank": 8, "lr": LR})},
    "class and groups": lambda model: {
        "optimizer_cls_and_kwargs": (GaLore, {"params": param_groups(model, rank=8), "lr": LR})
    },
    "factory": lambda model: {"optimizer_cls_and_kwargs": (Factory, {"lr": LR})},
}


@pytest.mark.parametrize("route", ROUTES)
def test_an_optimizer_of_ours_trains_by_every_route(route: str, tmp_path: Path) -> None:
    model = llama()
    trainer = Trainer(model, arguments(tmp_path, weight_decay=0.1), train_dataset=rows(16), **ROUTES[route](model))
    trainer.train()
    assert type(bare(trainer)) is GaLore
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.2
    assert logged(trainer, "learning_rate") == pytest.approx([LR * (1 - step / STEPS) for step in range(STEPS)])
    decays = [group["weight_decay"] for group in bare(trainer).param_groups]
    assert decays == ([0.1, 0.0] if route == "class" else [1e-2, 1e-2])  # the Trainer's groups, or ours


@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"state_dtype": "bnb8"}, {"rounding": "compensated"}])
def test_resuming_equals_the_uninterrupted_run_in_bf16(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        model = llama(dtype=torch.bfloat16)
        optimizer = Fira(param_groups(model, rank=32, update_proj_gap=3), lr=LR, **options)
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2),
            train_dataset=rows(16),
            optimizers=(optimizer, None),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        found.append((model.state_dict(), optimizer.state_dict()))
    assert_equal(*found)


@pytest.mark.parametrize("layerwise", ["", "_layerwise"])
@pytest.mark.parametrize("optim", PLAIN)
def test_checkpoints_of_the_strings_hold_all_state_and_resume_to_the_bit(
    optim: str, layerwise: str, tmp_path: Path
) -> None:
    """Of galore_torch, layer-wise strings save an empty state dict, and the plain ones cannot be read again."""
    install()
    found = []
    for resume in (False, True):
        trainer = by_string(tmp_path, optim + layerwise, max_steps=5, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        found.append((trainer.model.state_dict(), bare(trainer).state_dict(), logged(trainer, "learning_rate")))
    assert_equal(*found)
    assert type(bare(trainer)) is PLAIN[optim]
    saved = torch.load(Path(get_last_checkpoint(str(tmp_path))) / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) == len(list(trainer.model.parameters()))
    assert all(held for held in saved["state"].values())


@pytest.mark.parametrize("optim", PLAIN)
def test_layerwise_strings_are_their_plain_twins(optim: str, tmp_path: Path) -> None:
    """Of galore_torch, the layer-wise schedule runs per backward, its rate is logged wrong, Adafactor's raises."""
    install()
    found = []
    for name in (optim, f"{optim}_layerwise"):
        trainer = by_string(tmp_path, name, max_grad_norm=0)
        trainer.train()
        logs = logged(trainer, "loss"), logged(trainer, "learning_rate")
        found.append((trainer.model.state_dict(), bare(trainer).state_dict(), logs))
    assert_equal(*found)
    assert logs[1] == pytest.approx([LR * (1 - step / STEPS) for step in range(STEPS)])
    assert logs[0][-1] < logs[0][0]


def test_layerwise_holds_one_gradient_and_ends_with_training(tmp_path: Path) -> None:
    install()
    trainer = by_string(tmp_path, "galore_adamw_layerwise", max_steps=1)
    params, alive = list(trainer.model.parameters()), []
    trainer.create_optimizer()
    for param in params:
        param.register_hook(lambda grad: alive.append(sum(p.grad is not None for p in params)))
    trainer.train()
    assert len(alive) == len(params)
    assert max(alive) <= 1
    trainer.model(**batch(0)).loss.backward()
    assert all(param.grad is not None for param in params)


def test_a_second_trainer_of_the_same_model_steps_it_alone(tmp_path: Path) -> None:
    """Hooks of the Trainer's own layer-wise optimizers stay on the model for good."""
    install()
    first = by_string(tmp_path, "galore_adamw_layerwise", max_steps=1)
    first.train()
    before = [held["step"].item() for held in bare(first).state.values()]
    options = {"optim_target_modules": "all-linear", "max_grad_norm": 0, "max_steps": 2}
    second = Trainer(first.model, arguments(tmp_path, optim="galore_adamw", **options), train_dataset=rows(16))
    second.train()
    assert [held["step"].item() for held in bare(first).state.values()] == before
    first.train()  # a second training of the same trainer is layer-wise again
    assert all(param.grad is None for param in first.model.parameters())
    assert [held["step"].item() for held in bare(first).state.values()] == [step + 1 for step in before]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1.0: optim='galore_adamw_layerwise' uses .* needs max_grad_norm=0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: .* or optim='galore_adamw'"),
    ],
)
def test_layerwise_refuses_what_needs_all_gradients(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The Trainer clips nothing with its own layer-wise optimizers, and does not say so."""
    install()
    with pytest.raises(ValueError, match=message):
        by_string(tmp_path, "galore_adamw_layerwise", **options).train()


@pytest.mark.parametrize(("name", "value", "offered"), [("world_size", 2, 1), ("fp16", True, False)])
def test_layerwise_refuses_replicas_and_scalers(
    name: str, value: Any, offered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook sees gradients that are scaled, and not averaged over processes yet."""
    install()
    trainer = by_string(tmp_path, "galore_adafactor_layerwise")
    monkeypatch.setattr(TrainingArguments, name, value, raising=False)
    vars(trainer.args).pop(name, None)
    with pytest.raises(ValueError, match=f"{name}={value}: .* needs {name}={offered}; .* or optim='galore_adafactor'"):
        trainer.create_optimizer()


@pytest.mark.parametrize("layerwise", ["", "_layerwise"])
@pytest.mark.parametrize("optim", PLAIN)
def test_weight_decay_betas_and_eps_of_the_arguments_reach_the_optimizer(
    optim: str, layerwise: str, tmp_path: Path
) -> None:
    """The Trainer drops all four for galore_torch: no decay (0.01 in 8 bits), betas (0.9, 0.999), eps 1e-6."""
    install()
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
    trainer = by_string(tmp_path, optim + layerwise, weight_decay=0.1, **adam)
    model, groups = trainer.model, trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    norms, large, projected = ({id(param) for param in group["params"]} for group in groups)
    assert norms == {id(param) for name, param in model.named_parameters() if "norm" in name}
    assert large == {id(model.lm_head.weight), id(model.model.embed_tokens.weight)}
    assert projected == {id(param) for param in model.model.layers.parameters() if param.ndim == 2}
    expected = {"rank": 32, "update_proj_gap": 3, "scale": 0.5, "proj_type": "reverse_std", "lr": LR}
    assert expected.items() <= groups[-1].items()
    assert [group["rank"] for group in groups] == [None, None, 32]
    if optim == "galore_adafactor":
        assert not groups[-1]["scale_parameter"]
        assert not groups[-1]["relative_step"]
    else:
        assert all((group["betas"], group["eps"]) == ((0.8, 0.95), 1e-7) for group in groups)


class Recording(Trainer):
    """Remembers what the model was given."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        counted = {"num_items_in_batch": options["num_items_in_batch"]}
        self.seen = [*getattr(self, "seen", []), {**inputs, **counted}]
        return super().compute_loss(model, inputs, *args, **options)


def test_a_string_trains_as_the_class_in_a_plain_loop(tmp_path: Path) -> None:
    install()
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_beta2": 0.95}
    options |= {"optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"], "optim_args": OPTIM_ARGS}
    trainer = Recording(llama(), arguments(tmp_path, **options), train_dataset=rows(16))
    trainer.train()
    model = llama()
    small = [param for param in model.parameters() if param.ndim == 1]
    inner = [param for param in model.model.layers.parameters() if param.ndim == 2]
    outer = [model.model.embed_tokens.weight, model.lm_head.weight]
    subspace = {"rank": 32, "update_proj_gap": 3, "scale": 0.5, "proj_type": "reverse_std"}
    groups = [{"params": small, "weight_decay": 0}, {"params": outer}, {"params": inner, **subspace}]
    optimizer = GaLoreAdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for inputs in trainer.seen:
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    assert logged(trainer, "grad_norm") == norms
    assert logged(trainer, "loss") == losses
    assert_equal(trainer.model.state_dict(), model.state_dict())


def test_the_arguments_take_every_option_of_the_class(tmp_path: Path) -> None:
    """The Trainer drops what it does not know, so that a misspelt rank is 128."""
    install()
    given = "rank=16, projector=sketch, state_dtype=8bit, stagger=true, carry=rotate, lazy=0.9, compat=None"
    group = by_string(tmp_path, optim_args=given).create_optimizer().param_groups[-1]
    expected = {"rank": 16, "projector": "sketch", "state_dtype": "8bit", "stagger": True, "lazy": 0.9, "compat": None}
    assert expected.items() <= group.items()
    assert group["scale"] == 0.25
    wrongs = {"rnak=8": "did you mean 'rank'", "lr=1": "it may have backend, basis_dtype", "rank": "no option"}
    for wrong, hint in wrongs.items():
        with pytest.raises(ValueError, match=hint):
            by_string(tmp_path, optim_args=wrong).create_optimizer()


@pytest.mark.parametrize(
    ("targets", "matched"),
    [
        ("all-linear", 15),
        ("all_linear", 15),
        (["q_proj", "v_proj"], 4),
        (r".*\.mlp\.(up|down)_proj", 4),
        ([r".*\.0\.mlp\..*", "lm_head"], 4),
    ],
)
def test_targets_are_matched_by_the_trainers_rules(targets: Any, matched: int, tmp_path: Path) -> None:
    install()
    groups = by_string(tmp_path, optim_target_modules=targets).create_optimizer().param_groups
    assert len(groups[-1]["params"]) == matched
    assert sum(len(group["params"]) for group in groups) == len(list(llama().parameters()))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "optim_target_modules=None: name the linear layers"),
        (["attn", "nothing"], "'nothing' matches no linear layer of model.layers.0.self_attn.q_proj"),
        ("q_proj", "'q_proj' matches no linear layer"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(targets: Any, message: str, tmp_path: Path) -> None:
    install()
    with pytest.raises(ValueError, match=message):
        by_string(tmp_path, optim_target_modules=targets).create_optimizer()
    with pytest.raises(ValueError, match="chooses among a model's layers: pass the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="galore_adamw", optim_target_modules=targets))


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    install()
    trainer = by_string(tmp_path)
    trainer.model.model.layers[0].requires_grad_(False)
    groups = trainer.create_optimizer().param_groups
    assert all(param.requires_grad for group in groups for param in group["params"])
    assert len(groups[-1]["params"]) == 7
    trainer = by_string(tmp_path)
    trainer.model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="all that it names is frozen"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"rank": 128, "update_proj_gap": 200, "scale": 1.0, "projector": "gaussian", "scale_mode": "row"}),
        ("rank=1, scale=128, scale_type=tensor, proj=random", {"rank": 1, "scale": 128, "scale_mode": "matrix"}),
        ("rank=8, proj=svd, gamma=None, carry=reset", {"projector": "svd", "gamma": None, "carry": "reset"}),
        ("rank=8, projector=random, scale_mode=matrix", {"projector": "random", "scale_mode": "matrix"}),
    ],
)
def test_apollo_takes_the_trainers_keys_and_ours(given: str | None, expected: dict[str, Any], tmp_path: Path) -> None:
    install()
    group = by_string(tmp_path, "apollo_adamw", optim_args=given).create_optimizer().param_groups[-1]
    assert {"proj_type": "std", **expected}.items() <= group.items()
    with pytest.raises(ValueError, match="scale_type: 'row'; choose one of 'channel', 'tensor'"):
        by_string(tmp_path, "apollo_adamw", optim_args="scale_type=row").create_optimizer()


def test_apollo_trains_by_its_string_and_by_its_module(tmp_path: Path) -> None:
    install()
    from apollo_torch import APOLLOAdamW as Served

    trainer = by_string(tmp_path, "apollo_adamw", optim_args="rank=8, scale=16", lr_scheduler_type="constant")
    trainer = Recording(trainer.model, trainer.args, train_dataset=rows(16))
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] - 0.2
    model = llama()
    small = [param for param in model.parameters() if param.ndim == 1]
    inner = [param for param in model.model.layers.parameters() if param.ndim == 2]
    outer = [model.model.embed_tokens.weight, model.lm_head.weight]
    subspace = {"rank": 8, "update_proj_gap": 200, "scale": 16, "proj": "random", "scale_type": "channel"}
    optimizer = Served([{"params": small}, {"params": outer}, {"params": inner, **subspace}], lr=LR, eps=1e-8)
    for inputs in trainer.seen:
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(trainer.model.state_dict(), model.state_dict())


def test_strings_that_are_not_ours_stay_the_trainers(tmp_path: Path) -> None:
    install()
    model = llama()
    trainer = Trainer(model, arguments(tmp_path, optim="adamw_torch"), train_dataset=rows(16))
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    given = GaLore(param_groups(model, rank=8), lr=LR)
    arguments_of_a_string = arguments(tmp_path, optim="galore_adamw")
    assert Trainer(model, arguments_of_a_string, optimizers=(given, None)).create_optimizer() is given
    by_class = Trainer(model, arguments_of_a_string, optimizer_cls_and_kwargs=(Fira, {"lr": LR, "rank": 8}))
    assert type(by_class.create_optimizer()) is Fira


def test_installing_is_reversible_and_idempotent(tmp_path: Path) -> None:
    from transformers.utils import is_galore_torch_available

    before, real = dict(vars(Trainer)), importlib.util.find_spec("galore_torch")
    asked = is_galore_torch_available()
    with install() as handle:
        assert install() is handle
        import galore_torch

        assert galore_torch.GaLoreAdamW is GaLoreAdamW
        assert issubclass(galore_torch.GaLoreAdamW8bit, GaLoreAdamW8bit)
        assert galore_torch.GaLoreAdafactor is GaLoreAdafactor
        assert is_galore_torch_available()
        assert importlib.metadata.version("galore_torch") == importlib.metadata.version("galore-torch")
        assert importlib.metadata.version("galore_torch") == galore_torch.__version__ == "1.0+lowmem"
        assert all(dist.metadata["Version"] != "1.0+lowmem" for dist in importlib.metadata.distributions())
    handle.remove()
    uninstall()
    assert dict(vars(Trainer)) == before
    assert "galore_torch" not in sys.modules
    assert importlib.util.find_spec("galore_torch") == real
    assert is_galore_torch_available() == asked
    if real is None:
        with pytest.raises(ImportError, match="galore_torch"):
            by_string(tmp_path).create_optimizer()


@pytest.mark.parametrize(
    ("name", "cls"), [("galore_torch", GaLoreAdamW), ("apollo_torch", APOLLOAdamW)], ids=["galore", "apollo"]
)
def test_an_installed_module_of_the_name_is_shadowed_and_comes_back(
    name: str, cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, theirs)
    with install():
        served = importlib.import_module(name)
        assert served is not theirs
        assert getattr(served, cls.__name__) is cls
        assert importlib.metadata.version(name) == importlib.metadata.version(name.replace("_", "-")) == "1.0+lowmem"
    assert sys.modules[name] is theirs
