"""Gradients of sharded parameters that were summed in the subspace: a cycle goes on in any world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.optim import GaLore, SubspaceAccumulator
from lowmem.optim.core.sharding import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.helpers import randn
from tests.test_sharding import GAP, LR, RANK, gradients, in_world, placed

SHAPE, STEPS, MICRO = (24, 15), 6, 2
Make = Callable[[Tensor], Tensor]
OPTIONS: dict[str, dict[str, Any]] = {
    "sketch": {},
    "both sides": {"proj_type": "full", "eps": 1e-6},
    "spread": {"shard_basis": True},
    "entries": {"projector": "randk", "carry": "reset"},
}


def build(params: list[nn.Parameter], name: str) -> tuple[GaLore, SubspaceAccumulator]:
    optimizer = GaLore(params, rank=RANK, update_proj_gap=GAP, lr=LR, **OPTIONS[name])
    return optimizer, SubspaceAccumulator(optimizer)


def train(made: Any, make: Make, batches: range) -> None:
    """Micro-batches, of which every second ends a step."""
    optimizer, accumulator = made
    (weight,) = optimizer.param_groups[0]["params"]
    for batch in batches:
        grad = make(gradients(SHAPE)[batch % 9] / MICRO)
        weight.grad = grad if weight.grad is None else weight.grad + grad
        accumulator.accumulate()
        if batch % MICRO == MICRO - 1:
            accumulator.step()


def start(make: Make, name: str, weight: Tensor | None = None) -> Any:
    weight = randn(*SHAPE, seed=99, dtype=torch.float64) if weight is None else weight
    return build([nn.Parameter(make(weight))], name)


def weights(made: Any) -> Tensor:
    (weight,) = made[0].param_groups[0]["params"]
    return whole(weight.detach()).clone()


def gathered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: gathered(one) for key, one in value.items()}
    return whole(value).clone() if isinstance(value, Tensor) else value


def on(sizes: tuple[int, ...], *placements: Any) -> Make:
    mesh = init_device_mesh("cpu", sizes)
    return lambda tensor: distribute_tensor(tensor.clone(), mesh, placements)


WORLDS: dict[str, tuple[int, Callable[[], Make]]] = {
    "kept": (3, lambda: placed(3, 0)),
    "projected": (3, lambda: placed(3, 1)),
    "hybrid": (4, lambda: on((2, 2), Replicate(), Shard(1))),
    "both": (4, lambda: on((2, 2), Shard(0), Shard(1))),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("middle", [1, 5], ids=["at a refresh", "between two"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_cycle_is_saved_in_its_middle_and_goes_on_in_any_world(world: str, middle: int, name: str) -> None:
    size, put = WORLDS[world]
    alone = start(torch.clone, name)
    train(alone, torch.clone, range(STEPS * MICRO))

    def first() -> Any:
        make = put()
        made = start(make, name)
        train(made, make, range(middle))
        saved = made[1].state_dict()
        assert all(isinstance(low, DTensor) for low in saved["sums"].values())
        assert bool(saved["sums"]) == (middle > 1)
        return weights(made), gathered(made[0].state_dict()), gathered(saved)

    weight, state, saved = in_world(size, first)[0]

    def goes_on(make: Make) -> float:
        made = start(make, name, weight)
        made[0].load_state_dict(state)
        made[1].load_state_dict(saved)
        train(made, make, range(middle, STEPS * MICRO))
        return float((weights(made) - weights(alone)).abs().max())

    assert goes_on(torch.clone) < 1e-9
    for other, where in ((size, put), (2, lambda: placed(2, 0)), (2, lambda: placed(2, 1))):
        assert max(in_world(other, lambda where=where: goes_on(where()))) < 1e-9
