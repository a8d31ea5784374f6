"""Random bases by Triton: the numbers of `lowmem.kernels.random`, bit for bit, in one launch and no temporaries.

The hash is 32-bit unsigned arithmetic, which wraps; quantiles and cosines are looked up in tables that were computed
on a CPU; one multiplication in fp32 is left, which every device rounds alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import random
from .random import as_int32
from .triton_common import bits

ON_GPU, ON_CPU = 1024, 1 << 16
"""Elements of a program: the interpreter's cost is by program, whatever its size."""

LARGEST = (1 << 31) - ON_CPU


@triton.jit(do_not_specialize=["seed", "first"])
def rademacher(out, count, cols, first, seed, scale, BLOCK: tl.constexpr):
    """`P_ij = +-scale`, bit `j % 32` of word `j // 32` of row i."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = first + offset // cols, offset % cols
    bit = (bits(row, col // 32, seed) >> (col % 32).to(tl.uint32)) & 1
    tl.store(out + offset, tl.where(bit != 0, scale, -scale), mask=offset < count)


@triton.jit(do_not_specialize=["seed", "first"])
def gaussian(out, table, count, cols, first, seed, scale, BLOCK: tl.constexpr):
    """`P_ij = scale` times the quantile of half a word."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = first + offset // cols, offset % cols
    word = bits(row, col // 2, seed)
    half = tl.where(col % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    tl.store(out + offset, tl.load(table + half) * scale, mask=offset < count)


@triton.jit(do_not_specialize=["seed", "first"])
def orthonormal(out, table, chosen, count, cols, first, seed, size, BLOCK: tl.constexpr):
    """`P_ij = s_i table[(2 i + 1) S_j mod 4 size]`, the last entry of the table where S_j = 0."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    row, column = first + offset // cols, tl.load(chosen + offset % cols, mask=mask, other=0)
    angle = tl.where(column == 0, 4 * size, (2 * row.to(tl.int64) + 1) * column % (4 * size))
    value = tl.load(table + angle, mask=mask, other=0.0)
    bit = bits(row, row * 0, seed) & 1
    tl.store(out + offset, tl.where(bit != 0, value, -value), mask=mask)


def basis(out: Tensor, kind: str, seed: int, first: int, size: int) -> None:
    """Compute `lowmem.kernels.random.basis`.

    Raises:
        ValueError: The basis has more elements than 32 bits can count.
    """
    count, rank, device = out.numel(), out.shape[1], out.device
    if count > LARGEST or size > LARGEST:
        raise ValueError(f"got {len(out)} rows of a {size} x {rank} basis, need at most {LARGEST} elements and rows")
    if count == 0:
        return
    block = ON_GPU if out.is_cuda else ON_CPU
    grid = (triton.cdiv(count, block),)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    word, scale = as_int32(seed), rank**-0.5
    if kind == "rademacher":
        rademacher[grid](target, count, rank, first, word, scale, BLOCK=block, enable_fp_fusion=True)
    elif kind == "gaussian":
        table = random.quantiles(str(device))
        gaussian[grid](target, table, count, rank, first, word, scale, BLOCK=block, enable_fp_fusion=True)
    else:
        table, chosen = random.angles(size, rank, str(device)), random.subset(seed, size, rank).to(device)
        flips = as_int32(random.mix(seed, 1))
        orthonormal[grid](target, table, chosen, count, rank, first, flips, size, BLOCK=block, enable_fp_fusion=True)
    if target is not out:
        out.copy_(target)
