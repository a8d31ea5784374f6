"""Counter-based random numbers: a pure function of (seed, row, column).

Any shard, device, resumed run or process regenerates the same numbers without storing or sending a generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def mix(*values: int) -> int:
    """Hash integers into one 32-bit seed (FNV-like fold of a finaliser)."""
    state = 0x811C9DC5
    for value in values:
        state = _finalise_int((state ^ (value & _MASK)) * 0x01000193 & _MASK)
    return state


def bits(seed: int, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for every cell, int64 in [0, 2^32), shape (rows, cols)."""
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    col = torch.arange(cols, device=device, dtype=torch.int64)[None, :]
    keyed = _finalise((row * _GOLDEN + seed) & _MASK)
    return _finalise((keyed ^ (col * 0x85EBCA6B & _MASK)) & _MASK)


def normal(seed: int, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normals in fp32, shape (rows, cols), by Box-Muller on two words a cell."""
    radius = (bits(seed, rows, cols, device).double() + 0.5) / 2**32
    angle = bits(seed ^ 0x5BD1E995, rows, cols, device).double() * (2 * math.pi / 2**32)
    return ((-2 * radius.log()).sqrt() * angle.cos()).float()


def _finalise(x: Tensor) -> Tensor:
    # The 32-bit finaliser of lowbias32, in int64 so that products do not overflow before the mask.
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _finalise_int(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
