"""Matrices of one bucket that are sharded: Adafactor's statistics and Flora's images of all of them go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.bench.plan_rank import rank_plan
from lowmem.bench.plan_world import World
from lowmem.optim import Adafactor, Flora, GaLore, LowRank
from lowmem.optim.presets import GaLoreAdafactor
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers import randn
from tests.test_sharding import GAP, LR, RANK, STEPS, Build, calls, gradients, in_world, placed
from tests.test_sharding import watched as watched

MOVING = 2
"""Steps of a window that is so short that the second step measured has another basis."""

OPTIMIZERS: dict[str, Build] = {
    "flora": lambda p: Flora(p, rank=RANK, lr=LR, update_proj_gap=30),
    "flora-moving": lambda p: Flora(p, rank=RANK, lr=LR, update_proj_gap=MOVING, beta1=0.1),
    "flora-ascending": lambda p: Flora(p, rank=RANK, lr=LR, update_proj_gap=30, maximize=True, weight_decay=0.1),
    "flora-plain": lambda p: Flora(p, rank=None, lr=LR),
    "flora-no-momentum": lambda p: Flora(p, lr=LR, beta1=None),
    "adafactor": lambda p: Adafactor(p),
    "adafactor-momentum": lambda p: Adafactor(p, lr=LR, beta1=0.9, maximize=True),
    "adafactor-whole": lambda p: Adafactor(p, lr=LR, min_dim_size_to_factor=100),
    "adafactor-decay": lambda p: Adafactor(p, weight_decay=0.1, decay_by="alpha", clip_threshold=0.3),
    "adafactor-torch": lambda p: Adafactor.torch(p, lr=LR),
    "rule": lambda p: LowRank(p, rank=RANK, update_proj_gap=GAP, lr=LR, rule="adafactor"),
    "rule-no-momentum": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, lr=LR, rule="adafactor", betas=(0.0, 0.9)),
    "rule-scaled": lambda p: GaLoreAdafactor([{"params": p, "rank": RANK, "update_proj_gap": GAP}], beta1=0.9),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
Make = Callable[[Tensor], Tensor]


@every
@pytest.mark.parametrize("dim", [0, 1])
def test_many_matrices_send_as_often_as_one(name: str, dim: int) -> None:
    one, three = (calls(OPTIMIZERS[name], (24, 15), dim, count) for count in (1, 3))
    assert three == one > 0


@every
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(24, 15), (13, 28)], ids=str)
def test_many_matrices_follow_the_dense_run(name: str, shape: tuple[int, int], dim: int) -> None:
    """Each has its own sums: their gradients and weights differ in size and in direction."""

    def train(make: Make) -> list[Tensor]:
        starts = [randn(*shape, seed=seed, dtype=torch.float64) * 10.0**-seed for seed in range(3)]
        starts += [start[:, 0].contiguous() for start in starts]
        params = [nn.Parameter(make(start)) for start in starts]
        optimizer = OPTIMIZERS[name](params)
        for step in range(STEPS):
            for index, param in enumerate(params):
                grad = gradients(shape)[(step + index) % STEPS] * 3.0**index
                param.grad = make(grad if param.ndim == 2 else grad[:, 0].contiguous())
            optimizer.step()
        return [param.detach() for param in params]

    dense = train(torch.clone)

    def body() -> float:
        found = train(placed(3, dim))
        return max(float((a.full_tensor() - b).abs().max()) for a, b in zip(found, dense, strict=True))

    assert max(in_world(3, body)) < 1e-9


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("flora")])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_a_bad_gradient_counts_as_zero_and_concerns_no_other_matrix(name: str, dim: int, value: float) -> None:
    shape = (24, 15)

    def train(make: Make, bad: Any) -> list[Tensor]:
        params = [nn.Parameter(make(randn(*shape, seed=seed, dtype=torch.float64))) for seed in range(3)]
        optimizer = OPTIMIZERS[name](params)
        for step in range(4):
            for index, param in enumerate(params):
                grad = gradients(shape)[step + index].clone()
                if step == 2 and index == 1:
                    grad = bad(grad)
                param.grad = make(grad)
            optimizer.step()
        return [param.detach() for param in params]

    def spoilt(grad: Tensor) -> Tensor:
        grad[3, 7] = value
        return grad

    dense = train(torch.clone, spoilt)
    assert all(weight.isfinite().all() for weight in dense)

    def body() -> float:
        found = train(placed(3, dim), spoilt)
        return max(float((a.full_tensor() - b).abs().max()) for a, b in zip(found, dense, strict=True))

    assert max(in_world(3, body)) < 1e-9


class Matrices(nn.Module):
    """Matrices of one shape, without data."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(4096, 2048, device="meta") for _ in range(count)])


@every
def test_no_second_temporary_of_a_weights_size(name: str) -> None:
    """Three matrices need what one does, and statistics and images of the others."""

    def build(model: nn.Module) -> Optimizer:
        return OPTIMIZERS[name](list(model.parameters()))

    one, three = (rank_plan(Matrices(count), build, World(4)) for count in (1, 3))
    assert three.workspace - one.workspace < one.weights / 20
    assert one.step.calls == three.step.calls > 0
