"""What users and frameworks rely on: validation, groups, lifecycle, hooks, schedulers, parameter groups of a model."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.optim import (
    LISA,
    Adafactor,
    BAdam,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
    param_groups,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.helpers import randn
from tests.reference.adafactor import hf_adafactor_step
from tests.reference.galore import galore_step

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "galore": lambda params, **options: GaLore(params, **{"rank": 3, **options}),
    "plain": lambda params, **options: GaLore(params, **{"rank": None, **options}),
    "galore_adamw": lambda params, **options: GaLoreAdamW(params, **{"rank": 3, **options}),
    "galore_adafactor": lambda params, **options: GaLoreAdafactor(params, **{"rank": 3, "lr": 1e-3, **options}),
    "fira": lambda params, **options: Fira(params, **{"rank": 3, **options}),
    "frugal": lambda params, **options: Frugal(params, **{"rank": 3, **options}),
    "frugal_svd": lambda params, **options: Frugal(params, **{"rank": 3, "projector": "svd", **options}),
    "frugal_blocks": lambda params, **options: Frugal(params, **{"projector": "blocks", **options}),
    "online": lambda params, **options: OnlineSubspaceDescent(params, **{"rank": 3, **options}),
    "galore_plus": lambda params, **options: GaLorePlus(
        params, **{"rank": 3, "residual_density": 0.1, "residual_warmup": 2, **options}
    ),
    "lowrank": lambda params, **options: LowRank(
        params, **{"rank": 3, "projector": "dct", "residual": "norm", "lazy": 0.5, **options}
    ),
    "flora": lambda params, **options: Flora(params, **{"rank": 3, "lr": 1e-3, **options}),
    "adafactor": lambda params, **options: Adafactor(params, **{"lr": 1e-3, **options}),
}
SUBSPACE = ("galore", "galore_adamw", "galore_adafactor", "fira", "frugal", "online", "flora", "galore_plus", "lowrank")
every = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str, shapes: tuple[tuple[int, ...], ...] = ((9, 7), (5,)), **options: Any):
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    return OPTIMIZERS[name](params, **options), params


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int = 0) -> None:
    for i, param in enumerate(params):
        param.grad = randn(*param.shape, seed=100 * seed + i, dtype=param.dtype)
    optimizer.step()


def weights(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


def matrix() -> nn.Parameter:
    return nn.Parameter(randn(9, 7))


# ------------------------------------------------------------------------------------------------ validation

INVALID = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": math.nan}, "Invalid learning rate: nan"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor(0.1), "foreach": True}, "lr as a Tensor is not supported"),
    ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ({"foreach": True, "fused": True}, "fused.*foreach|foreach.*fused"),
    ({"rank": 0}, "Invalid rank: 0"),
    ({"rank": 2.5}, "Invalid rank: 2.5"),
    ({"rank": True}, "Invalid rank: True"),
    ({"update_proj_gap": 0}, "Invalid update_proj_gap: 0"),
    ({"scale": 0.0}, "Invalid scale: 0.0"),
    ({"scale": -1.0}, "Invalid scale: -1.0"),
    ({"proj_type": "up"}, "Invalid proj_type: 'up'; choose one of 'std'"),
    ({"projector": "magic"}, "Invalid projector: 'magic'; choose one of 'sketch', 'svd'"),
    ({"carry": "drop"}, "Invalid carry: 'drop'"),
    ({"rule": "adam"}, "Invalid rule: 'adam'"),
    ({"state_dtype": "int8"}, "Invalid state_dtype: 'int8'"),
    ({"gemm_dtype": torch.int8}, "Invalid gemm_dtype: 'int8'"),
    ({"rounding": "up"}, "Invalid rounding: 'up'"),
    ({"backend": "cuda"}, "Invalid backend: 'cuda'"),
    ({"compat": "offical"}, "Invalid compat: 'offical'"),
    ({"lr": "1e-3"}, "Invalid lr: '1e-3'; need a number: YAML takes 1e-3 for text, write 1.0e-3"),
    ({"lr": None}, "Invalid lr: None; need a number"),
    ({"weight_decay": "0.1"}, "Invalid weight_decay: '0.1'"),
    ({"betas": 0.9}, "Invalid betas: 0.9; need a pair of numbers"),
    ({"betas": (0.9, 0.9, 0.9)}, "Invalid betas"),
    ({"eps": ()}, "Invalid eps: "),
    ({"eps": None}, "Invalid eps: None"),
    (
        {"eps": (1e-30, 1e-3)},
        "a pair, of rule='adafactor' alone; rule='adamw' .* pass eps=1e-8",
    ),
    ({"eps": (None, 1e-3), "rule": "adafactor"}, "Invalid eps: .* need two numbers"),
    ({"seed": 1.5}, "Invalid seed: 1.5; need an integer"),
    ({"maximize": "False"}, "Invalid maximize: 'False'; need True or False"),
    ({"fused": "no"}, "Invalid fused: 'no'; need True or False, or None"),
    ({"lazy": "0.9"}, "Invalid lazy: '0.9'; need a number, or None"),
]
IN_GROUPS_ONLY = [
    ({"density": 0.0}, "Invalid density: 0.0"),
    ({"density": 1.5}, "Invalid density: 1.5"),
    ({"density": 0.5, "rank": 3}, "rank=3 and density=0.5 contradict"),
    ({"amsgrad": True}, "amsgrad=True is not supported"),
    ({"differentiable": True}, "differentiable=True is not supported"),
    ({"capturable": True, "rule": "adafactor"}, "capturable=True does not go with rule='adafactor'"),
    ({"dim": 4}, "Invalid dim: 4"),
    ({"scale": 1.0, "alpha": 1.0}, "names both 'alpha' and 'scale'"),
    ({"rnak": 3}, "unknown option 'rnak' in a parameter group: did you mean 'rank'"),
    ({"update_proj_gaps": 3}, "did you mean 'update_proj_gap'"),
    ({"weight_decy": 0.1}, "did you mean 'weight_decay'"),
    ({"projtype": "std"}, "did you mean 'proj_type'"),
]


def test_a_tensor_rate_goes_with_foreach_where_it_is_captured() -> None:
    assert GaLore([matrix()], lr=torch.tensor(0.1), foreach=True, capturable=True).defaults["foreach"]


ELSEWHERE: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (Fira, {"gamma": math.inf}, "Invalid gamma: inf; need a number of at least 1, or None for no limit"),
    (Fira, {"gamma": "1.01"}, "Invalid gamma: '1.01'; need a number, or None"),
    (OnlineSubspaceDescent, {"proj_betas": (0.9,)}, "Invalid proj_betas"),
    (OnlineSubspaceDescent, {"proj_betas": (0.9, 1.0)}, "Invalid proj_betas parameter at index 1: 1.0"),
    (Frugal, {"density": "0.5"}, "Invalid density: '0.5'"),
    (Frugal, {"free_scale": None}, "Invalid free_scale: None"),
    (Frugal, {"budget": 1000}, "budget=1000: FRUGAL does not search"),
    (BAdam, {"scale": 0.5}, "scale=0.5 is not an option of BAdam"),
    (LISA, {"projector": "columns"}, "projector='columns' is not an option of LISA.*construct Frugal"),
    (Adafactor, {"lr": "1e-3"}, "Invalid lr: '1e-3'"),
    (Flora, {"beta1": "0.9"}, "Invalid beta1: '0.9'; need a number, or None"),
    (GaLoreAdafactor, {"betas": (0.9, 0.999)}, "pass beta1"),
    (GaLorePlus, {"head_select": "cycle"}, "head_select='cycle' chooses among heads, and no group has num_heads"),
]


@pytest.mark.parametrize(("build", "options", "message"), ELSEWHERE, ids=lambda value: str(value)[:40])
def test_constructors_reject_options_of_their_own(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([("layers.0.weight", matrix())], **options)


@pytest.mark.parametrize(("options", "message"), INVALID, ids=lambda value: str(value)[:40])
def test_the_constructor_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        GaLore([matrix()], **options)


@pytest.mark.parametrize(("options", "message"), [*INVALID, *IN_GROUPS_ONLY], ids=lambda value: str(value)[:40])
def test_groups_are_rejected_by_constructor_and_add_param_group(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        GaLore([{"params": [matrix()], **options}])
    optimizer = GaLore([matrix()])
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.add_param_group({"params": [matrix()], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1, "relative_step": True}, "contradicts relative_step=True"),
        ({"lr": None, "relative_step": False}, "lr=None needs relative_step=True"),
        ({"lr": 0.1, "warmup_init": True}, "warmup_init=True needs relative_step=True"),
    ],
)
def test_galore_adafactor_rejects_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdafactor([matrix()], **options)


@every
def test_no_parameters_and_wrong_types_are_errors_of_torch(name: str) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        OPTIMIZERS[name]([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        OPTIMIZERS[name](matrix())
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        OPTIMIZERS[name]([1])
    with pytest.raises(ValueError, match="non-leaf"):
        OPTIMIZERS[name]([matrix() * 2])


@every
def test_complex_parameters_are_refused_clearly(name: str) -> None:
    with pytest.raises(TypeError, match=r"complex.*view_as_real"):
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


@every
def test_sparse_gradients_are_refused_clearly(name: str) -> None:
    optimizer, params = make(name)
    params[0].grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (9, 7))
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


# ------------------------------------------------------------------------------------------- options of groups


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ({"alpha": 0.5}, {"scale": 0.5}),
        ({"update_gap": 2}, {"update_proj_gap": 2}),
        ({"projection_type": "full"}, {"proj_type": "full"}),
        ({"proj_side": "left"}, {"proj_type": "left"}),
        ({"proj_type": "svd"}, {"projector": "svd"}),
        ({"state_dtype": torch.bfloat16}, {"state_dtype": "bfloat16"}),
        ({"density": 3 / 7}, {"rank": 3}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_names_of_the_neighbours_mean_our_options(alias: dict[str, Any], canonical: dict[str, Any]) -> None:
    finals = []
    for options in (alias, canonical):
        params = [matrix()]
        rank = {} if "density" in alias else {"rank": 3}
        optimizer = GaLore([{"params": params, **rank, **options}], lr=0.1)
        for seed in range(4):
            feed(optimizer, params, seed)
        assert optimizer.summary().projected == 1
        finals.append(params[0].detach())
    assert torch.equal(*finals)


def test_the_callers_group_keys_that_we_do_not_know_survive() -> None:
    optimizer = GaLore([{"params": [matrix()], "my_tag": "x", "initial_lr": 0.5}])
    assert optimizer.param_groups[0]["my_tag"] == "x"
    again = GaLore([matrix()])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["initial_lr"] == 0.5


def test_a_rank_in_any_group_makes_the_others_plain() -> None:
    everywhere = GaLore([{"params": [matrix()]}, {"params": [matrix()]}], rank=3)
    assert everywhere.summary().projected == 2
    named = GaLore([{"params": [matrix()]}, {"params": [matrix()], "rank": 2}], rank=3)
    assert [row.rank for row in named.summary()] == [None, 2]
    density = GaLore([{"params": [matrix()]}, {"params": [matrix()], "density": 0.5}], rank=3)
    assert [row.rank for row in density.summary()] == [None, 4]
    explicit = GaLore([{"params": [matrix()], "rank": None}, {"params": [matrix()], "rank": 2}])
    assert [row.rank for row in explicit.summary()] == [None, 2]


@pytest.mark.parametrize("params_type", [iter, tuple, lambda groups: (group for group in groups)])
def test_groups_may_come_from_any_iterable(params_type: Callable[[Any], Any]) -> None:
    optimizer = GaLore(params_type([{"params": [matrix()], "rank": 2}, {"params": iter([matrix()])}]))
    assert [row.rank for row in optimizer.summary()] == [2, None]


@pytest.mark.parametrize("build", [GaLoreAdafactor, Adafactor])
def test_pairs_may_come_as_lists_as_json_has_them(build: Callable[..., torch.optim.Optimizer]) -> None:
    params = [matrix()]
    feed(build([{"params": params, "eps": [1e-30, 1e-3]}]), params)
    assert params[0].isfinite().all()


@pytest.mark.parametrize(
    "build", [GaLoreAdafactor, lambda params, rank: GaLore(params, rank=rank, rule="sgd", betas=(0.0, 0.9))]
)
def test_momentum_may_be_switched_on_by_a_schedule(build: Callable[..., GaLore]) -> None:
    params = [matrix()]
    optimizer = build(params, rank=3)
    feed(optimizer, params)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    feed(optimizer, params, 1)
    assert optimizer.state[params[0]]["exp_avg"].any()


def test_the_callers_options_are_not_changed() -> None:
    betas = (0.9, 0.99)
    optimizer = GaLore([matrix()], betas=betas)
    optimizer.param_groups[0]["lr"] = 0.5
    assert GaLore([matrix()]).param_groups[0]["lr"] == 1e-3
    assert optimizer.defaults["lr"] == 1e-3


@pytest.mark.parametrize(
    ("shape", "rank", "eligible"),
    [
        ((9, 7), 6, True),
        ((9, 7), 7, False),
        ((9, 7), 8, False),
        ((9,), 1, False),
        ((), 1, False),
        ((1, 9), 1, False),
        ((0, 9), 1, False),
        ((4, 2, 3), 3, True),
        ((8, 4, 3, 3), 7, True),
        ((8, 4, 3, 3), 8, False),
    ],
)
def test_matrices_whose_smaller_side_exceeds_the_rank_are_eligible(
    shape: tuple[int, ...], rank: int, eligible: bool
) -> None:
    optimizer = GaLore([nn.Parameter(randn(*shape))], rank=rank)
    assert optimizer.summary().projected == eligible


def test_the_summary_prints_what_was_matched() -> None:
    optimizer, _ = make("galore")
    text = str(optimizer.summary())
    assert "9x7" in text
    assert "1 of 2 parameters projected; 68 weights" in text


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_maximize_is_minimising_the_negative(name: str) -> None:
    finals = []
    for sign, maximize in ((1, False), (-1, True)):
        optimizer, params = make(name, maximize=maximize)
        for seed in range(5):
            for i, param in enumerate(params):
                param.grad = sign * randn(*param.shape, seed=10 * seed + i)
            optimizer.step()
        finals.append(weights(params))
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@every
@pytest.mark.parametrize("dims", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_tensor_learning_rate_is_a_number(name: str, dims: int, decay: float) -> None:
    finals = []
    for lr in (0.01, torch.full((1,) * dims, 0.01, dtype=torch.float64)):
        optimizer, params = make(name, lr=lr, weight_decay=decay)
        for seed in range(4):
            feed(optimizer, params, seed)
        finals.append(weights(params))
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# -------------------------------------------------------------------------------------------------- lifecycle


@every
def test_the_closure_runs_once_with_gradients_enabled(name: str) -> None:
    optimizer, params = make(name)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param.square().sum() for param in params), torch.zeros(()))
        loss.backward()
        return loss

    before = weights(params)
    loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss) == pytest.approx(float(sum(value.square().sum() for value in before)))
    assert all(not torch.equal(one, other) for one, other in zip(before, weights(params), strict=True))
    assert optimizer.step() is None


@every
def test_a_step_without_gradients_does_nothing(name: str) -> None:
    optimizer, params = make(name)
    before = weights(params)
    optimizer.step()
    assert_equal(weights(params), before)
    assert not optimizer.state


@every
@pytest.mark.parametrize("whole", [True, False], ids=["step inside", "step outside"])
def test_a_compiled_training_step_is_the_eager_one(name: str, whole: bool) -> None:
    """HeavyBall#16, pytorch#124523: ours is Python's to run, so that nothing is compiled anew when schedules change."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 9))
        optimizer = OPTIMIZERS[name](model.parameters())

        def backward(model: nn.Module, batch: Tensor) -> None:
            model(batch).square().mean().backward()

        def full(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            backward(model, batch)
            optimizer.step()

        torch._dynamo.reset()
        run = full if whole else backward
        run = torch.compile(run, backend="aot_eager") if compiled else run
        for seed in range(5):
            run(model, randn(6, 12, seed=seed))
            if not whole:
                optimizer.step()
            optimizer.zero_grad()
        found.append([param.detach().clone() for param in model.parameters()])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-6)


