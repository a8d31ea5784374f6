"""LowRank: the named methods as its settings, and every combination of slots either works or says why not."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from lowmem.optim import Fira, Frugal, GaLore, GaLorePlus, LowRank, OnlineSubspaceDescent
from lowmem.optim.core.projector import PROJECTORS
from lowmem.optim.core.validate import CHOICES
from lowmem.optim.lowrank import CHOICES as OWN
from torch import Tensor, nn

from tests.cases import gradients
from tests.helpers import randn

SHAPES = [(24, 15), (13, 28), (16, 16)]
RESIDUALS = OWN["residual"]
RULES = CHOICES["rule"]
NEEDED = {"cross_head": {"num_heads": 2}, "descend": {"gamma": None}}
"""Options without which a projector has no meaning."""


def run(build: type[LowRank], shape: tuple[int, int], **options: Any) -> Tensor:
    param = nn.Parameter(randn(*shape, dtype=torch.float64))
    optimizer = build([param], **{"lr": 0.01, "rank": 4, "weight_decay": 0.1, **options})
    for grad in gradients(shape, 13):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


NAMED = {
    "galore": (GaLore, {}, {}),
    "galore, adafactor, kept": (GaLore, {"rule": "adafactor", "carry": "keep"}, {}),
    "fira": (Fira, {}, {"residual": "norm"}),
    "fira, by matrix, unlimited": (Fira, {"scale_mode": "matrix", "gamma": None}, {"residual": "norm"}),
    "frugal, columns": (Frugal, {"projector": "columns", "scale": 1.0}, {"residual": "signsgd", "carry": "reset"}),
    "frugal, svd, sgd": (
        Frugal,
        {"projector": "svd", "scale": 0.5},
        {"residual": "sgd", "residual_scale": 0.3, "carry": "reset"},
    ),
    "online subspace descent": (OnlineSubspaceDescent, {}, {"projector": "descend", "scale": 1.0}),
    "galore+, exact": (GaLorePlus, {"residual_density": 0.1, "residual_warmup": 3}, {"residual": "exact"}),
    "galore+, additive": (
        GaLorePlus,
        {"residual": "additive", "residual_density": 0.1, "residual_warmup": 3},
        {"residual": "additive"},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMED)
def test_the_named_methods_are_settings(name: str, shape: tuple[int, int]) -> None:
    build, options, extra = NAMED[name]
    gap = {} if build is OnlineSubspaceDescent else {"update_proj_gap": 4}
    theirs = {"free_rule": "sgd", "free_scale": 0.3} if name == "frugal, svd, sgd" else {}
    named = run(build, shape, **options, **theirs, **gap)
    ours = run(LowRank, shape, **{**options, **extra}, **gap)
    assert torch.equal(named, ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_channel_residual_rescales_the_gradient_itself(shape: tuple[int, int]) -> None:
    lr, scale, decay, (b1, b2) = 0.01, 0.5, 0.1, (0.9, 0.99)
    options = {"residual": "channel", "projector": "svd", "scale": scale, "betas": (b1, b2), "update_proj_gap": 100}
    ours = run(LowRank, shape, lr=lr, weight_decay=decay, gamma=1.01, **options)
    weight = randn(*shape, dtype=torch.float64)
    left = shape[0] < shape[1]
    basis = first = second = last = None
    for t, grad in enumerate(gradients(shape, 13), 1):
        matrix = grad.T if left else grad
        if basis is None:
            basis = torch.linalg.svd(matrix, full_matrices=False)[2][:4].T
            first = second = torch.zeros(matrix.shape[0], 4, dtype=torch.float64)
        low = matrix @ basis
        first, second = b1 * first + (1 - b1) * low, b2 * second + (1 - b2) * low**2
        step = (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + 1e-8)
        scaled = matrix * (step.norm(dim=1) / (low.norm(dim=1) + 1e-8))[:, None]
        if last is not None:
            scaled = scaled / (max(scaled.norm() / (last + 1e-8), 1.01) / 1.01)
        last = scaled.norm()
        weight = (1 - lr * decay) * weight - lr * scale * (scaled.T if left else scaled)
    assert (ours - weight).norm() <= 1e-9 * weight.norm()


def build(options: dict[str, Any], dtype: torch.dtype) -> tuple[LowRank, list[nn.Parameter]]:
    params = [nn.Parameter(randn(12, 10, seed=1).to(dtype)), nn.Parameter(randn(8, 14, seed=2).to(dtype))]
    return LowRank([{"params": params, "rank": 3}], lr=0.01, update_proj_gap=3, residual_warmup=2, **options), params


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], numbers: range) -> None:
    for step, (index, param) in product(numbers, enumerate(params)):
        param.grad = randn(*param.shape, seed=10 * step + index).to(param.dtype)
        if index == len(params) - 1:
            optimizer.step()


def measured_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state but counters."""
    return sum(
        value.untyped_storage().nbytes()
        for held in optimizer.state.values()
        for name, value in held.items()
        if value.dim() or name == "limit_norm"
    )


