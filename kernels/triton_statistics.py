"""Statistics of a matrix by Triton: means of squares of its rows and of its columns, with one reading of it.

Every tile writes the sums of its rows and of its columns, and a second launch adds them up in a fixed order: the result
is the same in every run, which sums by atomic additions are not. The sums in between take 4 (1/64 + 1/256) bytes an
entry of the matrix, and mostly stay in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ON_GPU, ON_CPU = (64, 256), (256, 1024)
"""Rows and columns of a tile: the interpreter's cost is by program, whatever its size."""

LINES, PARTS = 64, 16
"""Means of a program of the second launch, and sums that it adds at once."""


@triton.jit
def tile_sums(
    matrix, row_sums, col_sums, m, n, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Sums of squares of the rows of a tile into `(tiles across, m)`, of its columns into `(tiles down, n)`."""
    wide = tl.cdiv(n, COLS)
    down, across = tl.program_id(0) // wide, tl.program_id(0) % wide
    row, col = down * ROWS + tl.arange(0, ROWS), across * COLS + tl.arange(0, COLS)
    mask = (row < m)[:, None] & (col < n)[None, :]
    place = row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride
    value = tl.load(matrix + place, mask=mask, other=0.0).to(tl.float32)
    square = value * value
    tl.store(row_sums + across.to(tl.int64) * m + row, tl.sum(square, axis=1), mask=row < m)
    tl.store(col_sums + down.to(tl.int64) * n + col, tl.sum(square, axis=0), mask=col < n)


@triton.jit(do_not_specialize=["m", "n", "wide", "tall"])
def means(row_sums, col_sums, out, m, n, wide, tall, LINES: tl.constexpr, PARTS: tl.constexpr):
    """Means (m + n,) out of the sums of `tile_sums`; `wide` tiles lie across and `tall` tiles down the matrix."""
    of_rows = tl.cdiv(m, LINES)
    program = tl.program_id(0)
    if program < of_rows:
        sums, length, parts, entries, target = row_sums, m, wide, n, out
    else:
        sums, length, parts, entries, target = col_sums, n, tall, m, out + m
        program -= of_rows
    line, part = program * LINES + tl.arange(0, LINES), tl.arange(0, PARTS)[:, None]
    total = tl.zeros((PARTS, LINES), dtype=tl.float32)
    for above in range(0, parts, PARTS):
        place = (above + part).to(tl.int64) * length + line[None, :]
        total += tl.load(sums + place, mask=(line < length)[None, :] & (above + part < parts), other=0.0)
    tl.store(target + line, tl.sum(total, axis=0) / entries, mask=line < length)


def square_means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `lowmem.kernels.reference.square_means` of a matrix (m, n) of any strides: means (m,) and (n,), fp32."""
    (m, n), device = matrix.shape, matrix.device
    if matrix.numel() == 0:
        return torch.zeros(m, device=device), torch.zeros(n, device=device)
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:  # adjacent entries to adjacent threads
        cols, rows = square_means(matrix.T)
        return rows, cols
    height, width = ON_GPU if matrix.is_cuda else ON_CPU
    tall, wide = triton.cdiv(m, height), triton.cdiv(n, width)
    sums = torch.empty(wide * m, device=device), torch.empty(tall * n, device=device)
    tile_sums[(tall * wide,)](matrix, *sums, m, n, *matrix.stride(), ROWS=height, COLS=width, num_warps=8)
    out = torch.empty(m + n, device=device)
    grid = (triton.cdiv(m, LINES) + triton.cdiv(n, LINES),)
    means[grid](*sums, out, m, n, wide, tall, LINES=LINES, PARTS=PARTS)
    return out[:m], out[m:]
