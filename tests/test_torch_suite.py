"""PyTorch's own optimizer checks (test_optim.py::TestOptimRenewed), on its infrastructure, over every class of ours.

What of TestOptimRenewed is not here, and why:

    test_complex*, test_rosenbrock_sparse        complex parameters and sparse gradients are refused (test_contract)
    test_*differentiable*                        refused by name (test_contract)
    test_*graph* of test_cuda.py                 need a GPU; graphs are tested on a pretended device (test_graphs)
    test_foreach_matches_forloop, test_fused_*   plain groups are torch's own forms, bit for bit (test_galore)
    test_defaults_changed_to_foreach             there is one form of projected steps
    test_*_multigpu, test_*cuda*, mixed device   need a GPU
    test_peak_memory_foreach                     memory is counted exactly (test_low_precision, test_plan)
"""

from __future__ import annotations

import functools
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from lowmem.optim import (
    LISA,
    Adafactor,
    AdamW8bit,
    Apollo,
    BAdam,
    Fira,
    FiraAdamW,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

Optimizer = torch.optim.Optimizer

ADAM_INPUTS = [
    ({}, "default"),
    ({"lr": 0.01}, "non-default lr"),
    ({"lr": torch.tensor(0.01)}, "tensor lr"),
    ({"weight_decay": 0.1}, "weight decay"),
    ({"weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"eps": 1e-6, "betas": (0.8, 0.95)}, "non-default eps and betas"),
]
CAPTURABLE_INPUTS = [
    ({"lr": torch.tensor(0.01), "weight_decay": 0.1, "capturable": True}, "tensor lr with capturable and decay"),
]
PLAIN_CAPTURABLE = [
    *CAPTURABLE_INPUTS,
    ({"capturable": True}, "capturable"),
    ({"capturable": True, "fused": False, "maximize": True}, "capturable, not fused"),
]
PLUS_INPUTS = [
    *CAPTURABLE_INPUTS,
    ({}, "default"),
    ({"lr": torch.tensor(0.01)}, "tensor lr"),
    ({"weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"residual": "additive", "update_proj_gap": 2, "num_heads": 1}, "additive, one head"),
]
RANKED_INPUTS = [
    *ADAM_INPUTS,
    *CAPTURABLE_INPUTS,
    ({"update_proj_gap": 2, "projector": "svd"}, "svd"),
    ({"rule": "adafactor", "update_proj_gap": 3}, "adafactor inside"),
    ({"rule": "sgd", "proj_type": "full", "carry": "keep"}, "sgd, two-sided"),
]
FRUGAL_INPUTS = [
    *ADAM_INPUTS,
    *CAPTURABLE_INPUTS,
    ({"update_proj_gap": 2, "projector": "svd", "free_space": "complement"}, "svd, complement"),
    ({"update_proj_gap": 2, "projector": "randk", "carry": "rotate", "free_rule": "sgd"}, "entries, sgd"),
    ({"update_proj_gap": 2, "projector": "blocks"}, "blocks"),
    ({"density": 0.0}, "state-free"),
]
ADAFACTOR_INPUTS = [
    ({}, "default"),
    ({"lr": 0.01}, "non-default lr"),
    ({"lr": torch.tensor(0.01)}, "tensor lr"),
    ({"lr": 0.01, "weight_decay": 0.1}, "weight decay"),
    ({"lr": 0.01, "weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"lr": 0.01, "beta1": 0.9, "beta2_decay": -1.0}, "momentum"),
    ({"lr": 0.01, "clip_threshold": 1.5}, "clipping threshold"),
]
ADAM_ERRORS = [
    ({"lr": -1e-2}, "Invalid learning rate"),
    ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.0, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    (
        {"lr": torch.tensor(0.001), "foreach": True},
        "lr as a Tensor is not supported for capturable=False and foreach=True",
    ),
]
ADAFACTOR_ERRORS = [
    ({"lr": -1e-2}, "Invalid learning rate"),
    ({"eps": (-1e-30, 1e-3)}, "Invalid epsilon value"),
    ({"clip_threshold": 0.0}, "Invalid clip_threshold"),
    ({"beta2_decay": 0.8}, "Invalid beta2_decay"),
    ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
]


PRESET_INPUTS = [
    ({"lr": 0.01, "relative_step": False}, "non-default lr"),
    ({}, "default"),
    ({"lr": torch.tensor(0.01), "weight_decay": 0.1, "maximize": True}, "tensor lr, decay, maximize"),
    ({"lr": 0.01, "beta1": 0.9}, "momentum"),
]
PRESET_ERRORS = [case for case in ADAFACTOR_ERRORS if "beta2_decay" not in case[0]]
EIGHT_BIT_ERRORS = [case for case in ADAM_ERRORS if "foreach" not in case[0]]
BLOCK_INPUTS = [
    *ADAM_INPUTS,
    *CAPTURABLE_INPUTS,
    ({"update_proj_gap": 2, "carry": "reset"}, "reset at short intervals"),
]


def record(cls: type[Optimizer], inputs: list[Any], errors: list[Any], **fixed: Any) -> OptimizerInfo:
    """A record as torch keeps for its own optimizers; `fixed` options go to every input."""

    def optim_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        return [OptimizerInput(None, {**fixed, **kwargs}, desc) for kwargs, desc in inputs]

    def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
        own = [
            ErrorOptimizerInput(
                OptimizerInput(None, {**fixed, **kwargs}, regex), error_type=ValueError, error_regex=regex
            )
            for kwargs, regex in errors
        ]
        general = get_error_inputs_for_all_optims(device, dtype)
        for case in general:
            case.optimizer_error_input.kwargs |= fixed
        return [*general, *own]

    return OptimizerInfo(
        cls,
        optim_inputs_func=optim_inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
            [lambda opt: StepLR(opt, gamma=0.99, step_size=1)],
        ),
        supported_impls=(),
        not_og_supported_flags=("maximize",),
        supports_complex=False,
    )


OPTIM_DB = {
    "GaLore-plain": record(GaLore, [*ADAM_INPUTS, *PLAIN_CAPTURABLE], ADAM_ERRORS, rank=None),
    "GaLore-rank2": record(GaLore, RANKED_INPUTS, ADAM_ERRORS, rank=2, scale=1.0),
    "GaLoreAdamW": record(GaLoreAdamW, ADAM_INPUTS, ADAM_ERRORS, rank=2),
    "GaLoreAdamW8bit": record(GaLoreAdamW8bit, ADAM_INPUTS, ADAM_ERRORS, rank=2),
    "GaLoreAdafactor": record(GaLoreAdafactor, PRESET_INPUTS, PRESET_ERRORS, rank=2),
    "AdamW8bit": record(AdamW8bit, ADAM_INPUTS, EIGHT_BIT_ERRORS),
    "AdamW8bit-bnb8": record(AdamW8bit, ADAM_INPUTS, EIGHT_BIT_ERRORS, state_dtype="bnb8"),
    "BAdam": record(BAdam, BLOCK_INPUTS, ADAM_ERRORS, density=1.0, block_by="tensor"),
    "LISA": record(LISA, BLOCK_INPUTS, ADAM_ERRORS, layers=1, block_by="tensor"),
    "Apollo": record(Apollo, [*ADAM_INPUTS, *CAPTURABLE_INPUTS], ADAM_ERRORS, rank=2, update_proj_gap=3),
    "Fira": record(Fira, [*ADAM_INPUTS, *CAPTURABLE_INPUTS], ADAM_ERRORS, rank=2, scale=1.0),
    "FiraAdamW": record(FiraAdamW, ADAM_INPUTS, ADAM_ERRORS, rank=2),
    "Frugal": record(Frugal, FRUGAL_INPUTS, ADAM_ERRORS),
    "OnlineSubspaceDescent": record(OnlineSubspaceDescent, [*ADAM_INPUTS, *CAPTURABLE_INPUTS], ADAM_ERRORS, rank=2),
    "GaLorePlus": record(GaLorePlus, PLUS_INPUTS, ADAM_ERRORS, rank=2, residual_density=0.1, residual_warmup=2),
    "LowRank": record(
        LowRank, [*ADAM_INPUTS, *CAPTURABLE_INPUTS], ADAM_ERRORS, rank=2, projector="columns", residual="signsgd"
    ),
    "LowRank-normalised": record(LowRank, ADAM_INPUTS, ADAM_ERRORS, rank=2, projector="track", weight_norm=True),
    "Flora": record(Flora, ADAFACTOR_INPUTS, ADAFACTOR_ERRORS, rank=2),
    "Adafactor": record(Adafactor, ADAFACTOR_INPUTS, ADAFACTOR_ERRORS),
}

every = pytest.mark.parametrize("info", OPTIM_DB.values(), ids=OPTIM_DB)


def cases() -> Iterator[Any]:
    for name, info in OPTIM_DB.items():
        for case in info.optim_inputs_func("cpu"):
            yield pytest.param(info, case, id=f"{name}-{case.desc}")


every_input = pytest.mark.parametrize(("info", "case"), list(cases()))


def fresh(case: OptimizerInput) -> dict[str, Any]:
    """Options of its own for each optimizer: schedulers write into a tensor lr."""
    return deepcopy(case.kwargs)


def linear_problem(contiguous: bool = True) -> tuple[Parameter, Parameter, Tensor]:
    """Torch's toy problem: weight (10, 5), bias (10), input (5)."""
    torch.manual_seed(1)
    weight = torch.randn(10, 5) if contiguous else torch.randn(10, 5, 2)[..., 0]
    bias = torch.randn(10) if contiguous else torch.randn(10, 2)[..., 0]
    return Parameter(weight), Parameter(bias), torch.randn(5)


def closure_of(optimizer: Optimizer, weight: Tensor, bias: Tensor, value: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(value) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def descend(optimizer: Optimizer, closure: Callable[[], Tensor], schedulers: list[Any], maximize: bool) -> None:
    initial = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert (closure().item() > initial) == maximize


def net(seed: int = 0) -> torch.nn.Module:
    """Torch's model for state tests: a convolution and a batch norm."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2, eps=1e-05, momentum=0.1))


def train(module: torch.nn.Module, optimizer: Optimizer, steps: int) -> None:
    value = torch.arange(2 * 4 * 8 * 8, dtype=torch.float32).reshape(2, 4, 8, 8).sin()
    for _ in range(steps):
        optimizer.step(lambda: (optimizer.zero_grad(), (loss := module(value).square().sum()).backward(), loss)[-1])


def assert_same_training(
    one: tuple[torch.nn.Module, Optimizer], other: tuple[torch.nn.Module, Optimizer], steps: int = 4
) -> None:
    for _ in range(steps):
        train(*one, 1)
        train(*other, 1)
        for mine, theirs in zip(one[0].parameters(), other[0].parameters(), strict=True):
            assert torch.equal(mine, theirs)


# ---------------------------------------------------------------------------------------------------- errors


def error_cases() -> Iterator[Any]:
    for name, info in OPTIM_DB.items():
        for case in info.optim_error_inputs_func("cpu", torch.float32):
            yield pytest.param(info, case, id=f"{name}-{case.optimizer_error_input.desc}")


@pytest.mark.parametrize(("info", "error"), list(error_cases()))
def test_errors(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    case = error.optimizer_error_input
    params = [Parameter(torch.randn(3, 4))] if case.params is None else case.params
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expected(error.error_type, match=error.error_regex):
        info.optim_cls(params, **case.kwargs)


# ------------------------------------------------------------------------------------------------- directions


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [None, 0, 1])
def test_forloop_goes_right_direction(
    info: OptimizerInfo, case: OptimizerInput, contiguous: bool, schedulers: int | None
) -> None:
    weight, bias, value = linear_problem(contiguous)
    optimizer = info.optim_cls([weight, bias], **fresh(case))
    chain = [] if schedulers is None else [build(optimizer) for build in info.scheduler_inputs[schedulers]]
    descend(optimizer, closure_of(optimizer, weight, bias, value), chain, case.kwargs.get("maximize", False))


@every_input
@pytest.mark.parametrize("schedulers", [0, 1])
def test_param_group_with_lrscheduler_goes_right_direction(
    info: OptimizerInfo, case: OptimizerInput, schedulers: int
) -> None:
    weight, bias, value = linear_problem()
    optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **fresh(case))
    chain = [build(optimizer) for build in info.scheduler_inputs[schedulers]]
    descend(optimizer, closure_of(optimizer, weight, bias, value), chain, case.kwargs.get("maximize", False))


@every_input
@pytest.mark.parametrize("dims", [0, 1])
def test_tensor_lr(info: OptimizerInfo, case: OptimizerInput, dims: int) -> None:
    finals = []
    for tensor in (False, True):
        weight, bias, value = linear_problem()
        options = fresh(case)
        lr = float(options.pop("lr", 1e-3))
        options["lr"] = torch.full((1,) * dims, lr) if tensor else lr
        optimizer = info.optim_cls([weight, bias], **options)
        closure = closure_of(optimizer, weight, bias, value)
        for _ in range(5):
            optimizer.step(closure)
        finals.append((weight.detach(), bias.detach()))
        if tensor:
            assert float(options["lr"]) == pytest.approx(lr)
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-6)


@every
def test_param_groups_lr(info: OptimizerInfo) -> None:
    for case in info.optim_inputs_func("cpu"):
        weight, bias, value = linear_problem()
        frozen = Parameter(torch.randn(6, 5))
        options = {**fresh(case), "lr": 0.0}
        moving = {"params": [weight], "lr": 0.01}
        optimizer = info.optim_cls([moving, {"params": [bias]}, {"params": [frozen]}], **options)
        frozen.grad = torch.randn(6, 5)
        before = [param.detach().clone() for param in (weight, bias, frozen)]
        (weight.mv(value) + bias).pow(2).sum().backward()
        optimizer.step()
        assert not torch.equal(weight, before[0])
        assert torch.equal(bias, before[1])
        assert torch.equal(frozen, before[2])


@every_input
def test_param_groups_weight_decay(info: OptimizerInfo, case: OptimizerInput) -> None:
    finals = []
    for decay in (0.0, 0.5):
        weight, bias, value = linear_problem()
        options = {**fresh(case), "lr": 0.01, "weight_decay": 0.0}
        before = weight.detach().clone()
        optimizer = info.optim_cls([{"params": [weight], "weight_decay": decay}, {"params": [bias]}], **options)
        optimizer.step(closure_of(optimizer, weight, bias, value))
        finals.append((weight.detach(), bias.detach()))
    assert torch.equal(finals[0][1], finals[1][1])
    # Two decay by a rate that is scaled; decay after the update, as the authors have it, multiplies the update too
    scaled = info.optim_cls in (Flora, GaLoreAdafactor)
    rate = 0.01 * float(before.square().mean().sqrt()) if scaled else 0.01
    torch.testing.assert_close(finals[0][0] - finals[1][0], rate * 0.5 * before, rtol=0, atol=2e-4)
    assert not torch.equal(finals[0][0], finals[1][0])


# ------------------------------------------------------------------------------------------------ no gradients


@every_input
def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, case: OptimizerInput) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = deepcopy(params)
    optimizer = info.optim_cls(params, **fresh(case))
    optimizer.step()
    assert all(torch.equal(mine, old) for mine, old in zip(params, before, strict=True))


@every_input
def test_step_is_noop_for_zero_grads_but_for_decay(info: OptimizerInfo, case: OptimizerInput) -> None:
    param = Parameter(torch.randn(5, 4))
    before = param.detach().clone()
    options = {**fresh(case), "lr": 0.01, "weight_decay": 0.0}
    optimizer = info.optim_cls([param], **options)
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before)


# ------------------------------------------------------------------------------------------------- state dicts


@every_input
@pytest.mark.parametrize("named", [False, True])
def test_state_dict_deterministic(info: OptimizerInfo, case: OptimizerInput, named: bool) -> None:
    weight, bias, value = linear_problem()
    pairs = [("weight", weight), ("bias", bias)] if named else [weight, bias]
    optimizer = info.optim_cls(pairs, **fresh(case))
    closure = closure_of(optimizer, weight, bias, value)
    for _ in range(3):
        optimizer.step(closure)
    weight_copy, bias_copy = deepcopy(weight), deepcopy(bias)
    pairs = [("weight", weight_copy), ("bias", bias_copy)] if named else [weight_copy, bias_copy]
    twin = info.optim_cls(pairs, **fresh(case))
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    twin_closure = closure_of(twin, weight_copy, bias_copy, value)
    for _ in range(5):
        optimizer.step(closure)
        twin.step(twin_closure)
        assert torch.equal(weight, weight_copy)
        assert torch.equal(bias, bias_copy)
    saved = [optimizer.state_dict()["state"], twin.state_dict()["state"]]
    for index, held in saved[0].items():
        for name, tensor in held.items():
            assert torch.equal(tensor, saved[1][index][name]), name
    # loading once more, into itself, goes on alike
    twin.load_state_dict(twin.state_dict())
    optimizer.step(closure)
    twin.step(twin_closure)
    assert torch.equal(weight, weight_copy)


@every_input
def test_can_load_older_state_dict(info: OptimizerInfo, case: OptimizerInput) -> None:
    module = net()
    optimizer = info.optim_cls(module.parameters(), **fresh(case))
    train(module, optimizer, 3)
    older = deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in ("maximize", "foreach", "fused", "differentiable", "capturable"):
            group.pop(flag, None)
    optimizer.load_state_dict(older)
    train(module, optimizer, 3)
    assert all(param.isfinite().all() for param in module.parameters())


@every
@pytest.mark.parametrize("saved_named", [False, True])
def test_can_load_from_to_named_state_dict(info: OptimizerInfo, saved_named: bool) -> None:
    for case in info.optim_inputs_func("cpu"):
        module = net()
        source = module.named_parameters() if saved_named else module.parameters()
        optimizer = info.optim_cls(source, **fresh(case))
        train(module, optimizer, 2)
        twin_module = deepcopy(module)
        params = twin_module.parameters() if saved_named else twin_module.named_parameters()
        twin = info.optim_cls(params, **fresh(case))
        twin.load_state_dict(deepcopy(optimizer.state_dict()))
        assert_same_training((module, optimizer), (twin_module, twin))


@every_input
def test_save_load_equality_with_weights_only(info: OptimizerInfo, case: OptimizerInput) -> None:
    module = net()
    optimizer = info.optim_cls(module.parameters(), **fresh(case))
    train(module, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin_module = deepcopy(module)
    twin = info.optim_cls(twin_module.parameters(), **fresh(case))
    twin.load_state_dict(loaded)
    for mine, theirs in zip(optimizer.state.values(), twin.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert_same_training((module, optimizer), (twin_module, twin))


@every_input
def test_load_nontensor_step(info: OptimizerInfo, case: OptimizerInput) -> None:
    module = net()
    optimizer = info.optim_cls(module.parameters(), **fresh(case))
    train(module, optimizer, 3)
    twin_module = deepcopy(module)
    saved = deepcopy(optimizer.state_dict())
    for held in saved["state"].values():
        held["step"] = held["step"].item()
    twin = info.optim_cls(twin_module.parameters(), **fresh(case))
    twin.load_state_dict(saved)
    assert all(isinstance(held["step"], Tensor) for held in twin.state.values())
    assert_same_training((module, optimizer), (twin_module, twin))


# --------------------------------------------------------------------------------------------- object contract


@every_input
def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo, case: OptimizerInput) -> None:
    optimizer = info.optim_cls([Parameter(torch.randn(2, 3)) for _ in range(2)], **fresh(case))
    twin = deepcopy(optimizer)

    def public(instance: Optimizer) -> set[str]:
        return {
            name for name in dir(instance) if not name.startswith("_") and not inspect.ismethod(getattr(instance, name))
        }

    assert public(optimizer) == public(twin)


@every_input
def test_non_empty_state(info: OptimizerInfo, case: OptimizerInput) -> None:
    module = net()
    optimizer = info.optim_cls(module.parameters(), **fresh(case))
    train(module, optimizer, 1)
    assert len(optimizer.state) == len(list(module.parameters()))
    assert all(held for held in optimizer.state.values())


@every
def test_step_hooks(info: OptimizerInfo) -> None:
    for case in info.optim_inputs_func("cpu"):
        weight, bias, value = linear_problem()
        optimizer = info.optim_cls([weight, bias], **fresh(case))
        fired: list[str] = []

        def note(what: str, seen: list[str], *_: Any) -> None:
            seen.append(what)

        handles = [
            register_optimizer_step_pre_hook(functools.partial(note, "all-pre", fired)),
            register_optimizer_step_post_hook(functools.partial(note, "all-post", fired)),
            optimizer.register_step_pre_hook(functools.partial(note, "pre", fired)),
            optimizer.register_step_post_hook(functools.partial(note, "post", fired)),
        ]
        try:
            closure = closure_of(optimizer, weight, bias, value)
            optimizer.step(closure)
            assert fired == ["all-pre", "pre", "post", "all-post"]
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step(closure)
        assert len(fired) == 4


@every
def test_state_dict_hooks(info: OptimizerInfo) -> None:
    optimizer = info.optim_cls([Parameter(torch.randn(3, 4))], **fresh(info.optim_inputs_func("cpu")[0]))
    optimizer.register_state_dict_pre_hook(lambda opt: opt.param_groups[0].update(note=1))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 2})
    saved = optimizer.state_dict()
    assert saved["extra"] == 2
    assert saved["param_groups"][0]["note"] == 1
    optimizer.register_load_state_dict_pre_hook(
        lambda _, loaded: {**loaded, "param_groups": [{**group, "lr": 0.5} for group in loaded["param_groups"]]}
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.param_groups[0].update(note=3))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["note"] == 3


@every_input
def test_optimizer_can_be_printed(info: OptimizerInfo, case: OptimizerInput) -> None:
    optimizer = info.optim_cls([Parameter(torch.randn(2, 3))], **fresh(case))
    assert info.optim_cls.__name__ in repr(optimizer)
    assert "lr" in str(optimizer)


@every
def test_no_input_warns(info: OptimizerInfo) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in info.optim_inputs_func("cpu"):
            module = net()
            train(module, info.optim_cls(module.parameters(), **fresh(case)), 2)
