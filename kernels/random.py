"""Counter-based random numbers: a pure function of (seed, row, column).

Any shard, device, dtype, resumed run or process regenerates the same numbers without storing or sending the state of a
generator: integer hashes are looked up in tables that are computed once on a CPU, so that devices cannot round apart.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import overload

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_SPREAD = 0x85EBCA6B
_BLOCK, _GPU_BLOCK = 1 << 14, 1 << 22
_LINE = 1 << 12

Device = torch.device | str

BASES = ("rademacher", "gaussian", "orthonormal")
"""Kinds of random bases that `basis` makes."""


Seed = int | Tensor
"""A seed of 32 bits: a number, or a 0-d int64 tensor where it follows from a step count that stays on the device."""


@overload
def mix(*values: int) -> int: ...


@overload
def mix(*values: Seed) -> Seed: ...


def mix(*values: Seed) -> Seed:
    """Hash integers into one 32-bit seed (FNV-like fold of a finaliser); tensors among them stay on their device."""
    state: Seed = 0x811C9DC5
    for value in values:
        whole = value.long() if isinstance(value, Tensor) else value
        state = _finalise_int((state ^ (whole & _MASK)) * 0x01000193 & _MASK)
    return state


def bits(seed: int, rows: range, cols: int, device: Device = "cpu") -> Tensor:
    """Return 32 random bits for every cell of some rows, int64 in [0, 2^32), shape (len(rows), cols)."""
    row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)[:, None]
    col = torch.arange(cols, device=device, dtype=torch.int64)[None, :]
    keyed = _finalise((row * _GOLDEN + seed) & _MASK)
    return _finalise((keyed ^ (col * _SPREAD & _MASK)) & _MASK)


def noise(seed: Seed, rows: range, cols: range, device: Device = "cpu") -> Tensor:
    """Return 16 random bits for some cells, int16 in [-2^15, 2^15), shape (len(rows), len(cols)).

    They are the halves of the words of `bits`, two columns to a word, computed in 32-bit arithmetic that wraps: faster,
    as rounding needs them in every step.
    """
    keyed = row_keys(seed, rows, device)
    col = torch.arange(cols.start // 2, (cols.stop + 1) // 2, device=device, dtype=torch.int32)[None, :]
    return _finalise32_(keyed ^ (col * as_int32(_SPREAD))).view(torch.int16)[:, cols.start % 2 :][:, : len(cols)]


def row_keys(seed: Seed, rows: range, device: Device = "cpu") -> Tensor:
    """The part of `noise` that all columns of a row share, int32 (len(rows), 1)."""
    row = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int32)[:, None]
    return _finalise32_((row * as_int32(_GOLDEN)).add_(_word(seed)))


def half_words(key: Tensor, col: Tensor) -> Tensor:
    """`noise` for given row keys and columns, int32: computed cell by cell, as a compiler fuses best."""
    word = _finalise32_(key ^ ((col >> 1) * as_int32(_SPREAD)))
    return ((word >> ((col & 1) << 4)) << 16) >> 16


def noise_at(seed: Seed, row: Tensor, col: Tensor) -> Tensor:
    """`noise` for single cells, given by int64 rows and columns whose shapes broadcast."""
    keyed = _finalise((row * _GOLDEN + seed) & _MASK)
    word = _finalise((keyed ^ ((col >> 1) * _SPREAD & _MASK)) & _MASK)
    return ((word >> ((col & 1) << 4)) & 0xFFFF).to(torch.int32).to(torch.int16)


def normal(seed: int, rows: int | range, cols: int, device: Device = "cpu") -> Tensor:
    """Return standard normals in fp32, shape (rows, cols): quantiles looked up by 16 bits, two columns a word.

    The table has mean 0 and variance 1 exactly, and ends at 4.17 standard deviations.
    """
    rows, table = _range(rows), quantiles(str(device))
    out = torch.empty((len(rows), cols), dtype=torch.float32, device=device)
    for part, target in _blocks(rows, out):
        words = bits(seed, part, (cols + 1) // 2, device)
        pairs = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)  # (rows, cols or cols + 1)
        torch.index_select(table, 0, pairs[:, :cols].flatten(), out=target.view(-1))
    return out


def signs(seed: int, rows: int | range, cols: int, device: Device = "cpu") -> Tensor:
    """Return -1 or 1 with equal probability in fp32, shape (rows, cols), 32 columns a word."""
    rows, table = _range(rows), _byte_signs(str(device))
    out = torch.empty((len(rows), cols), dtype=torch.float32, device=device)
    for part, target in _blocks(rows, out, 8):
        octets = bits(seed, part, (cols + 31) // 32, device).to(torch.int32).view(torch.uint8)  # lowest bits first
        target.copy_(table.index_select(0, octets.flatten().int()).view(len(part), -1)[:, :cols])
    return out


def subset(seed: int, size: int, count: int, device: Device = "cpu") -> Tensor:
    """Return `count` distinct integers below `size`, ascending int64: those with the smallest random words.

    Only candidates below a threshold are kept, so that temporary memory is of the order of `count`.
    """
    if not 0 <= count <= size:
        raise ValueError(f"got count={count}, need 0 <= count <= size={size}")
    expected = count + 8 * math.sqrt(count) + 64
    found = _below(seed, size, min(1 << 32, math.ceil(expected / size * 2**32)) if size else 0, device)
    if len(found) < count:  # eight standard deviations away
        found = _below(seed, size, 1 << 32, device)
    # One integer orders by word, then by position: 32 and 31 bits.
    return found.sort().values[:count].bitwise_and((1 << 31) - 1).sort().values


def basis(out: Tensor, kind: str, seed: int, first: int, size: int) -> None:
    """Write rows of a random basis P (size x r) with `E[P P^T] = I`, a function of (kind, seed, row, column).

        rademacher    P_ij = +-1 / sqrt(r)
        gaussian      P_ij ~ N(0, 1 / r)
        orthonormal   P_ij = s_i sqrt(size / r) D_{i, S_j}: signs s, D the cosine matrix, S a random subset

    Args:
        out: Rows `first, first + 1, ...` of P, fp32; written.
        kind: One of `BASES`.
        seed: 32 bits.
        first: The first row that is wanted.
        size: Rows of the whole basis.
    """
    rows, rank, device = range(first, first + len(out)), out.shape[1], out.device
    if kind == "orthonormal":
        index = torch.arange(rows.start, rows.stop, device=device)[:, None] * 2 + 1  # (rows, 1)
        chosen = subset(seed, size, rank).to(device)
        angle = torch.where(chosen == 0, 4 * size, index * chosen % (4 * size))
        torch.mul(angles(size, rank, str(device))[angle], signs(mix(seed, 1), rows, 1, device), out=out)
    else:
        make = signs if kind == "rademacher" else normal
        torch.mul(make(seed, rows, rank, device), rank**-0.5, out=out)


@lru_cache(maxsize=32)
def angles(size: int, rank: int, device: str) -> Tensor:
    """Entries of `sqrt(size / rank) D` by angle, (4 size + 1,) fp32: `sqrt(2 / rank) cos(pi k / (2 size))`.

    The last one is that of the constant column.
    """
    angle = torch.arange(4 * size, dtype=torch.float64, device="cpu") * (math.pi / (2 * size))
    table = torch.cos(angle) * math.sqrt(2 / rank)
    return torch.cat([table, table.new_tensor([rank**-0.5])]).float().to(device)


def cosines(size: int, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
    """Return the orthonormal cosine matrix D (size x size), `D_ik = c_k cos(pi (2i + 1) k / (2 size))`, cached."""
    return _cosines(size, dtype, str(device))


@lru_cache(maxsize=8)
def _cosines(size: int, dtype: torch.dtype, device: str) -> Tensor:
    table = torch.cos(torch.arange(4 * size, dtype=torch.float64, device="cpu") * (math.pi / (2 * size)))
    col = torch.arange(size, device="cpu")
    matrix = table[(2 * col[:, None] + 1) * col % (4 * size)].mul_(math.sqrt(2 / size))
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
def quantiles(device: str = "cpu") -> Tensor:
    """Return the 2^16 equally likely values of `normal`, ascending fp32."""
    middle = (torch.arange(1 << 16, dtype=torch.float64, device="cpu") + 0.5) / (1 << 16)
    table: Tensor = torch.special.ndtri(middle)
    table = (table - table.flip(0)) / 2  # exactly odd
    return (table / table.square().mean().sqrt()).float().to(device)


@lru_cache(maxsize=8)
def _byte_signs(device: str) -> Tensor:
    """The eight signs of every byte, (256, 8)."""
    octets = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")
    return ((octets & 1) * 2 - 1).float().to(device)


def _range(rows: int | range) -> range:
    return range(rows) if isinstance(rows, int) else rows


def _blocks(rows: range, out: Tensor, times: int = 1) -> list[tuple[range, Tensor]]:
    """Cut into blocks of rows, which bounds temporary memory: integers take several times that of their result."""
    elements = _BLOCK if out.device.type == "cpu" else _GPU_BLOCK  # a GPU counts launches, a CPU has caches
    size = max(1, times * elements // max(out.shape[1], 1))
    firsts = range(0, len(rows), size)
    return [(rows[first : first + size], out[first : first + size]) for first in firsts]


def _below(seed: int, size: int, limit: int, device: Device) -> Tensor:
    """Positions below `size` whose random word is less than `limit`, as `word << 31 | position`, int64."""
    found = []
    lines, last = 256, -(-size // _LINE)
    for first in range(0, last, lines):
        words = bits(seed, range(first, min(first + lines, last)), _LINE, device).view(-1)
        words = words[: size - first * _LINE]
        position = (words < limit).nonzero()[:, 0]
        found.append((words[position] << 31) | (position + first * _LINE))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)


def _finalise(x: Tensor) -> Tensor:
    # The 32-bit finaliser of lowbias32, in int64 so that products do not overflow before the mask.
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _finalise32_(x: Tensor) -> Tensor:
    # The same on int32 words; their shifts copy the sign, which a mask takes off.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= as_int32(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _word(seed: Seed) -> Seed:
    return seed.to(torch.int32) if isinstance(seed, Tensor) else as_int32(seed)


def as_int32(word: int) -> int:
    """The int32 of the same 32 bits; Triton then gives every seed one type, i32, and compiles a kernel once."""
    word &= _MASK
    return word - (1 << 32) if word >= 1 << 31 else word


def _finalise_int(x: Seed) -> Seed:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
