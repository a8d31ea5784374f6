"""Sketches by Triton: `R = A P` with a rademacher basis that is made inside of the product and never stored.

A hash gives 32 signs, those of adjacent columns, and rows of `lowmem.kernels.random.basis` are what it would give. The
signs are exact in every dtype, and their scale `1 / sqrt(r)` multiplies the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .random import as_int32
from .triton_common import bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FEW = 256
"""So many large tiles fill a GPU."""


class Tile(NamedTuple):
    """Rows and columns of a program's piece of the sketch, depth of its step through the product, launch options."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def tile(m: int, rank: int, dtype: torch.dtype, precision: str = "ieee") -> Tile:
    """How a sketch (m, r) of a matrix of some dtype is cut, so that no register is spilled on the GPUs of the tests."""
    if dtype == torch.float32 and precision == "ieee":
        return Tile(64, 64, 16, 8, 3)
    depth = 32 if dtype == torch.float32 else 64
    if triton.cdiv(m, 128) * triton.cdiv(rank, 128) < FEW:
        return Tile(64, 64, depth, 4, 3)
    return Tile(128, 128, depth, 8, 3)


@triton.jit(do_not_specialize=["first", "seed"])
def sketch_signs(
    matrix, out, m, inner, rank, first, seed, scale, matrix_row, matrix_inner, out_row, out_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of `scale A S`, S_kj = +-1 by bit `j % 32` of word `j // 32` of row `first + k`."""
    across = tl.cdiv(rank, COLS)
    down, start = tl.program_id(0) // across, tl.program_id(0) % across * COLS
    row, k = down * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    word = start // 32 + tl.arange(0, COLS // 32)
    a = matrix + row.to(tl.int64)[:, None] * matrix_row + k.to(tl.int64)[None, :] * matrix_inner
    far = tl.full((), DEPTH, tl.int64) * matrix_inner
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for done in range(0, inner, DEPTH):
        x = tl.load(a, mask=(row < m)[:, None] & (k < inner - done)[None, :], other=0.0)
        if WIDEN:  # exact; the interpreter cannot multiply bf16
            x = x.to(tl.float32)
        words = bits((first + done + k)[:, None], word[None, :], seed)
        bit = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
        signs = tl.reshape(tl.where(bit != 0, 1.0, -1.0).to(x.dtype), (DEPTH, COLS))
        total = tl.dot(x, signs, total, input_precision=PRECISION)
        a += far
    col = start + tl.arange(0, COLS)
    at = out + row.to(tl.int64)[:, None] * out_row + col.to(tl.int64)[None, :] * out_col
    tl.store(at, total * scale, mask=(row < m)[:, None] & (col < rank)[None, :])


def sketch(out: Tensor, matrix: Tensor, seed: int, first: int = 0) -> None:
    """Write `R = A P`, P some rows of a rademacher basis of `lowmem.kernels.random.basis`.

    Args:
        out: R (m, r), fp32, of any strides; written.
        matrix: A (m, k) in fp32, bf16 or fp16, of any strides; products of fp32 are in TF32 where
            `torch.set_float32_matmul_precision` allows it.
        seed: 32 bits.
        first: Row of the basis that belongs to the first column of A.

    Raises:
        ValueError: The dtypes or shapes are others.
    """
    (m, inner), rank = matrix.shape, out.shape[1]
    if out.dtype != torch.float32 or matrix.dtype not in DTYPES or len(out) != m:
        raise ValueError(
            f"got {matrix.dtype} {tuple(matrix.shape)} into {out.dtype} {tuple(out.shape)}: need fp32, bf16 or fp16 "
            "into as many rows of fp32, pass backend='torch'"
        )
    if out.numel() == 0:
        return
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    how = tile(m, rank, matrix.dtype, precision)
    sketch_signs[(triton.cdiv(m, how.rows) * triton.cdiv(rank, how.cols),)](
        matrix, out, m, inner, rank, first, as_int32(seed), rank**-0.5, *matrix.stride(), *out.stride(),
        ROWS=how.rows, COLS=how.cols, DEPTH=how.depth, WIDEN=not matrix.is_cuda, PRECISION=precision,
        num_warps=how.warps, num_stages=how.stages, enable_fp_fusion=True,
    )  # fmt: skip