@every
def test_tied_weights_are_stepped_once(name: str) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 7), "head": nn.Linear(7, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    optimizer = OPTIMIZERS[name](model.parameters())
    params = list(model.parameters())
    assert len(params) == 1
    feed(optimizer, params)
    assert float(optimizer.state[params[0]]["step"]) == 1


@every
def test_freezing_and_unfreezing_pauses_a_parameter(name: str) -> None:
    optimizer, params = make(name, ((9, 7), (9, 7)))
    feed(optimizer, params)
    frozen = params[0].detach().clone()
    for seed in (1, 2):
        params[0].grad, params[1].grad = None, randn(9, 7, seed=seed)
        optimizer.step()
    assert torch.equal(params[0], frozen)
    assert [float(optimizer.state[param]["step"]) for param in params] == [1, 3]
    feed(optimizer, params, 3)
    assert [float(optimizer.state[param]["step"]) for param in params] == [2, 4]
    assert not torch.equal(params[0], frozen)


@every
def test_a_frozen_parameter_may_be_in_a_group(name: str) -> None:
    frozen = nn.Parameter(randn(9, 7), requires_grad=False)
    optimizer = OPTIMIZERS[name]([frozen, moving := matrix()])
    feed(optimizer, [moving])
    assert frozen not in optimizer.state


@every
def test_a_group_added_after_steps_joins_in_and_leaves_the_others_alone(name: str) -> None:
    alone, other = make(name)
    optimizer, params = make(name)
    for run, mine in ((alone, other), (optimizer, params)):
        for seed in range(3):
            feed(run, mine, seed)
    late = nn.Parameter(randn(8, 6))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    before = late.detach().clone()
    for seed in range(3, 6):
        late.grad = randn(8, 6, seed=seed)
        feed(optimizer, params, seed)
        feed(alone, other, seed)
    assert_equal(weights(params), weights(other))
    assert not torch.equal(late, before)
    assert float(optimizer.state[late]["step"]) == 3


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor"])
def test_a_group_added_to_a_preset_gets_its_options(name: str) -> None:
    optimizer, _ = make(name)
    optimizer.add_param_group({"params": [matrix()]})
    first, late = optimizer.param_groups
    assert {key: value for key, value in first.items() if key != "params"} == {
        key: value for key, value in late.items() if key != "params"
    }


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_continue_as_the_original(name: str, how: Callable[[Any], Any], steps: int) -> None:
    optimizer, params = make(name)
    for seed in range(steps):
        feed(optimizer, params, seed)
    twin, copies = how((optimizer, params))
    assert twin.param_groups[0]["params"][0] is copies[0]
    for seed in range(steps, steps + 4):
        feed(optimizer, params, seed)
        feed(twin, copies, seed)
    assert_equal(weights(params), weights(copies))


@every
@pytest.mark.parametrize("how", ["load", "copy", "pickle"])
def test_a_copy_has_the_same_groups(name: str, how: str) -> None:
    optimizer, params = make(name)
    feed(optimizer, params)
    if how == "load":
        twin, _ = make(name)
        twin.load_state_dict(optimizer.state_dict())
    else:
        twin = copy.deepcopy(optimizer) if how == "copy" else pickle.loads(pickle.dumps(optimizer))
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@every
def test_repr_lists_the_options(name: str) -> None:
    optimizer, _ = make(name, lr=0.125)
    assert repr(optimizer).startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    assert "lr: 0.125" in repr(optimizer)


@every
def test_step_hooks_fire_once(name: str) -> None:
    optimizer, params = make(name)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    feed(optimizer, params)
    assert fired == ["pre", "post"]


@every
def test_checkpoint_hooks_fire_once_and_may_replace_the_state(name: str) -> None:
    optimizer, params = make(name)
    feed(optimizer, params)
    fired = []
    optimizer.register_state_dict_pre_hook(lambda *_: fired.append("save-pre"))
    optimizer.register_state_dict_post_hook(lambda *_: fired.append("save-post"))
    saved = optimizer.state_dict()
    assert fired == ["save-pre", "save-post"]

    def replace(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        fired.append("load-pre")
        loaded = copy.deepcopy(loaded)
        loaded["state"][0]["step"].fill_(41.0)
        return loaded

    def inspect(loaded: torch.optim.Optimizer) -> None:
        fired.append(f"load-post sees {float(loaded.state[params[0]]['step'])}")

    fired.clear()
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(inspect)
    for _ in range(2):  # our own hooks must not pile up
        optimizer.load_state_dict(state_dict=saved)
        assert fired == ["load-pre", "load-post sees 41.0"]
        fired.clear()


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "one-cycle-momentum": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8, cycle_momentum=True),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_move_us_as_they_move_torch_adamw(schedule: str, tensor: bool) -> None:
    finals, rates = [], []
    for build in (OPTIMIZERS["plain"], torch.optim.AdamW):
        params = [matrix()]
        optimizer = build(params, lr=torch.tensor(0.05) if tensor else 0.05, foreach=False)
        scheduler = SCHEDULERS[schedule](optimizer)
        for seed in range(7):
            feed(optimizer, params, seed)
            scheduler.step()
        finals.append(weights(params))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates[0] == rates[1]
    assert_equal(*finals)


@pytest.mark.parametrize("name", ["galore", "galore_adamw", "galore_adafactor", "flora", "adafactor"])
@pytest.mark.parametrize("schedule", ["lambda", "cosine", "one-cycle"])
def test_a_scheduled_rate_takes_effect(name: str, schedule: str) -> None:
    optimizer, params = make(name)
    options = {"cycle_momentum": False} if schedule == "one-cycle" else {}
    scheduler = (
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8, **options)
        if options
        else SCHEDULERS[schedule](optimizer)
    )
    for seed in range(5):
        feed(optimizer, params, seed)
        scheduler.step()
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(params)
    feed(optimizer, params, 9)
    assert_equal(weights(params), before)


