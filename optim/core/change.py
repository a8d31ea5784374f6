"""A change of basis as the moments see it: overlaps of directions, or a list of coordinates that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """How coordinates of the subspace follow from the old basis to the new one."""

    def first(self, moment: Tensor) -> Tensor:
        """Carry what is linear in R: (a, r) to (a, r)."""

    def second(self, moment: Tensor) -> Tensor:
        """Carry squares of R, coordinates taken as uncorrelated: (a, r) to (a, r)."""

    def rows(self, row: Tensor) -> Tensor:
        """Carry the row statistics (a,) of a factored second moment."""

    def cols(self, col: Tensor) -> Tensor:
        """Carry the column statistics (r,) of a factored second moment."""

    def overlap(self) -> Tensor:
        """Share of the new subspace that lies in the old one, 0-d, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Orthonormal bases: `C = P_new^T P_old`, and `Q_new^T Q_old` for a matrix that is projected from both sides."""

    right: Tensor
    left: Tensor | None = None

    def first(self, moment: Tensor) -> Tensor:
        """`C_left M C^T`."""
        turned = moment @ self.right.T
        return turned if self.left is None else self.left @ turned

    def second(self, moment: Tensor) -> Tensor:
        """The same with squared coefficients."""
        return self._squared().first(moment)

    def rows(self, row: Tensor) -> Tensor:
        """`(C_left o C_left) row`."""
        return row if self.left is None else self.left.square() @ row

    def cols(self, col: Tensor) -> Tensor:
        """`(C o C) col`."""
        return self.right.square() @ col

    def overlap(self) -> Tensor:
        """`|C|^2 / r`."""
        return self.right.square().sum() / len(self.right)

    def _squared(self) -> Turn:
        return Turn(self.right.square(), None if self.left is None else self.left.square())


@dataclass(frozen=True, slots=True)
class Match:
    """Indices: where each new one stood among the old ones, and whether it did; new ones start from zero."""

    position: Tensor
    stays: Tensor

    @classmethod
    def of(cls, new: Tensor, old: Tensor) -> Match:
        """Match ascending indices."""
        position = torch.searchsorted(old, new).clamp_(max=max(len(old) - 1, 0))
        return cls(position, old[position] == new)

    def first(self, moment: Tensor) -> Tensor:
        """Columns that stay keep their numbers."""
        return moment[..., self.position].mul_(self.stays)

    second = first
    cols = first

    def rows(self, row: Tensor) -> Tensor:
        """Rows are the same."""
        return row

    def overlap(self) -> Tensor:
        """Share of the indices that stay."""
        return self.stays.float().mean()
