"""A basis for every range of rows of a fused weight, such as query, key and value in one matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import random
from ...kernels.project_back import piece
from ...kernels.rounding import Target
from .basis import DENSE, Bases, Basis, State, Step
from .change import Change
from .layout import ALONE, Layout, share
from .spec import Spec
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper


@dataclass(frozen=True)
class Split(Change):
    """A change of basis of its own for every range of rows."""

    turns: tuple[Change, ...]
    sizes: tuple[int, ...]

    def first(self, moment: Tensor) -> Tensor:
        """Range by range."""
        parts = torch.split(moment, list(self.sizes))
        return torch.cat([turn.first(part) for turn, part in zip(self.turns, parts, strict=True)])

    def second(self, moment: Tensor) -> Tensor:
        """Range by range."""
        parts = torch.split(moment, list(self.sizes))
        return torch.cat([turn.second(part) for turn, part in zip(self.turns, parts, strict=True)])

    def rows(self, row: Tensor) -> Tensor:
        """Rows stay."""
        return row

    def cols(self, col: Tensor) -> Tensor:
        """Column statistics belong to one basis."""
        raise TypeError("column statistics are shared by rows of different bases")

    def overlap(self) -> Tensor:
        """The mean over the ranges."""
        return torch.stack([turn.overlap() for turn in self.turns]).mean()


@dataclass(frozen=True)
class Segments(Basis):
    """A basis for every range of rows of a fused weight, `W = [W_1; ...; W_s]`: P is (s, b, r).

    Where the weight is sharded every rank keeps all of P.

    Args:
        sizes: Rows of every range; where the weight is sharded, those of them in this rank's piece.
        mine: The projected coordinates of this rank's piece; None for all.
    """

    sizes: tuple[int, ...]
    mine: range | None = None

    @classmethod
    def read(cls, ranges: tuple[tuple[int, int | None], ...]) -> Segments:
        """Read them from `num_heads`."""
        return cls(tuple(rows for rows, _ in ranges))

    def of(self, size: int, mine: range | None) -> Segments:
        """Bind it to this rank's projected coordinates."""
        return replace(self, mine=mine)

    def within(self, kept: range) -> Segments:
        """Bind it to this rank's rows."""
        return replace(self, sizes=tuple(_within(self.sizes, kept)))

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`s b r` elements in the weight's dtype."""
        return {"basis": Spec((len(self.sizes), view.b, view.rank), param.dtype, param.device)}

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Random orthonormal columns, different ones for every range."""
        seeds = [random.mix(seed, position) for position in range(len(self.sizes))]
        return Bases(torch.stack([DENSE.arbitrary(view, own, device).basis for own in seeds]))

    def changes(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> list[Change]:
        """Overlaps of old and new directions, range by range."""
        sizes = self.sizes
        if layout.dealt:  # this rank's moments are of other rows than its piece of the weight
            mine = share(sum(sizes), layout.cols[0])
            sizes = tuple(_within(sizes, range(mine.start, mine.stop)))
        return [Split(_turns(state["basis"], bases.basis), sizes) for state, bases in zip(held, new, strict=True)]

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """`R_j = A_j P_j`."""
        for rows, basis in self._parts(held):
            DENSE.project(matrix[rows], {"basis": basis}, gemm, out[rows])

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """`W_j <- decay W_j + alpha (N_j P_j^T + residual)`."""
        for rows, basis in self._parts(held):
            part = step._replace(move=step.move._replace(residual=piece(step.move.residual, rows, slice(None))))
            DENSE.project_back_(target.part(rows), direction[rows], {"basis": basis}, part)

    def across(self, held: State, rows: Tensor, cols: Tensor) -> Tensor:
        """The rows of P (k, r) for the entries (rows, cols) of `R P^T`, from the basis of the range of each row."""
        ends = torch.tensor(self.sizes, device=rows.device).cumsum(0)
        return self._mine(held["basis"])[torch.searchsorted(ends, rows, right=True), cols]

    def _parts(self, held: State) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and the basis of every range that has rows here."""
        first = 0
        for size, basis in zip(self.sizes, self._mine(held["basis"]), strict=True):
            if size:
                yield slice(first, first + size), basis
            first += size

    def _mine(self, bases: Tensor) -> Tensor:
        return bases if self.mine is None else bases[:, self.mine.start : self.mine.stop]


def _turns(old: Tensor, new: Tensor) -> tuple[Change, ...]:
    """The change of every range, of bases (s, b, r)."""
    return tuple(DENSE.changes([{"basis": basis} for basis in old], [Bases(basis) for basis in new]))


def _within(sizes: tuple[int, ...], rows: range) -> Iterator[int]:
    """For consecutive ranges of the given sizes, how many of `rows` are in each."""
    first = 0
    for size in sizes:
        yield max(0, min(rows.stop, first + size) - max(rows.start, first))
        first += size
