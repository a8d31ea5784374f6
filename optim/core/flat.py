"""Single entries of a weight as the subspace: the weight is one row, in which r of its entries are chosen.

    R (1, r) = the chosen entries of A (1, m n)

Where the weight is sharded over W ranks, its pieces are pieces of that row. The chosen entries may all be in one piece,
so R and the indices are dealt out evenly, r / W to a rank: a step gathers the indices, deals out R and gathers N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.rounding import Target
from . import entries
from .basis import Bases, State, Step
from .change import Change, Match
from .coordinates import INDEX, Index
from .layout import ALONE, Layout
from .sharding import moved, shard_dim
from .spec import Axis, Spec
from .view import MatrixView

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

    from .hyper import Hyper


@dataclass(frozen=True, slots=True)
class Flat(Layout):
    """Layout of a weight that is seen as one row; its columns are sharded over whatever shards the weight.

    Args:
        count: r.
    """

    count: int = 0

    @classmethod
    def seeing(cls, layout: Layout, view: MatrixView) -> Layout:
        """Turn a weight's layout into that of its one row; a plain tensor, or a view of more rows, keeps its own."""
        if layout.sharding is None or layout.box is None or (view.m, view.n) == layout.shape:
            return layout
        return cls(cols=layout.sharding.everywhere, box=layout.box, sharding=layout.sharding, count=view.rank)

    @property
    def dealt(self) -> bool:
        """R is dealt out by entries, wherever the weight is cut."""
        return not self.alone

    def place(self, axis: Axis) -> tuple[Placement, ...]:
        """As of any layout; moments (1, r) have their entries in columns."""
        places = Layout.place(self, "entries" if axis == "kept" else axis)
        if axis != "kept":
            return places
        return tuple(placement if shard_dim(placement) is None else moved(placement, 1) for placement in places)

    def local(self, view: MatrixView) -> MatrixView:
        """This rank's piece as one row."""
        return view if self.box is None else replace(view, m=1, n=self.box.m * self.box.n)

    def projected(self, view: MatrixView) -> range:
        """Coordinates within the piece: its cells are no contiguous range of the whole row."""
        return range(view.b)

    def kept(self, view: MatrixView) -> range:
        """The one row."""
        return range(1)

    def reduce(self, low: Tensor) -> Tensor:
        """Sum R (k, 1, r), and keep this rank's share of its entries."""
        return torch.stack(entries.deal(low[:, 0].unbind(), self))[:, None]

    def gather(self, low: Tensor, rows: int) -> Tensor:
        """All of R."""
        return torch.stack(entries.collect(low[:, 0].unbind(), self.count, self))[:, None]

    def low_start(self, view: MatrixView) -> int:
        """The first entry of R that this rank keeps."""
        mine: range = range(self.count)[entries.share(self.count, self)]
        return mine.start


@dataclass(frozen=True)
class Single(Index):
    """A choice of r entries by their flat indices; `spread.whole_bases` gathers all of them for the time of a step.

    Args:
        layout: Layout of the weight.
    """

    layout: Layout = ALONE

    def within(self, layout: Layout) -> Single:
        """Bind it to the layout of a weight, for its pieces."""
        return Single(layout)

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`r` integers of 4 bytes."""
        return {name: spec._replace(axis="entries") for name, spec in super().specs(param, view, hyper).items()}

    def changes(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> list[Change]:
        """Which entries stay."""
        matches = [Match.of(bases.basis, state["basis"]) for state, bases in zip(held, new, strict=True)]
        return [match if layout.alone else Shared(match, layout) for match in matches]

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """Take the entries; those of other pieces are zero here, and filled in by `Layout.reduce`."""
        place = self._place(held)
        if place.here is None:
            INDEX.project(matrix, held, gemm, out)
        else:
            out.zero_()
            out[:, place.here] = matrix.index_select(1, place.flat).to(out.dtype)

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """Put entries back; a signed residual is zero in them."""
        place = self._place(held)
        here = direction if place.here is None else direction[:, place.here]
        INDEX.project_back_(target, here, {"basis": place.flat}, step._replace(mine=None))

    def _place(self, held: State) -> entries.Place:
        return entries.locate(held["basis"], self.layout.shape[1], self.layout)


@dataclass(frozen=True, slots=True)
class Shared:
    """A `Match` for moments of which every rank keeps a share: they are gathered, matched and cut again."""

    match: Match
    layout: Layout

    def first(self, moment: Tensor) -> Tensor:
        """Entries that stay keep their numbers."""
        count = len(self.match.position)
        (whole,) = entries.collect([moment.reshape(-1)], count, self.layout)
        kept: Tensor = self.match.first(whole)[entries.share(count, self.layout)]
        return kept.view(moment.shape)

    second = first
    cols = first

    def rows(self, row: Tensor) -> Tensor:
        """The one row."""
        return row

    def overlap(self) -> Tensor:
        """Share of the entries that stay."""
        return self.match.overlap()


SINGLE = Single()
