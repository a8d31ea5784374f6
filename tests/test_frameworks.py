"""Contracts of frameworks that are not installed here, and torch's own distributed checkpoints on one process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdamW,
    GaLorePlus,
    OnlineSubspaceDescent,
    param_groups,
)
from lowmem.optim.compat import install, uninstall
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils.versions import require_version

from tests.tiny import assert_equal, batch, llama, rows

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LR = 1e-2
Build = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "galore": lambda model: GaLore(param_groups(model, rank=32, update_proj_gap=3), lr=LR),
    "galore 8bit": lambda model: GaLore(
        param_groups(model, rank=32, update_proj_gap=3), lr=LR, state_dtype="8bit", rounding="compensated"
    ),
    "galore adafactor": lambda model: GaLore(param_groups(model, rank=16), lr=LR, rule="adafactor", basis_dtype="int8"),
    "fira bnb8": lambda model: Fira(param_groups(model, rank=32, update_proj_gap=3), lr=LR, state_dtype="bnb8"),
    "frugal": lambda model: Frugal(param_groups(model, density=0.25, update_proj_gap=3), lr=LR / 10),
    "osd": lambda model: OnlineSubspaceDescent(param_groups(model, rank=16), lr=LR),
    "flora": lambda model: Flora(param_groups(model, rank=16), lr=LR),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=LR),
    "adamw 8bit": lambda model: AdamW8bit(model.parameters(), lr=LR),
}


@pytest.fixture(autouse=True)
def restored() -> Any:
    yield
    uninstall()


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_distributed_checkpoint_resumes_to_the_bit(name: str, flat: bool, tmp_path: Path) -> None:
    """A projector object in the state is a NotImplementedError of flattening; uint8 comes back in bf16 (torchao)."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = llama(dtype=torch.bfloat16)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(4))
    saved = {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    other = llama(1, torch.bfloat16)
    resumed = OPTIMIZERS[name](other)
    loaded = {"m": get_model_state_dict(other), "o": get_optimizer_state_dict(other, resumed, options=options)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, loaded["m"])
    set_optimizer_state_dict(other, resumed, loaded["o"], options=options)
    assert_equal(resumed.state_dict(), optimizer.state_dict())
    assert train(other, resumed, range(4, 8)) == train(model, optimizer, range(4, 8))
    assert_equal(resumed.state_dict(), optimizer.state_dict())
    assert_equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_initialising_state_for_a_checkpoint_is_no_step(name: str) -> None:
    """The zero-gradient step at rate 0 counts (torchtitan#4382) and finds a basis of zeros (galore_torch)."""
    model, twin = llama(), llama()
    optimizer, plain = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    before = copied(model)
    initial = get_optimizer_state_dict(model, optimizer)["state"]
    assert_equal(copied(model), before)
    assert len(initial) == len(list(model.parameters()))
    assert all(float(held["step"]) == 0 for held in initial.values())
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in plain.param_groups]
    assert train(model, optimizer, range(4)) == train(twin, plain, range(4))
    assert_equal(optimizer.state_dict(), plain.state_dict())
    names = dict(model.named_parameters())
    for key, held in initial.items():
        assert held.keys() == optimizer.state[names[key]].keys()


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    found = []
    for resume in (False, True):
        model = tied(int(resume))
        optimizer = OPTIMIZERS["galore"](model)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        if resume:
            dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
            set_optimizer_state_dict(model, optimizer, state, options=options)
        else:
            train(model, optimizer, range(4))
            state = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
        found.append(optimizer.state_dict())
    assert_equal(*found)


def tied(seed: int) -> LlamaForCausalLM:
    model = llama(seed)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("steps", [1, 4])
