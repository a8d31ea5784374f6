"""Sharded parameters with heads that share a basis, and with single entries: the dense run, by worlds of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowmem.optim import Fira, GaLorePlus, LowRank
from lowmem.optim.core.entries import kth_largest, largest
from lowmem.optim.core.layout import ALONE, Layout
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.helpers import randn
from tests.test_sharding import GAP, LR, RANK, Build, compare, gradients, in_world, placed, run

SHAPES = {"query": (24, 15), "key": (16, 28)}
LOW: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "lr": LR, "weight_decay": 0.1}
WARM: dict[str, Any] = {**LOW, "residual_density": 0.1, "residual_warmup": 3}
FUSED = {(24, 15): [(12, 3), (6, 1), (6, None)], (16, 28): [(5, 1), (6, 3), (5, None)]}


def fused(params: Any, **options: Any) -> torch.optim.Optimizer:
    """Ranges of rows that shards cut."""
    return GaLorePlus(params, **{**WARM, **options}, num_heads=FUSED[tuple(params[0].shape)])


OPTIMIZERS: dict[str, Build] = {
    "plus": lambda p: GaLorePlus(p, **LOW),
    "exact": lambda p: GaLorePlus(p, **WARM),
    "additive": lambda p: GaLorePlus(p, **WARM, residual="additive"),
    "additive-left": lambda p: GaLorePlus(p, **WARM, residual="additive", proj_type="reverse_std", maximize=True),
    "additive-reset": lambda p: GaLorePlus(p, **WARM, residual="additive", carry="reset"),
    "every-entry": lambda p: GaLorePlus(p, **{**WARM, "residual_density": 1.0}),
    "heads": lambda p: GaLorePlus(p, **LOW, num_heads=4, residual=None),
    "heads-exact": lambda p: GaLorePlus(p, **WARM, num_heads=8),
    "heads-additive": lambda p: GaLorePlus(p, **WARM, num_heads=4, residual="additive", stagger=True),
    "heads-max-norm": lambda p: GaLorePlus(p, **WARM, num_heads=2, head_select="max_norm"),
    "heads-cycle": lambda p: GaLorePlus(p, **WARM, num_heads=8, head_select="cycle", carry="reset"),
    "one-head": lambda p: GaLorePlus(p, **WARM, num_heads=1),
    "fused": fused,
    "fused-additive": lambda p: fused(p, residual="additive"),
    "fused-keep": lambda p: fused(p, carry="keep", head_select="max_norm", residual=None),
    "lowrank-track": lambda p: LowRank(p, **WARM, residual="exact", projector="track"),
    "lowrank-columns": lambda p: LowRank(p, **WARM, residual="exact", projector="columns"),
    "fira-heads": lambda p: Fira(p, **LOW, projector="cross_head", num_heads=4),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 5])
def test_sharded_trajectories_are_the_dense_one(name: str, shape: str, dim: int, size: int) -> None:
    """Kept and projected side sharded; worlds of 5 leave uneven and empty pieces, and cut heads."""
    assert compare(OPTIMIZERS[name], SHAPES[shape], size, dim) < 1e-9
