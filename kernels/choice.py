"""Rows, columns and entries of a matrix by number, as fast as the order of its memory allows."""

from __future__ import annotations

import torch
from torch import Tensor


def select(matrix: Tensor, index: Tensor, dim: int) -> Tensor:
    """Copy some rows (dim 0) or columns (dim 1); torch's own choice of columns is the slowest way where rows lie."""
    if matrix.stride(0) < matrix.stride(1):
        return select(matrix.T, index, 1 - dim).T
    if dim == 0:
        return matrix.index_select(0, index)
    return _bits(matrix).gather(1, index.expand(len(matrix), -1)).view(matrix.dtype)


def put_(matrix: Tensor, index: Tensor, dim: int, values: Tensor) -> None:
    """Write rows or columns of `select` back."""
    if matrix.stride(0) < matrix.stride(1):
        put_(matrix.T, index, 1 - dim, values.T)
    elif dim == 0:
        matrix.index_copy_(0, index, values)
    else:
        _bits(matrix).scatter_(1, index.expand(len(matrix), -1), _bits(values))


def put_at_(matrix: Tensor, index: Tensor, values: Tensor) -> None:
    """Write entries (k,) at different flat indices; torch's `put_` has no deterministic form."""
    if matrix.is_contiguous():
        matrix.view(-1).scatter_(0, index, values)
    else:
        matrix[index // matrix.shape[1], index % matrix.shape[1]] = values


def _bits(matrix: Tensor) -> Tensor:
    """The same memory as integers where it is bf16, which torch moves entry by entry at half the speed."""
    return matrix.view(torch.int16) if matrix.dtype == torch.bfloat16 else matrix