def test_a_state_whose_form_changes_is_loaded_or_refused_and_has_a_way(tmp_path: Path, steps: int) -> None:
    """GaLore+ chooses its entries after some steps: before that its state has other names, and DCP loads by name."""

    def build(model: nn.Module) -> Optimizer:
        return GaLorePlus(param_groups(model, rank=16), lr=LR, residual_warmup=2)

    model, other = llama(), llama()
    optimizer, resumed = build(model), build(other)
    losses = train(model, optimizer, range(steps))
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    if steps > 2:
        found = get_optimizer_state_dict(other, resumed)
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other, resumed, found)
        assert_equal(resumed.state_dict(), optimizer.state_dict())
    else:
        with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: state.*residual"):
            dcp.load(get_optimizer_state_dict(other, resumed), checkpoint_id=tmp_path, no_dist=True)
        assert train(other, resumed, range(steps)) == losses
    torch.save(state, tmp_path / "state.pt")
    again = build(other)
    set_optimizer_state_dict(other, again, torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("flatten", [True, False])
def test_chosen_ranks_are_loaded_with_their_state_or_refused(flatten: bool) -> None:
    """A flattened state dict is read by the names that a fresh optimizer has, and open ranks have none."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build(model: nn.Module) -> Optimizer:
        return GaLore(param_groups(model, rank="auto", energy=0.5), lr=LR)

    model, other = llama(), llama()
    optimizer, resumed = build(model), build(other)
    train(model, optimizer, range(3))
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if flatten:
        with pytest.raises(ValueError, match="flatten_optimizer_state_dict=False"):
            set_optimizer_state_dict(other, resumed, state, options=options)
        groups = param_groups(other, rank="auto", energy=0.5)
        for mine, theirs in zip(groups, optimizer.param_groups, strict=True):
            mine |= {"ranks": theirs["ranks"]} if "ranks" in theirs else {}
        resumed = GaLore(groups, lr=LR)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_equal(resumed.state_dict(), optimizer.state_dict())


def test_state_that_is_no_tensor_is_refused_by_name() -> None:
    model = llama()
    optimizer = OPTIMIZERS["galore"](model)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    key = next(iter(saved["state"]))
    saved["state"][key] = {**saved["state"][key], "step": {}}
    with pytest.raises(ValueError, match=r"the loaded 'step' of parameter 0 .* is a dict, this GaLore needs a tensor"):
        OPTIMIZERS["galore"](model).load_state_dict(saved)


class Container(Optimizer, Stateful):
    """The contract of torchtitan 0.3's `OptimizersContainer`: regex groups with names, a flat state dict by names."""

    def __init__(self, parts: list[nn.Module], groups: list[tuple[str, Build, dict[str, Any]]]) -> None:
        self.optimizers: list[Optimizer] = []
        for part in parts:
            by_class: dict[Any, list[dict[str, Any]]] = {}
            left = dict(part.named_parameters())
            for pattern, cls, options in groups:
                names = [name for name in left if re.search(pattern, name)]
                if names:
                    group = {"params": [left.pop(name) for name in names], "param_names": names, **options}
                    by_class.setdefault(cls, []).append(group)
            assert not left
            self.optimizers += [cls(found) for cls, found in by_class.items()]
        held = [param for each in self.optimizers for group in each.param_groups for param in group["params"]]
        super().__init__(held, {})

    def step(self, closure: None = None) -> None:
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            materialise(optimizer)
            found = optimizer.state_dict()
            for group in found["param_groups"]:
                for key, name in zip(group["params"], group["param_names"], strict=True):
                    flat |= {f"state.{name}.{slot}": value for slot, value in found["state"].get(key, {}).items()}
                    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                    flat |= {f"param_groups.{name}.{option}": value for option, value in options.items()}
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            materialise(optimizer)
            state, groups, position = {}, [], 0
            for group in optimizer.param_groups:
                names, first = group["param_names"], position
                for name, param in zip(names, group["params"], strict=True):
                    state[position] = {slot: state_dict[f"state.{name}.{slot}"] for slot in optimizer.state[param]}
                    position += 1
                options = [key for key in group if key not in ("params", "param_names")]
                saved = {option: state_dict[f"param_groups.{names[0]}.{option}"] for option in options}
                groups.append({"params": list(range(first, position)), **saved})
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def materialise(optimizer: Optimizer) -> None:
    """The zero-gradient step at rate 0, where there is no state yet."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


FORMS = {"for-loop": (False, False), "foreach": (True, False), "fused": (False, True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [GaLore, Fira, Frugal])
def test_torchtitans_container_trains_and_resumes_to_the_bit(cls: Any, form: str, tmp_path: Path) -> None:
    """The rate is in the groups, with names beside tensors and a form for all; two classes share a model part."""
    foreach, fused = FORMS[form]
    base = {"lr": LR / 10, "foreach": foreach, "fused": fused}
    size = {"density": 0.25} if cls is Frugal else {"rank": 16}
    groups = [
        (r"norm", torch.optim.AdamW, {**base, "weight_decay": 0.0}),
        (r"_proj\.weight$", cls, {**base, **size, "update_proj_gap": 3, "scale": 0.5}),
        (r".*", cls, base),
    ]
    found = []
    for resume in (False, True):
        model = llama(int(resume))
        parts = [model.model, nn.ModuleDict({"lm_head": model.lm_head})]
        container = Container(parts, groups)
        schedulers = [LambdaLR(each, lambda step: 0.9**step) for each in container.optimizers]
        state = {"model": model.state_dict(), "optimizer": container.state_dict()}
        if resume:
            dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
            model.load_state_dict(state["model"])
            container.load_state_dict(state["optimizer"])
        for step in range(4 if resume else 0, 7):
            if step == 4 and not resume:
                state = {"model": model.state_dict(), "optimizer": container.state_dict()}
                dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
            train(model, container, [step])
            for scheduler in schedulers:
                scheduler.last_epoch = step  # torchtitan restores this number alone
                scheduler.step()
        found.append((model.state_dict(), container.state_dict()))
    assert_equal(*found)
    assert {type(each) for each in container.optimizers} == {torch.optim.AdamW, cls}


LLAMA_FACTORY = {"rank": 16, "update_proj_gap": 3, "scale": 2.0, "proj_type": "std"}
"""What `galore_rank`, `galore_update_interval`, `galore_scale` and `galore_proj_type` become."""


def factory_groups(model: nn.Module, decay: float = 0.1) -> list[dict[str, Any]]:
    """LLaMA-Factory's three groups: plain without decay, plain with decay, projected with decay."""
    linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    projected = [module.weight for module in linear]
    rest = [param for param in model.parameters() if all(param is not weight for weight in projected)]
    return [
        {"params": [param for param in rest if param.ndim == 1], "weight_decay": 0.0},
        {"params": [param for param in rest if param.ndim > 1], "weight_decay": decay},
        {"params": projected, "weight_decay": decay, **LLAMA_FACTORY},
    ]


def trainer_options(optim: str) -> dict[str, Any]:
    """The keywords that LLaMA-Factory takes from the Trainer, which needs bitsandbytes to give those of 8 bits."""
    adam = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8}
    return {
        "adamw_torch": adam,
        "adamw_8bit": {**adam, "optim_bits": 8, "is_paged": False},
        "adafactor": {"lr": LR, "scale_parameter": False, "relative_step": False},
    }[optim]


