"""Counter-based random numbers: a pure function of (seed, row, column).

Any shard, device, resumed run or process regenerates the same numbers without storing or sending a generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_BLOCK = 1 << 12


def mix(*values: int) -> int:
    """Hash integers into one 32-bit seed (FNV-like fold of a finaliser)."""
    state = 0x811C9DC5
    for value in values:
        state = _finalise_int((state ^ (value & _MASK)) * 0x01000193 & _MASK)
    return state


def bits(seed: int, rows: range, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for every cell of some rows, int64 in [0, 2^32), shape (len(rows), cols)."""
    row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)[:, None]
    col = torch.arange(cols, device=device, dtype=torch.int64)[None, :]
    keyed = _finalise((row * _GOLDEN + seed) & _MASK)
    return _finalise((keyed ^ (col * 0x85EBCA6B & _MASK)) & _MASK)


def normal(seed: int, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normals in fp32, shape (rows, cols), by Box-Muller on two words a cell."""
    out = torch.empty((rows, cols), device=device)
    block = max(1, _BLOCK // max(cols, 1))  # the integers take ten times the room of their result
    for first in range(0, rows, block):
        part = range(first, min(first + block, rows))
        radius = bits(seed, part, cols, device).double().add_(0.5).div_(2**32)
        angle = bits(seed ^ 0x5BD1E995, part, cols, device).double().mul_(2 * math.pi / 2**32)
        out[first : part.stop] = radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())
    return out


def _finalise(x: Tensor) -> Tensor:
    # The 32-bit finaliser of lowbias32, in int64 so that products do not overflow before the mask.
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _finalise_int(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