@every
def test_named_parameters_keep_their_names(name: str) -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5))
    optimizer = OPTIMIZERS[name](model.named_parameters())
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    feed(optimizer, list(model.parameters()))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


# --------------------------------------------------------------------------------------- warm-up and zero gradients


@every
def test_the_warm_up_step_of_checkpointing_tools_only_allocates(name: str) -> None:
    fresh, others = make(name)
    optimizer, params = make(name)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    before = weights(params)
    optimizer.step(closure=None)
    assert_equal(weights(params), before)
    for param in params:
        assert optimizer.state[param]
        assert not any(value.any() for value in optimizer.state[param].values())
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    for seed in range(4):
        feed(optimizer, params, seed)
        feed(fresh, others, seed)
    assert_equal(weights(params), weights(others))


@every
def test_rate_zero_with_a_real_gradient_still_updates_the_moments(name: str) -> None:
    optimizer, params = make(name, lr=0.0)
    before = weights(params)
    feed(optimizer, params)
    assert_equal(weights(params), before)
    for param in params:
        assert float(optimizer.state[param]["step"]) == 1
        assert any(value.any() for key, value in optimizer.state[param].items() if key.startswith("exp_avg"))


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_an_ordinary_zero_gradient_counts_and_decays_as_torch(first: bool) -> None:
    ours, params = make("galore", lr=0.1, weight_decay=0.1)
    theirs = [nn.Parameter(value) for value in weights(params)]
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    if not first:
        feed(ours, params)
    before = weights(params)
    for param in (*params, *theirs):
        param.grad = torch.zeros_like(param)
    ours.step()
    adamw.step()
    assert float(ours.state[params[0]]["step"]) == 2 - first
    if first:
        for mine, other in zip(params, theirs, strict=True):
            torch.testing.assert_close(mine.detach(), other.detach())
    else:
        assert not torch.equal(params[0], before[0] * 0.99)  # momentum goes on


