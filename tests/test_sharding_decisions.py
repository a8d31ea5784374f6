"""What ranks decide from gradients they decide alike, also where one has nothing but zeros, or no gradient at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lowmem.optim import BAdam, Fira, GaLore
from lowmem.optim.core.magnitude import magnitude
from torch import Tensor, nn

from tests.helpers import randn
from tests.test_sharding import GAP, LR, RANK, gradients, in_world, placed

SHAPE, WORLD = (24, 15), 3
Make = Callable[[Tensor], Tensor]


def first_rows(grad: Tensor) -> Tensor:
    """A gradient of which the last rank has nothing but zeros."""
    kept = grad.clone()
    kept[-SHAPE[0] // WORLD :] = 0.0
    return kept


def is_last() -> bool:
    return dist.is_initialized() and dist.get_rank() == WORLD - 1


@pytest.mark.parametrize(("entry", "found"), [(2.0, 2.0), (float("nan"), float("inf")), (0.0, 0.0)])
def test_every_rank_knows_the_largest_magnitude(entry: float, found: float) -> None:
    def body() -> list[float]:
        answers = []
        for rows in (SHAPE[0], 2):  # of two rows the last rank has none
            grad = torch.zeros(rows, SHAPE[1])
            grad[0, 3] = -entry
            weight = nn.Parameter(placed(WORLD, 0)(torch.ones(rows, SHAPE[1])))
            weight.grad = placed(WORLD, 0)(grad)
            if is_last():
                weight.grad = None
            answers.append(magnitude(weight))
        return answers

    assert in_world(WORLD, body) == [[found, found]] * WORLD


def train(build: Callable[..., Any], make: Make, rates: list[float], none: bool) -> tuple[list[Tensor], Any]:
    """Step two matrices with a gradient of zeros, or of None, on the last rank in the first step."""
    params = [nn.Parameter(make(randn(*SHAPE, seed=seed, dtype=torch.float64))) for seed in range(2)]
    optimizer = build(params)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for param in params:
            grad = gradients(SHAPE)[step]
            param.grad = make(first_rows(grad) if step == 0 else grad)
        if none and step == 0 and is_last():
            params[0].grad = None
        optimizer.step()
    return [param.detach() for param in params], optimizer.param_groups[0]


CASES: dict[str, tuple[Callable[..., Any], list[float]]] = {
    "ranks are chosen": (lambda p: GaLore(p, rank="auto", energy=0.9, update_proj_gap=GAP), [LR] * 3),
    "rates warm up": (lambda p: Fira(p, rank=RANK, update_proj_gap=GAP), [0.0, LR, LR]),
    "blocks take turns": (lambda p: BAdam(p, block_by="tensor", update_proj_gap=2), [0.0, LR, LR]),
}


@pytest.mark.parametrize("none", [False, True], ids=["zeros", "None"])
@pytest.mark.parametrize("name", CASES)
def test_a_rank_without_a_gradient_decides_as_the_others(name: str, none: bool) -> None:
    build, rates = CASES[name]
    dense, group = train(build, torch.clone, rates, none)

    def body() -> None:
        found, own = train(build, placed(WORLD, 0), rates, none)
        for key in ("ranks", "block_refreshes", "block_wait"):
            assert own.get(key) == group.get(key)
        for one, other in zip(found, dense, strict=True):
            torch.testing.assert_close(one.full_tensor(), other, rtol=0, atol=1e-9)

    in_world(WORLD, body)
