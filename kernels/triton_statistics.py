"""Statistics of a matrix by Triton: both means of squares in one pass over it.

Sums of tiles are stored and then added in a fixed order: the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, TILE_ON_CPU = (64, 128), (256, 256)
"""Rows and columns of a program's piece of the matrix: the interpreter's cost is by program, whatever its size."""

LINES, PARTS = 128, 16
"""Sums that a program finishes, and partial ones that it adds at a time."""


@triton.jit
def tile_sums(matrix, by_row, by_col, m, n, matrix_row, matrix_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums of squares of the rows and columns of a tile, into (tiles across, m) and (tiles down, n)."""
    wide = tl.cdiv(n, COLS)
    down, across = tl.program_id(0) // wide, tl.program_id(0) % wide
    row, col = down * ROWS + tl.arange(0, ROWS), across * COLS + tl.arange(0, COLS)
    row_mask, col_mask = row < m, col < n
    at = matrix + row.to(tl.int64)[:, None] * matrix_row + col.to(tl.int64)[None, :] * matrix_col
    value = tl.load(at, mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(tl.float32)
    square = value * value
    tl.store(by_row + across.to(tl.int64) * m + row, tl.sum(square, axis=1), mask=row_mask)
    tl.store(by_col + down.to(tl.int64) * n + col, tl.sum(square, axis=0), mask=col_mask)


@triton.jit
def finish(parts, out, count, length, divisor, LINES: tl.constexpr, PARTS: tl.constexpr):
    """Sum `count` rows of `parts` (count, length) and divide."""
    line, part = tl.program_id(0) * LINES + tl.arange(0, LINES), tl.arange(0, PARTS)
    mask = line < length
    total = tl.zeros((PARTS, LINES), dtype=tl.float32)
    for first in range(0, count, PARTS):
        alive = (first + part < count)[:, None] & mask[None, :]
        at = parts + (first + part).to(tl.int64)[:, None] * length + line[None, :]
        total += tl.load(at, mask=alive, other=0.0)
    tl.store(out + line, tl.sum(total, axis=0) / divisor, mask=mask)


def square_means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `lowmem.kernels.reference.square_means`: one pass over the matrix, and two over its tiles' sums."""
    if matrix.numel() == 0:
        m, n = matrix.shape
        return matrix.new_zeros(m, dtype=torch.float32), matrix.new_zeros(n, dtype=torch.float32)
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:
        col, row = square_means(matrix.T)
        return row, col
    m, n = matrix.shape
    rows, cols = TILE if matrix.is_cuda else TILE_ON_CPU
    down, across = triton.cdiv(m, rows), triton.cdiv(n, cols)
    by_row, by_col = (matrix.new_empty(shape, dtype=torch.float32) for shape in ((across, m), (down, n)))
    tile_sums[(down * across,)](
        matrix, by_row, by_col, m, n, *matrix.stride(), ROWS=rows, COLS=cols, enable_fp_fusion=True
    )
    return _finished(by_row, n), _finished(by_col, m)


def _finished(parts: Tensor, divisor: int) -> Tensor:
    count, length = parts.shape
    out = parts.new_empty(length)
    finish[(triton.cdiv(length, LINES),)](
        parts, out, count, length, float(divisor), LINES=LINES, PARTS=PARTS, enable_fp_fusion=True
    )
    return out