# --------------------------------------------------------------------------------------------------- frameworks


@every
def test_a_grad_scaler_skips_overflows_and_steps_otherwise(name: str) -> None:
    optimizer, params = make(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    feed(optimizer, params)
    before, counts = weights(params), [float(optimizer.state[param]["step"]) for param in params]
    for bad in (True, False):
        optimizer.zero_grad()
        loss = sum((param.square().sum() for param in params), torch.zeros(()))
        scaler.scale(loss).backward()
        if bad:
            params[0].grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert_equal(weights(params), before)
            assert [float(optimizer.state[param]["step"]) for param in params] == counts
    assert scaler.get_scale() == 128.0
    assert not torch.equal(params[0], before[0])


@every
@pytest.mark.parametrize("steps", [0, 2])
def test_swapped_parameters_get_state_of_their_own_and_orphans_are_dropped(name: str, steps: int) -> None:
    optimizer, params = make(name)
    if isinstance(optimizer, GaLore):
        assert optimizer.summary()
    for seed in range(steps):
        feed(optimizer, params, seed)
    placeholders = [nn.Parameter(torch.empty(1)) for _ in params]
    optimizer.param_groups[0]["params"] = placeholders
    swapped = [nn.Parameter(randn(6, 11)), nn.Parameter(randn(4))]
    optimizer.param_groups[0]["params"] = swapped
    feed(optimizer, swapped)
    assert set(optimizer.state) == set(swapped)
    fresh_params = [nn.Parameter(randn(6, 11)), nn.Parameter(randn(4))]
    fresh = OPTIMIZERS[name](fresh_params)
    feed(fresh, fresh_params)
    assert_equal(weights(swapped), weights(fresh_params))


@every
def test_casting_the_model_before_the_first_step_is_noticed(name: str) -> None:
    model = nn.ModuleList([nn.Linear(7, 9, bias=False), nn.Linear(7, 9, bias=False)])
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.summary()
    model[1].bfloat16()
    feed(optimizer, list(model.parameters()))
    expected = {key: value.dtype for key, value in optimizer.state[model[1].weight].items()}
    fresh = OPTIMIZERS[name](model.parameters())
    feed(fresh, list(model.parameters()))
    assert {key: value.dtype for key, value in fresh.state[model[1].weight].items()} == expected


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_tensors_and_groups_are_plain_values(name: str, dtype: torch.dtype) -> None:
    params = [nn.Parameter(randn(9, 7, dtype=dtype)), nn.Parameter(randn(5, dtype=dtype))]
    optimizer = OPTIMIZERS[name](params)
    feed(optimizer, params)
    saved = optimizer.state_dict()
    assert {type(value) for held in saved["state"].values() for value in held.values()} == {Tensor}
    for group in saved["param_groups"]:
        for key, value in group.items():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                assert item is None or isinstance(item, (bool, int, float, str)), key


@every
@pytest.mark.parametrize("steps", [0, 2])
def test_loading_its_own_state_dict_changes_nothing(name: str, steps: int) -> None:
    # accelerate does this in its constructor, before any step
    optimizer, params = make(name)
    other, copies = make(name)
    for seed in range(steps):
        feed(optimizer, params, seed)
        feed(other, copies, seed)
    optimizer.load_state_dict(optimizer.state_dict())
    for seed in range(steps, steps + 3):
        feed(optimizer, params, seed)
        feed(other, copies, seed)
    assert_equal(weights(params), weights(copies))


# -------------------------------------------------------------------------------------------------- param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = nn.Linear(8, 8), nn.Linear(8, 16), nn.LayerNorm(8)


class Model(nn.Module):
    """A transformer's inventory: tied or untied head, norms, biases."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.proj, self.lm_head = nn.Linear(8, 20, bias=False), nn.Linear(8, 20, bias=False)
        if tied:
            self.proj.weight = self.embed.weight


class Conv1D(nn.Module):
    """Hugging Face's linear layer with a transposed weight, recognised by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(8, 24)), nn.Parameter(randn(24))


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    known = {id(param): name for name, param in model.named_parameters()}
    return {known[id(param)] for param in group["params"]}


LINEARS = {f"layers.{i}.{name}.weight" for i in range(2) for name in ("attn", "mlp")}


@pytest.mark.parametrize("tied", [False, True])
def test_linears_are_projected_and_the_rest_is_plain(tied: bool) -> None:
    model = Model(tied=tied)
    plain, projected = param_groups(model, rank=4, update_proj_gap=7)
    assert names(model, projected) == LINEARS | (set() if tied else {"proj.weight"})
    assert names(model, plain) | names(model, projected) == {name for name, _ in model.named_parameters()}
    assert not names(model, plain) & names(model, projected)
    assert (projected["rank"], projected["update_proj_gap"]) == (4, 7)
    assert "rank" not in plain
    optimizer = GaLore([plain, projected])
    assert optimizer.summary().projected == len(projected["params"])


def test_an_output_layer_that_the_model_names_is_plain() -> None:
    model = Model()
    model.get_output_embeddings = lambda: model.proj
    assert "proj.weight" in names(model, param_groups(model, rank=4)[0])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r".*attn", {f"layers.{i}.attn.weight" for i in range(2)}),
        (["attn", "mlp"], LINEARS),
        ([r"layers\.0\..*", "lm_head"], {"layers.0.attn.weight", "layers.0.mlp.weight", "lm_head.weight"}),
    ],
)
def test_targets_choose_the_layers(targets: str | list[str], expected: set[str]) -> None:
    model = Model()
    assert names(model, param_groups(model, rank=4, targets=targets)[-1]) == expected


