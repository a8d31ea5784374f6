"""Cross-head projections (arXiv 2412.19820): the heads of a query or key weight share the basis of one of them.

    A = [A_1; ...; A_h]                               rows of the gradient in blocks, one a head     (h dk, d)
    P = r leading right singular vectors of A_i       i one head, chosen anew at every refresh       (d, r)
    R = A P                                                                                          (h dk, r)

A refresh multiplies with `dk x d` in the place of `h dk x d`. Where r > dk, ceil(r / dk) heads are stacked. A fused
weight is described by ranges of its rows, each with heads and a basis of its own: `Segments`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import random
from ...kernels.project_back import piece
from ...kernels.rounding import Target
from .basis import DENSE, Bases, Basis, State, Step
from .change import Change, Turn
from .layout import ALONE, Layout
from .spec import Spec
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper
    from .projector import Request

Heads = int | tuple[tuple[int, int | None], ...]
"""The heads of a weight, or the (rows, heads) of its ranges; None heads for a range without any."""

HEAD_SELECT = ("random", "first", "cycle", "max_norm")
"""Which heads lend their basis: seeded, the first, the next at every refresh, those of the largest gradient."""


def cross_head(search: Callable[[Request], Bases], request: Request) -> Bases:
    """Find the basis of one head, or of one head in every range of a fused weight.

    Args:
        search: Finds the leading subspace of a block of rows.
        request: The whole weight's.
    """
    if request.layout.rows:
        raise NotImplementedError("projector='cross_head' needs whole heads, got sharded rows: choose 'sketch'")
    if request.hyper is None or request.hyper.num_heads is None:
        raise TypeError("projector='cross_head' got no num_heads")
    if isinstance(heads := request.hyper.num_heads, int):
        return _of_heads(search, request, heads)
    blocks = torch.split(request.matrix, [rows for rows, _ in heads])
    found = []
    for position, (block, (rows, count)) in enumerate(zip(blocks, heads, strict=True)):
        own = replace(
            request,
            matrix=block,
            view=replace(request.view, m=rows),
            seed=random.mix(request.seed, position),
            old=None if request.old is None else request.old[position],
        )
        found.append(_of_heads(search, own, count or 1).basis)
    return Bases(torch.stack(found))


def _of_heads(search: Callable[[Request], Bases], request: Request, heads: int) -> Bases:
    """Search in the chosen heads among those whose gradient is not zero; without any, keep the basis."""
    view, dtype = request.view, request.scale.dtype
    blocks = request.matrix.reshape(heads, -1, view.b)  # (h, dk, d)
    peaks = torch.maximum(blocks.amax((1, 2)), -blocks.amin((1, 2))).to(dtype)
    alive = (peaks >= torch.finfo(dtype).tiny).tolist()
    order = [head for head in _order(request, blocks) if alive[head]]
    chosen = sorted(order[: math.ceil(view.rank / blocks.shape[1])])
    if not chosen:
        old = request.old
        return Bases(DENSE.arbitrary(view, request.seed, blocks.device).basis.to(dtype) if old is None else old)
    if heads == 1:
        return search(replace(request, scale=peaks[0]))
    matrix = blocks[chosen].flatten(0, 1)  # (c dk, d)
    return Bases(
        search(replace(request, matrix=matrix, view=replace(view, m=len(matrix)), scale=peaks[chosen].amax())).basis
    )


def _order(request: Request, blocks: Tensor) -> list[int]:
    """All heads, in the order in which they are taken."""
    heads, how = len(blocks), "first" if request.hyper is None else request.hyper.head_select
    if how == "random":
        return [int(head) for head in random.bits(random.mix(request.seed, 1), range(1), heads)[0].argsort()]
    if how == "max_norm":
        norms = torch.linalg.vector_norm(blocks, dim=(1, 2), dtype=torch.float64)
        return [int(head) for head in norms.argsort(descending=True, stable=True)]
    taken = math.ceil(request.view.rank / blocks.shape[1])
    start = request.done * taken if how == "cycle" else 0
    return [(start + position) % heads for position in range(heads)]


@dataclass(frozen=True)
class Split(Change):
    """A change of basis of its own for every range of rows."""

    turns: tuple[Turn, ...]
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

    Args:
        sizes: Rows of every range.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, ranges: tuple[tuple[int, int | None], ...]) -> Segments:
        """Read them from `num_heads`."""
        return cls(tuple(rows for rows, _ in ranges))

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`s b r` elements in the weight's dtype."""
        return {"basis": Spec((len(self.sizes), view.b, view.rank), param.dtype, param.device)}

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Random orthonormal columns, others for every range."""
        seeds = [random.mix(seed, position) for position in range(len(self.sizes))]
        return Bases(torch.stack([DENSE.arbitrary(view, own, device).basis for own in seeds]))

    def change(self, held: State, new: Bases, layout: Layout = ALONE) -> Change:
        """Overlaps of old and new directions, range by range."""
        pairs = zip(held["basis"], new.basis, strict=True)
        return Split(tuple(DENSE.change({"basis": old}, Bases(found)) for old, found in pairs), self.sizes)

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """`R_j = A_j P_j`."""
        sizes = list(self.sizes)
        for block, basis, low in zip(torch.split(matrix, sizes), held["basis"], torch.split(out, sizes), strict=True):
            DENSE.project(block, {"basis": basis}, gemm, low)

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """`W_j <- decay W_j + alpha (N_j P_j^T + residual)`."""
        first = 0
        for size, basis in zip(self.sizes, held["basis"], strict=True):
            rows, first = slice(first, first + size), first + size
            part = step._replace(move=step.move._replace(residual=piece(step.move.residual, rows, slice(None))))
            DENSE.project_back_(target.part(rows), direction[rows], {"basis": basis}, part)

    def across(self, held: State, rows: Tensor, cols: Tensor) -> Tensor:
        """Rows of P by range and column."""
        ends = torch.tensor(self.sizes, device=rows.device).cumsum(0)
        return held["basis"][torch.searchsorted(ends, rows, right=True), cols]


def frozen(heads: Any) -> Heads | None:
    """The option `num_heads` as a value that can be compared."""
    if isinstance(heads, (list, tuple)):
        return tuple((rows, count) for rows, count in heads)
    return heads  # type: ignore[no-any-return]


def check_heads(group: Mapping[str, Any]) -> None:
    """Validate `num_heads` and `head_select` of a group.

    Raises:
        ValueError: They are out of range, or do not go with the projector or the rule.
    """
    heads, select = group.get("num_heads"), group.get("head_select", "random")
    if select not in HEAD_SELECT:
        raise ValueError(f"Invalid head_select: {select!r}; choose one of {', '.join(map(repr, HEAD_SELECT))}")
    if (group["projector"] == "cross_head") != (heads is not None):
        raise ValueError(
            f"projector={group['projector']!r} with num_heads={heads}: heads share a basis with both, write "
            '{"params": [...], "rank": 128, "projector": "cross_head", "num_heads": 32}; others drop num_heads'
        )
    if heads is None or _is_count(heads):
        return
    if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads or not all(map(_is_range, heads)):
        raise ValueError(
            f"Invalid num_heads: {heads!r}; need an integer of at least 1, or for a fused weight the (rows, heads) of "
            "its ranges, heads dividing rows or None: [(4096, 32), (1024, 8), (1024, None)]"
        )
    if group["rule"] == "adafactor":
        raise ValueError(
            "rule='adafactor' has column statistics, which rows of different bases would share: choose another rule, "
            "or an integer num_heads"
        )


def check_rows(shape: tuple[int, int], heads: Heads, rank: int) -> None:
    """Validate `num_heads` against a weight.

    Raises:
        ValueError: The heads do not divide its rows, or the ranges do not cover them or are not larger than the rank.
    """
    rows = shape[0]
    if isinstance(heads, int):
        if rows % heads:
            raise ValueError(
                f"got a weight of {rows} rows, need a multiple of num_heads={heads}: give every layer a group with its "
                "own count (key layers have fewer in grouped-query attention)"
            )
        return
    sizes = [size for size, _ in heads]
    if sum(sizes) != rows:
        raise ValueError(f"the ranges of num_heads={heads} cover {sum(sizes)} rows, the weight has {rows}")
    if min(sizes) <= rank:
        raise ValueError(f"rank={rank} needs ranges of more rows, num_heads={heads} has one of {min(sizes)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_range(pair: Any) -> bool:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not _is_count(pair[0]):
        return False
    return pair[1] is None or (_is_count(pair[1]) and pair[0] % pair[1] == 0)
