"""Sharded parameters whose rule, norms or bases need sums over the whole: the dense run, by worlds of threads."""

from __future__ import annotations

from typing import Any

import pytest
from lowmem.optim import Fira, GaLore
from lowmem.optim.presets import GaLoreAdafactor

from tests.test_sharding import GAP, LR, RANK, SHAPES, Build, compare

LOW = {"rank": RANK, "update_proj_gap": GAP, "lr": LR}

OPTIMIZERS: dict[str, Build] = {
    "adafactor": lambda p: GaLore(p, **LOW, rule="adafactor"),
    "adafactor-track": lambda p: GaLore(p, **LOW, rule="adafactor", betas=(0.0, 0.999), projector="track"),
    "adafactor-scaled": lambda p: GaLoreAdafactor(with_options(p), weight_decay=0.1, beta1=0.9, carry="rotate"),
    "adafactor-plain": lambda p: GaLore(p, **{**LOW, "rank": None}, rule="adafactor"),
    "norm": lambda p: GaLore(p, **LOW, weight_norm=True),
    "norm-adafactor": lambda p: GaLore(p, **LOW, weight_norm=True, rule="adafactor", weight_decay=0.1),
    "norm-fira": lambda p: Fira(p, **LOW, weight_norm=True, proj_type="reverse_std"),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def with_options(params: Any) -> list[dict[str, Any]]:
    """The groups of a preset, which names its options as the authors' code does."""
    return [{"params": params, "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}]


@every
@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 5])
def test_sharded_trajectories_are_the_dense_one(name: str, shape: str, dim: int, size: int) -> None:
    """Kept and projected side sharded; worlds of 5 leave uneven and empty pieces."""
    assert compare(OPTIMIZERS[name], SHAPES[shape], size, dim) < 1e-9