@pytest.mark.parametrize("targets", ["attention", ["attn", "nothing"], ["norm"], []])
def test_a_pattern_that_matches_nothing_is_an_error(targets: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"no linear layer|no trainable linear layer"):
        param_groups(Model(), targets=targets)


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    plain, projected = param_groups(model, rank=4)
    assert names(model, projected) == {"layers.1.attn.weight", "layers.1.mlp.weight", "proj.weight"}
    assert all(param.requires_grad for param in (*plain["params"], *projected["params"]))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable linear layer of Model"):
        param_groups(model)


def test_a_transposed_linear_layer_is_a_linear_layer_and_an_empty_plain_group_is_left_out() -> None:
    model = nn.Sequential(Conv1D())
    assert names(model, param_groups(model, rank=4)[-1]) == {"0.weight"}
    assert len(param_groups(nn.Linear(8, 9, bias=False), rank=4)) == 1


# ------------------------------------------------------------------------------------------------------- presets


def official_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    galore = {"rank": 3, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
    return [{"params": params[1:]}, {"params": params[:1], **galore}]


@pytest.mark.parametrize("build", [GaLoreAdamW, GaLoreAdafactor])
def test_the_official_groups_are_taken_unchanged(build: Callable[..., GaLore]) -> None:
    params = [matrix(), nn.Parameter(randn(5)), nn.Parameter(randn(6, 6))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build(official_groups(params), lr=1e-2)
    assert {row.shape: row.rank for row in optimizer.summary()} == {(9, 7): 3, (5,): None, (6, 6): None}
    feed(optimizer, params)
    through = io.BytesIO()
    torch.save(optimizer.state_dict(), through)
    through.seek(0)
    assert torch.load(through, weights_only=True)["param_groups"][1]["rank"] == 3


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_galore_adamw_follows_the_authors_order(decay: float, shape: tuple[int, int]) -> None:
    params = [nn.Parameter(randn(*shape)), nn.Parameter(randn(5)), nn.Parameter(randn(6, 6))]
    theirs, bias = params[0].detach().clone(), params[1].detach().clone()
    optimizer = GaLoreAdamW(official_groups(params), lr=1e-2, weight_decay=decay, no_deprecation_warning=True)
    state: dict[str, Any] = {}
    m, v = torch.zeros(5), torch.zeros(5)
    for seed in range(13):
        feed(optimizer, params, seed)
        options = {"lr": 1e-2, "rank": 3, "gap": 4, "scale": 0.25, "eps": 1e-6, "weight_decay": decay}
        galore_step(theirs, params[0].grad, state, official=True, **options)
        t, grad = seed + 1, params[1].grad
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()
        bias = bias - 1e-2 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
        bias = bias - 1e-2 * decay * bias
    torch.testing.assert_close(params[0].detach(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(params[1].detach(), bias, rtol=1e-5, atol=1e-6)


def test_galore_adamw_without_bias_correction() -> None:
    params = [nn.Parameter(randn(5))]
    optimizer = GaLoreAdamW(params, lr=1e-2, correct_bias=False)
    start = params[0].detach().clone()
    feed(optimizer, params)
    grad = params[0].grad
    expected = start - 1e-2 * 0.1 * grad / ((0.001 * grad.square()).sqrt() + 1e-6)
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_galore_adafactor_follows_the_authors_order(beta1: float | None, decay: float, shape: tuple[int, int]) -> None:
    params = [nn.Parameter(randn(*shape)), nn.Parameter(randn(5)), nn.Parameter(randn(6, 6))]
    theirs, plain = params[0].detach().clone(), weights(params[1:])
    settings = {"lr": 1e-2, "beta1": beta1, "weight_decay": decay, "scale_parameter": False, "relative_step": False}
    optimizer = GaLoreAdafactor(official_groups(params), **settings)
    state: dict[str, Any] = {}
    states: list[dict[str, Any]] = [{}, {}]
    for seed in range(13):
        feed(optimizer, params, seed)
        options = {"lr": 1e-2, "rank": 3, "gap": 4, "scale": 0.25, "weight_decay": decay}
        galore_step(theirs, params[0].grad, state, official=True, rule="adafactor", betas=(beta1, 0.999), **options)
        for value, param, held in zip(plain, params[1:], states, strict=True):
            hf_adafactor_step(value, param.grad, held, **settings)
    torch.testing.assert_close(params[0].detach(), theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(params[1:], plain, strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"warmup_init": True}, {"lr": 1e-2, "relative_step": False}])
def test_plain_galore_adafactor_is_that_of_hugging_face(options: dict[str, Any]) -> None:
    params = [nn.Parameter(randn(9, 7)), nn.Parameter(randn(5))]
    theirs, states = weights(params), [{}, {}]
    optimizer = GaLoreAdafactor(params, **options)
    for seed in range(6):
        feed(optimizer, params, seed)
        for value, param, held in zip(theirs, params, states, strict=True):
            hf_adafactor_step(value, param.grad, held, **options)
    for mine, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-5, atol=1e-6)