FACTORY_CLASSES = {"adamw_torch": "GaLoreAdamW", "adamw_8bit": "GaLoreAdamW8bit", "adafactor": "GaLoreAdafactor"}


@pytest.mark.parametrize("optim", FACTORY_CLASSES)
def test_llama_factory_builds_its_optimizer_from_our_module(optim: str, tmp_path: Path) -> None:
    """It imports the classes by name, demands an installed distribution, and passes on the Trainer's keywords."""
    install()
    require_version("galore_torch")
    import galore_torch

    if optim != "adamw_8bit":
        arguments = TrainingArguments(str(tmp_path), optim=optim, learning_rate=LR, adam_beta2=0.95, use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(arguments)[1] == trainer_options(optim)
    model = llama()
    optimizer = getattr(galore_torch, FACTORY_CLASSES[optim])(factory_groups(model), **trainer_options(optim))
    losses = train(model, optimizer, range(6))
    assert losses[-2] < losses[0]  # of the same batch
    assert LLAMA_FACTORY.items() <= optimizer.param_groups[-1].items()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_llama_factorys_layerwise_optimizers_are_one_optimizer(optim: str) -> None:
    """It makes an optimizer for every parameter, stepped in the backward pass; their state is in no checkpoint."""
    install()
    import galore_torch

    cls, model, twin = getattr(galore_torch, FACTORY_CLASSES[optim]), llama(), llama()
    train(model, cls(factory_groups(model), **trainer_options(optim)), range(6))
    alone = {
        param: cls([{**group, "params": [param]}], **trainer_options(optim))
        for group in factory_groups(twin)
        for param in group["params"]
    }

    def step(param: Tensor) -> None:
        alone[param].step()
        alone[param].zero_grad()

    for param in twin.parameters():
        param.register_post_accumulate_grad_hook(step)
    for index in range(6):
        twin(**batch(index)).loss.backward()
    assert_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("option", [{"is_paged": True}, {"optim_bits": 32}, {"percentile_clipping": 5}])
def test_what_bitsandbytes_does_beside_8_bits_is_refused(option: dict[str, Any]) -> None:
    """Positional drift in bitsandbytes 0.50 makes 100 of these a `max_unorm`, so that projected weights stand still."""
    install()
    from galore_torch import GaLoreAdamW8bit

    (name, value) = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} is not offered: pass {name}="):
        GaLoreAdamW8bit([nn.Parameter(torch.zeros(8, 8))], **option)


class AxolotlTrainer(Trainer):
    """axolotl's way to an optimizer: the Trainer's own, or with rates by group the class and keywords of a string."""

    lr_groups = False

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if not self.lr_groups:
            return super().create_optimizer(model=model)
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = cls(options.pop("params"), **options)
        return self.optimizer


@pytest.mark.parametrize("by_class", [False, True])
def test_axolotl_gets_our_optimizer_by_both_of_its_ways(by_class: bool, tmp_path: Path) -> None:
    """Its YAML has the Trainer's string, targets and a dict of options, which it joins to "key=value,..."."""
    install()
    optim_args = ",".join(f"{key}={value}" for key, value in {"rank": 16, "update_proj_gap": 3, "scale": 0.5}.items())
    options = {"optim": "galore_adamw", "optim_args": optim_args, "optim_target_modules": ["self_attn", "mlp"]}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=4, report_to=[], weight_decay=0.1, learning_rate=LR, **options
    )
    trainer = AxolotlTrainer(llama(), arguments, train_dataset=rows(32))
    trainer.lr_groups = by_class
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is GaLoreAdamW
    assert {"rank": 16, "update_proj_gap": 3, "scale": 0.5}.items() <= optimizer.param_groups[-1].items()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.1]
