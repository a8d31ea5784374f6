"""Sums of squares over rows and columns by torch's operations.

Torch's norm over columns strides through memory; a tile that stays in the cache gives both sums at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import row_blocks, tiles


def square_means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `lowmem.kernels.reference.square_means` without the squares, of a batch of matrices and in fp64 too."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    m, n = matrix.shape[-2:]
    row, col = (torch.zeros(*matrix.shape[:-2], size, dtype=dtype, device=matrix.device) for size in (m, n))
    flat = zip(matrix.reshape(-1, m, n), row.view(-1, m), col.view(-1, n), strict=True) if matrix.numel() else ()
    for one, rows, cols in flat:
        if _by_columns(one):
            _add_squares(one.T, cols, rows)
        else:
            _add_squares(one, rows, cols)
    return row.div_(max(n, 1)), col.div_(max(m, 1))


def row_squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norms of the rows (a,) of a matrix (a, b) in any memory order, without its squares."""
    total = torch.zeros(len(matrix), dtype=dtype, device=matrix.device)
    if not _by_columns(matrix):
        for part in row_blocks(matrix, dtype):
            torch.linalg.vector_norm(matrix[part], dim=1, dtype=dtype, out=total[part])
        return total.square_()
    for rows, cols in tiles(matrix.T):
        total[cols] += matrix.T[rows, cols].to(dtype).square().sum(0)
    return total


def _add_squares(matrix: Tensor, rows: Tensor, cols: Tensor) -> None:
    """Add the sums of a matrix whose rows lie in memory."""
    for part in row_blocks(matrix):
        wide = matrix[part].to(rows.dtype)
        squares = wide.square() if wide.dtype == matrix.dtype else wide.square_()  # of a copy in its place
        rows[part] += squares.sum(1)
        cols += squares.sum(0)


def _by_columns(matrix: Tensor) -> bool:
    return matrix.stride(-1) != 1 and matrix.stride(-2) == 1