def assert_moves_and_stays_finite(optimizer: LowRank, params: list[nn.Parameter]) -> None:
    before = [param.detach().clone() for param in params]
    steps(optimizer, params, range(4))
    for param, old in zip(params, before, strict=True):
        assert param.isfinite().all()
        assert not torch.equal(param, old)
        values = (value for name, value in optimizer.state[param].items() if name != "until_refresh")
        assert all(value.isfinite().all() for value in values if value.is_floating_point())


def assert_resumes(optimizer: LowRank, params: list[nn.Parameter], options: dict[str, Any]) -> None:
    other, twins = build(options, params[0].dtype)
    with torch.no_grad():
        for twin, param in zip(twins, params, strict=True):
            twin.copy_(param)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for opt, members in ((optimizer, params), (other, twins)):
        steps(opt, members, range(4, 8))
    assert all(torch.equal(twin, param) for twin, param in zip(twins, params, strict=True))


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_combination_of_slots_works_or_is_refused(projector: str, residual: str | None) -> None:
    worked, refusals = 0, []
    settings = [("rotate", torch.bfloat16), ("reset", torch.float32)]
    for rule, (carry, dtype) in product(RULES, settings):
        options = {"projector": projector, "residual": residual, "rule": rule, "carry": carry}
        options |= {"state_dtype": "bfloat16" if rule == "lion" else "float32", **NEEDED.get(projector, {})}
        try:
            optimizer, params = build(options, dtype)
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert_moves_and_stays_finite(optimizer, params)
        assert measured_bytes(optimizer) == optimizer.summary().state_bytes
        assert_resumes(optimizer, params, options)
        worked += 1
    assert worked or residual == "additive" or (projector == "gaussian" and residual != "channel")
    assert all(any(word in text for word in ("pass ", "choose ", "drop ")) for text in refusals), refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "norms"}, "Invalid residual: 'norms'"),
        ({"residual": "norm", "rule": "adafactor"}, "rule='adafactor' has the learning rate in its direction"),
        ({"residual": "signsgd", "rule": "adafactor"}, "choose adamw, lion, rmsprop or sgd"),
        ({"residual": "norm", "proj_type": "full"}, 'pass scale_mode="matrix"'),
        ({"residual": "norm", "projector": "descend"}, "pass gamma=None, or projector='track'"),
        ({"residual": "additive", "projector": "dct"}, "pass projector='sketch'"),
        ({"residual": "exact", "rule": "lion"}, "pass rule='adamw', or residual=None"),
        ({"residual": "norm", "compat": "official"}, "drop one of them"),
        (
            {"residual": "sgd", "projector": "cross_head", "num_heads": [(6, 2), (3, None)]},
            "no one P for residual='sgd'; pass one number",
        ),
        ({"residual_scale": -1.0}, "Invalid residual_scale: -1.0"),
        ({"projector": "columns", "proj_type": "left"}, "projector='columns' chooses its own side"),
        ({"projector": "dct", "proj_type": "full"}, "needs two dense bases"),
        ({"projector": "descend", "lazy": 0.5}, "is never refreshed, drop the option"),
    ],
)
def test_combinations_without_meaning_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank([nn.Parameter(randn(9, 7))], rank=3, **options)
