"""Canonical orientation: every weight is seen as a matrix A whose columns are projected, R = A P."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

SIDES = ("std", "reverse_std", "left", "right", "full")
"""Values of the option `proj_type`."""


@dataclass(frozen=True, slots=True)
class MatrixView:
    """How a weight W (m x n) is oriented and projected.

    `A = W` (a = m, b = n) for a right projection, `A = W^T` (a = n, b = m) for a left one, so that the low-rank
    matrix is always `R = A P` with the basis `P` (b x r). A full projection adds a left basis `Q` (a x r) and
    `R = Q^T A P` is r x r. A flat one sees the weight as a single row: a = 1, b = m n.

    Args:
        m: Rows of the weight matrix, its first dimension.
        n: Columns, the product of the other dimensions.
        rank: Rank r of the subspace.
        transposed: Project from the left, `A = W^T`.
        full: Project from both sides.
    """

    m: int
    n: int
    rank: int
    transposed: bool
    full: bool

    @classmethod
    def of(cls, shape: Sequence[int], rank: int, proj_type: str) -> MatrixView:
        """Orient a weight of the given shape; `std` projects the smaller side, right where they are equal.

        A flat view takes `rank max(m, n)` entries: as many as R has in a standard projection of that rank.
        """
        m, n = matrix_shape(shape)
        if proj_type == "flat":
            return cls(1, m * n, min(rank * max(m, n), m * n), False, False)
        left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False, "full": False}[proj_type]
        return cls(m, n, min(rank, m, n), left, proj_type == "full")

    @property
    def a(self) -> int:
        """Length of the side that is kept."""
        return self.n if self.transposed else self.m

    @property
    def b(self) -> int:
        """Length of the side that is projected."""
        return self.m if self.transposed else self.n

    @property
    def low_shape(self) -> tuple[int, int]:
        """Shape of the low-rank matrix R."""
        return (self.rank if self.full else self.a, self.rank)

    @property
    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the bases by the name of their state."""
        shapes = {"basis": (self.b, self.rank)}
        if self.full:
            shapes["basis_left"] = (self.a, self.rank)
        return shapes

    @property
    def side(self) -> str:
        """Name of the projected side."""
        return "full" if self.full else "left" if self.transposed else "right"

    def orient(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as A (a x b): a view wherever the strides allow it."""
        matrix = tensor.reshape(self.m, self.n)
        return matrix.T if self.transposed else matrix


def rank_of(shape: tuple[int, int], rank: int | None, density: float | None) -> int | None:
    """Rank of a matrix of this shape: `rank`, or `density` as a share of the smaller side; None is plain."""
    return rank if density is None else max(1, round(density * min(shape)))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (first dimension, product of the rest) of a weight of at least two dimensions."""
    rest = 1
    for size in shape[1:]:
        rest *= size
    return shape[0], rest
