"""A bucket: the matrices of one group that share shape, side, rank, dtype and device, seen in one step."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.blockwise import FORMATS
from ...kernels.rounding import Target
from . import codec
from .basis import Basis, State
from .flat import Single
from .hyper import Hyper
from .layout import Layout
from .rules import RULES, Rule
from .segments import Segments
from .target import writing
from .view import MatrixView

CPU_BUFFER = 1 << 19
"""Most elements of a bucket's R on a CPU, so that every verb finds it still in the cache."""
GPU_BUFFER = 1 << 26
"""The same on a GPU, where fewer launches count for more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What does not change between steps: which parameters form a bucket, and how they are seen.

    Args:
        group: Index of the parameter group.
        view: Orientation and rank of the whole matrices; None for a plain bucket (any shapes).
        layout: Where the parameters are sharded, and so which sums over ranks a step needs.
        params: The parameters.
        positions: For every parameter the positions of its matrices among all of the optimizer (one, or more for a
            stack): they seed its random numbers.
        offsets: As `positions`, the steps by which the first refresh comes early with `stagger=True`.
        stacked: Every parameter is a stack of matrices.
    """

    group: int
    view: MatrixView | None
    layout: Layout
    params: list[Tensor]
    positions: list[range]
    offsets: list[list[int]]
    stacked: bool = False

    def split(self) -> Iterator[Plan]:
        """Cut into plans whose low-rank buffers fit the cache of a CPU, or stay small in the memory of a GPU."""
        size = max(1, self.most // max(1, *map(len, self.positions)))
        for start in range(0, len(self.params), size):
            yield self._part(slice(start, start + size))

    @property
    def most(self) -> int:
        """Most matrices of a bucket; it follows from the largest piece, so that ranks with uneven pieces cut alike."""
        if self.view is None:
            return sys.maxsize
        a = self.view.rank if self.view.full else self.piece[0]
        a = max(a, self.view.b) if self.layout.spread else a  # bases are whole for the time of a step
        budget = CPU_BUFFER if self.params[0].device.type == "cpu" else GPU_BUFFER
        return max(1, budget // max(1, a * self.view.rank))

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns of the largest piece of A on any rank: the same numbers on all of them."""
        assert self.view is not None
        rows, cols = (math.prod(map(dist.get_world_size, groups)) for groups in (self.layout.rows, self.layout.cols))
        return -(-self.view.a // rows), -(-self.view.b // cols)

    def alone(self) -> Iterator[Plan]:
        """A plan for every one of its parameters."""
        for index in range(len(self.params)):
            yield self._part(slice(index, index + 1))

    def _part(self, part: slice) -> Plan:
        lists = {name: getattr(self, name)[part] for name in ("params", "positions", "offsets")}
        return replace(self, **lists)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The parameters of a plan that take part in this step, with their gradients, states and hyper-parameters."""

    plan: Plan
    hyper: Hyper
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    positions: list[int]
    offsets: list[int]
    ready: list[Tensor | None]
    """R where it arrived already projected, as from `SubspaceAccumulator`; None where `grads` has the full gradient."""
    projected: list[Tensor | None]
    """R where this step's refresh has computed it on the way; `project` then need not."""
    fresh: list[bool]
    """Whether this step has found a new basis."""
    usable: list[Tensor] = field(default_factory=list)
    """Whether R was finite, 0-d bools; filled by `project`."""
    rates: list[float | Tensor] = field(default_factory=list)
    """Learning rates of a rule that is `absolute`; filled by `apply.rates` before any weight moves."""
    stored: list[State] = field(default_factory=list)
    """The optimizer's own state dicts (DTensors where sharded), whose local pieces are `states`; not for stacks."""

    @property
    def view(self) -> MatrixView:
        """Orientation, rank and sizes of this rank's pieces of the matrices."""
        return self.layout.local(self.whole)

    @property
    def whole(self) -> MatrixView:
        """Orientation, rank and sizes of the whole matrices."""
        if self.plan.view is None:
            raise TypeError("a plain bucket has no view: its parameters are not projected")
        return self.plan.view

    @property
    def layout(self) -> Layout:
        """Where the parameters are sharded."""
        return self.plan.layout

    @property
    def mine(self) -> range | None:
        """Which of the b projected coordinates this rank's pieces have; None for all."""
        return self.layout.projected(self.view) if self.layout.cols else None

    @property
    def place(self) -> list[int]:
        """First row, or row and column, of this rank's piece of a moment in the whole one; empty where it is whole."""
        if self.layout.box is None:
            return []
        if self.plan.view is None:
            return [self.layout.box.row, self.layout.box.col]
        return [self.layout.low_start(self.view)]

    @property
    def basis(self) -> Basis:
        """How the bases are kept and multiplied."""
        basis = self.hyper.basis.of(self.whole.b, self.mine)
        if isinstance(basis, Segments) and self.layout.rows:
            return basis.within(self.layout.kept(self.view))
        return basis.within(self.layout) if isinstance(basis, Single) else basis

    @property
    def rule(self) -> Rule:
        """The inner rule."""
        return RULES[self.hyper.rule]

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype: fp32, or fp64 for fp64 parameters."""
        return codec.work_dtype(self.params[0].dtype)

    @property
    def gemm_dtype(self) -> torch.dtype:
        """The dtype of the operands of projections: the gradient's, but fp32 for fp16, whose range R may exceed."""
        own = self.params[0].dtype
        if self.hyper.gemm_dtype == "auto":
            return torch.float32 if own == torch.float16 else own
        dtype: torch.dtype = getattr(torch, self.hyper.gemm_dtype)
        return dtype

    def dithers(self, name: str) -> bool:
        """Whether the moment of this name is rounded stochastically; `compat="official"` rounds bf16 to nearest."""
        nearest = self.hyper.official and self.hyper.state_dtype not in FORMATS
        return name in self.rule.drifting and not nearest

    def matrix(self, index: int) -> Tensor:
        """The oriented gradient A (a x b) of one parameter."""
        return self.view.orient(self.grads[index])

    def targets(self) -> Iterator[Target]:
        """Every weight to write to, as a matrix (m, n) in the order of its memory."""
        shape = (self.view.m, self.view.n)
        for param, held, position in zip(self.params, self.states, self.positions, strict=True):
            yield from writing(param, held, self.hyper, position, shape, self.layout.box)

    def natural(self, index: int) -> Tensor:
        """The gradient of one parameter as a matrix (m, n), not oriented."""
        return self.grads[index].reshape(self.view.m, self.view.n)

    def take(self, param: Tensor, grad: Tensor, held: State, place: tuple[int, int], ready: Tensor | None) -> None:
        """Append a matrix, or a plain parameter; `place` is its position and its offset."""
        self.params.append(param)
        self.grads.append(grad)
        self.states.append(held)
        self.positions.append(place[0])
        self.offsets.append(place[1])
        self.ready.append(ready)
        self.projected.append(None)
        self.fresh.append(False)

    def parts(self) -> Iterator[Bucket]:
        """Cut into buckets of at most `plan.most` matrices, which a stack may exceed by itself."""
        size = max(1, min(self.plan.most, len(self.params)))
        for start in range(0, len(self.params), size):
            yield self._part(slice(start, start + size))

    def only(self, index: int) -> Bucket:
        """The bucket of one of the parameters."""
        return self._part(slice(index, index + 1))

    def _part(self, part: slice) -> Bucket:
        lists = {name: getattr(self, name)[part] for name in LISTS}
        return Bucket(self.plan, self.hyper, **lists)


LISTS = ("params", "grads", "states", "positions", "offsets", "ready", "projected", "fresh", "stored")
"""Fields of a bucket that have one entry a matrix; `usable` and `rates` belong to one step of one bucket."""
