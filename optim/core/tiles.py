"""What a subspace leaves of a gradient, made piece by piece: nothing of the size of a weight is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Elements of a tile on a CPU, so that its working copies stay in the cache."""
GPU_CHUNK = 1 << 24
"""The same on a GPU, where fewer launches count for more."""
NOISE = 2, 256
"""Roundings of products and of bases, of an average entry of a row, up to which E = A - R P^T is taken for zero."""


class Factors(NamedTuple):
    """A dense basis and the projection of one matrix, `R P^T`."""

    low: Tensor
    """R, for a full projection Q R (a, r)."""
    basis: Tensor
    """P (b, r), in the dtype of the products."""
    floor: Tensor
    """Rounding error of the rows of A - R P^T (a, 1)."""

    @classmethod
    def of(cls, matrix: Tensor, low: Tensor, basis: Tensor) -> Factors:
        """Measure the rows of A (a, b); a sign of rounding errors would count as much as any other."""
        roundings = sum(n * torch.finfo(dtype).eps for n, dtype in zip(NOISE, (basis.dtype, low.dtype), strict=True))
        rows = torch.linalg.vector_norm(matrix, dim=1, keepdim=True, dtype=low.dtype)
        return cls(low, basis, rows * (roundings / matrix.shape[1] ** 0.5))


@dataclass(frozen=True, slots=True)
class Residual:
    """The free rule on one matrix, `F = free(A - R P^T)`, made tile by tile.

    Args:
        matrix: A (a, b).
        sound: Whether it is finite, 0-d; it counts as zero if not.
        rule: The free rule.
        maximize: Take -A for A.
        dtype: The working dtype.
        factors: R and P; None where E is A itself.
    """

    matrix: Tensor
    sound: Tensor
    rule: str
    maximize: bool
    dtype: torch.dtype
    factors: Factors | None = None

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """Make a tile of F, a tensor of its own."""
        tile = torch.where(self.sound, self.matrix[rows, cols].to(self.dtype), 0.0)
        if self.maximize:
            tile.neg_()
        if self.rule == "sgd":
            return tile
        if self.factors is None:
            return tile.sign_()
        low, basis, floor = self.factors
        tile -= product(low[rows], basis[cols].T, basis.dtype)
        noise = tile.abs() <= floor[rows]
        return tile.sign_().masked_fill_(noise, 0.0)


def tiles(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into blocks of rows, or pieces of one row, of a bounded number of elements."""
    limit = CHUNK if matrix.device.type == "cpu" else GPU_CHUNK
    a, b = matrix.shape
    height, width = max(1, limit // b), min(b, limit)
    for row in range(0, a, height):
        for col in range(0, b, width):
            yield slice(row, row + height), slice(col, col + width)


def row_blocks(matrix: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Cut a matrix into blocks of whole rows of bounded size, into one where it has this dtype already."""
    a, b = matrix.shape
    limit = CHUNK if matrix.device.type == "cpu" else GPU_CHUNK
    height = max(1, a if matrix.dtype == dtype else limit // max(b, 1))
    for row in range(0, a, height):
        yield slice(row, row + height)


def product(one: Tensor, other: Tensor, gemm: torch.dtype) -> Tensor:
    """A product in the dtype `gemm`, in the dtype of the first factor."""
    return (one.to(gemm) @ other.to(gemm)).to(one.dtype)
