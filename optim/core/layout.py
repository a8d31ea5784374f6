"""Which ranks share the rows and columns of a matrix, and the sums that turn local products into global ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding import Box, Sharding, is_dtensor, shard_dim
from .spec import Axis
from .stack import Stacked
from .view import MatrixView, matrix_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor.placement_types import Placement

if dist.is_available():
    _reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    _all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # their names since torch 2.13

MANY = 8
"""Ranks above which bases are spread unless the group says otherwise: replicated they outweigh the moments."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Process groups that shard the oriented matrix A (a x b); all empty on a single device.

    Every optimizer is written with a few sums, so that sharding is a property of the layout:

        project   R_i = sum_cols A_ij P_j         reduced, and dealt out by rows where only b is sharded
        adjoint   Z_j = sum_rows A_ij^T Y_i
        restore   U_ij = N_i P_j^T                N gathered where R was dealt out

    Args:
        rows: Groups over which the kept side a is sharded.
        cols: Groups over which the projected side b is sharded.
        box: This rank's piece of the weight; None for a plain tensor.
        sharding: Placements of the parameter; None for a plain tensor.
        transposed: It is projected from the left, A = W^T.
        replicas: Group of processes that hold the same plain tensors, and share the search for bases.
        spread: Every rank of the group that shards the kept side keeps some rows of the basis, gathered for a step.
        full: Both sides are projected: R (r, r) is a sum over all pieces, and whole on every rank.
    """

    rows: tuple[ProcessGroup, ...] = ()
    cols: tuple[ProcessGroup, ...] = ()
    box: Box | None = None
    sharding: Sharding | None = None
    transposed: bool = False
    replicas: ProcessGroup | None = None
    spread: bool = False
    full: bool = False

    @classmethod
    def of(
        cls,
        param: Tensor,
        *,
        transposed: bool = False,
        replicas: ProcessGroup | None = None,
        spread: bool | None = None,
        full: bool = False,
        stacked: bool = False,
    ) -> Layout:
        """Derive the layout of a parameter that is projected from the right, or from the left (transposed)."""
        sharding = (Stacked if stacked else Sharding).of(param)
        if sharding is None:
            return cls(replicas=replicas)
        first, second = sharding.groups(0), sharding.groups(1)
        rows, cols = (second, first) if transposed else (first, second)
        alone = len(rows) == 1 and not cols
        wide = alone and (dist.get_world_size(rows[0]) > MANY if spread is None else spread)
        return cls(rows, cols, sharding.box(), sharding, transposed, spread=wide, full=full)

    def place(self, axis: Axis) -> tuple[Placement, ...]:
        """Placements of a state tensor by what its first dimension runs over."""
        if self.sharding is None:
            raise TypeError("a plain parameter has no placements")
        everywhere = {"basis": self.spread, "kept": self.dealt, "entries": True}.get(axis, False)
        return self.sharding.place(axis, transposed=self.transposed, everywhere=everywhere)

    def settle(self, value: Tensor, axis: Axis) -> Tensor:
        """Give a state tensor the placements of its axis: DTensors are redistributed, whole tensors cut."""
        if self.sharding is None or not value.ndim:
            return value
        return self.sharding.adopt(value, self.place(axis))

    def piece(self, grad: Tensor) -> Tensor:
        """This rank's piece of a gradient, placed as its parameter."""
        if self.sharding is None or not is_dtensor(grad):
            return grad
        if tuple(grad.placements) != self.sharding.own:
            grad = grad.redistribute(placements=self.sharding.own)
        return grad.to_local()

    def local(self, view: MatrixView) -> MatrixView:
        """This rank's piece of a view of the whole weight."""
        return view if self.box is None else replace(view, m=self.box.m, n=self.box.n)

    def projected(self, view: MatrixView) -> range:
        """Which of the projected coordinates this rank has, of a local view."""
        first = 0 if self.box is None else self.box.row if self.transposed else self.box.col
        return range(first, first + view.b)

    def kept(self, view: MatrixView) -> range:
        """Which rows of A this rank has, of a local view."""
        first = 0 if self.box is None else self.box.col if self.transposed else self.box.row
        return range(first, first + view.a)

    @property
    def natural(self) -> Layout:
        """The layout of the weight itself: `rows` and `cols` are those of W, not of A."""
        return self.flipped if self.transposed else self

    @property
    def flipped(self) -> Layout:
        """The layout of A^T: `rows` and `cols` change places."""
        return replace(self, rows=self.cols, cols=self.rows, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole weight where it is sharded, a vector being one column."""
        whole = () if self.sharding is None else self.sharding.shape
        return matrix_shape(whole) if whole else (1, 1)

    @property
    def alone(self) -> bool:
        """Nothing is sharded."""
        return not (self.rows or self.cols)

    @property
    def dealt(self) -> bool:
        """Whether rows of R are dealt out over the group that shards b; summed, every rank would have all of them."""
        return len(self.cols) == 1 and not (self.rows or self.full)

    @property
    def low(self) -> tuple[ProcessGroup, ...]:
        """Groups over which the rows of R are sharded once they are reduced."""
        if self.full:
            return ()
        return self.cols if self.dealt else self.rows

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """Sum a product contracted over the kept side."""
        return _reduce(tensor, self.rows, dist.ReduceOp.SUM)

    def sum_cols(self, tensor: Tensor) -> Tensor:
        """Sum a product contracted over the projected side."""
        return _reduce(tensor, self.cols, dist.ReduceOp.SUM)

    def sum_low(self, tensor: Tensor) -> Tensor:
        """Sum what was contracted over the rows of R."""
        return _reduce(tensor, self.low, dist.ReduceOp.SUM)

    def sum_all(self, tensor: Tensor) -> Tensor:
        """Sum over all entries of A."""
        return self.sum_rows(self.sum_cols(tensor))

    def max_cols(self, tensor: Tensor) -> Tensor:
        """The largest over the pieces of the projected side."""
        return _reduce(tensor, self.cols, dist.ReduceOp.MAX)

    def max_all(self, tensor: Tensor) -> Tensor:
        """The largest over all pieces of A."""
        return _reduce(tensor, self.rows + self.cols, dist.ReduceOp.MAX)

    def reduce(self, low: Tensor) -> Tensor:
        """Sum R (k, a, r) over the projected side, and keep this rank's rows where they are dealt out."""
        if not self.dealt:
            return self.sum_all(low) if self.full else self.sum_cols(low)
        return deal(low, self.cols[0])

    def gather_all(self, matrix: Tensor, whole: MatrixView) -> Tensor:
        """A (a, b) out of its pieces, for what needs all of it at a refresh; a copy of the gradient's size."""
        if self.sharding is None:
            return matrix
        from torch.distributed.tensor import Replicate

        shape = (whole.m, whole.n)
        placements = tuple(Replicate() if shard_dim(p) is None else p for p in self.sharding.placements)
        local = (matrix.T if self.transposed else matrix).contiguous()
        full = replace(self.sharding, shape=shape).wrap(local, shape, placements).full_tensor()
        return full.T if self.transposed else full

    def gather(self, low: Tensor, rows: int) -> Tensor:
        """All rows (k, a, r) of what `reduce` has dealt out, `rows` being a; what was not dealt out as it is."""
        return collect(low, rows, self.cols[0]) if self.dealt else low

    def own(self, rows: int) -> int:
        """Rows of R that this rank keeps where they are dealt out."""
        mine = share(rows, self.cols[0])
        return len(range(mine.start, mine.stop))

    def low_start(self, view: MatrixView) -> int:
        """Number of the first row of R that this rank keeps."""
        if self.full:
            return 0
        return share(view.a, self.cols[0]).start if self.dealt else self.kept(view).start

    def gather_bases(self, parts: Tensor, rows: int) -> Tensor:
        """Gather whole bases (k, b, r) from the shares of all ranks, `rows` being b."""
        return collect(parts, rows, self.rows[0])

    def own_basis(self, rows: int) -> slice:
        """Which rows of a basis are this rank's share."""
        return share(rows, self.rows[0])


def deal(low: Tensor, group: ProcessGroup) -> Tensor:
    """Sum (k, rows, r) over a group, and keep this rank's share of the rows: those that `torch.chunk` would deal it."""
    world, (k, rows, r) = dist.get_world_size(group), low.shape
    each, mine = -(-rows // world), share(rows, group)
    padded = torch.nn.functional.pad(low, (0, 0, 0, each * world - rows))
    parts = padded.view(k, world, each, r).transpose(0, 1).reshape(world * k, each, r)
    own = torch.empty((k, each, r), dtype=low.dtype, device=low.device)
    _reduce_scatter(own, parts, group=group)
    return own[:, : mine.stop - mine.start].contiguous()


def collect(low: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """All rows (k, rows, r) of what `deal` has dealt out."""
    world, (k, _, r) = dist.get_world_size(group), low.shape
    each = -(-rows // world)
    padded = torch.nn.functional.pad(low, (0, 0, 0, each - low.shape[1])).contiguous()
    parts = torch.empty((world * k, each, r), dtype=low.dtype, device=low.device)
    _all_gather(parts, padded, group=group)
    return parts.view(world, k, each, r).transpose(0, 1).reshape(k, world * each, r)[:, :rows].contiguous()


def share(rows: int, group: ProcessGroup) -> slice:
    """This rank's share of rows, as `deal` deals them."""
    each, rank = -(-rows // dist.get_world_size(group)), dist.get_rank(group)
    return slice(min(rows, rank * each), min(rows, (rank + 1) * each))


def _reduce(tensor: Tensor, groups: tuple[ProcessGroup, ...], op: dist.ReduceOp.RedOpType) -> Tensor:
    for group in groups:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


ALONE = Layout()
"""A single device."""
