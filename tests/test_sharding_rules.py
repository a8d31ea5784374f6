"""Sharded parameters whose rule, norms or bases need sums over the whole: the dense run, by worlds of threads."""

from __future__ import annotations

from typing import Any

import pytest
from lowmem.optim import Fira, Frugal, GaLore, LowRank, OnlineSubspaceDescent
from lowmem.optim.presets import GaLoreAdafactor

from tests.test_sharding import GAP, LR, RANK, SHAPES, Build, compare

LOW = {"rank": RANK, "update_proj_gap": GAP, "lr": LR}
FULL = {**LOW, "proj_type": "full", "eps": 1e-6}
"""Ritz vectors on both sides make R diagonal at a refresh: Adam with a tiny eps would blow up roundings beside it."""

OPTIMIZERS: dict[str, Build] = {
    "adafactor": lambda p: GaLore(p, **LOW, rule="adafactor"),
    "adafactor-track": lambda p: GaLore(p, **LOW, rule="adafactor", betas=(0.0, 0.999), projector="track"),
    "adafactor-scaled": lambda p: GaLoreAdafactor(with_options(p), weight_decay=0.1, beta1=0.9, carry="rotate"),
    "adafactor-plain": lambda p: GaLore(p, **{**LOW, "rank": None}, rule="adafactor"),
    "norm": lambda p: GaLore(p, **LOW, weight_norm=True),
    "norm-adafactor": lambda p: GaLore(p, **LOW, weight_norm=True, rule="adafactor", weight_decay=0.1),
    "dct": lambda p: GaLore(p, **LOW, projector="dct"),
    "dct-fira-reverse": lambda p: Fira(p, **LOW, projector="dct", proj_type="reverse_std"),
    "dct-signsgd": lambda p: Frugal(p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="dct", free_space="complement"),
    "int8": lambda p: GaLore(p, **LOW, basis_dtype="int8"),
    "int4-track": lambda p: GaLore(p, **LOW, basis_dtype="int4", projector="track"),
    "full": lambda p: GaLore(p, **FULL),
    "full-svd-adafactor": lambda p: GaLore(p, **FULL, projector="svd", rule="adafactor"),
    "full-track-norm": lambda p: GaLore(p, **FULL, projector="track", weight_norm=True),
    "full-random-int8": lambda p: GaLore(p, **FULL, projector="random", basis_dtype="int8"),
    "full-fira": lambda p: Fira(p, **FULL, scale_mode="matrix"),
    "full-signsgd": lambda p: LowRank(p, **FULL, residual="signsgd"),
    "full-sgd": lambda p: LowRank(p, **FULL, residual="sgd"),
    "online-adafactor": lambda p: OnlineSubspaceDescent(p, rank=RANK, lr=LR, proj_rule="adafactor"),
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
