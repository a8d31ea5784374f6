"""Bases: how P (b x r) is kept in the state of a matrix between refreshes, and how it multiplies.

    Dense     P itself, in the weight's dtype; with a left basis Q (a x r) where both sides are projected
    Index     r coordinates of the projected side, int32: P is a choice of columns of the unit matrix (`coordinates`)
    Cosine    r columns of the fixed cosine matrix of size b, int32 (`coordinates`)

A change of basis is seen by the moments as a `Turn` (a matrix of overlaps) or a `Match` (a list of what stays).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...kernels import pick, random
from ...kernels.reference import Move
from ...kernels.rounding import Target
from ...kernels.tiles import row_blocks
from . import codec, compact, linalg
from .change import Change, Turn
from .layout import ALONE, Layout
from .spec import Axis, Spec
from .together import reduced, stacked
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper

State = dict[str, Tensor]


class Bases(NamedTuple):
    """What a refresh finds for one matrix.

    Args:
        basis: P (b x r), or the r indices that stand for it.
        left: For a full projection the left basis Q (a x r).
        image: `A P` (a x r) where the projector has it at hand: the projection of this step's gradient.
    """

    basis: Tensor
    left: Tensor | None = None
    image: Tensor | None = None


class Step(NamedTuple):
    """How a direction moves a weight.

    Args:
        move: `W <- decay W + alpha (N P^T + residual)`, the residual in the order of the weight's memory.
        transposed: The weight is A^T.
        backend: Kernel backend.
        mine: The projected coordinates of a piece of the weight; None where it is whole.
    """

    move: Move
    transposed: bool = False
    backend: str = "auto"
    mine: range | None = None

    def add(self, target: Target, direction: Tensor, basis: Tensor) -> None:
        """Move by a direction N (a, r) in a basis P (b, r): one product."""
        left, right = (basis, direction) if self.transposed else (direction, basis)
        pick("project_back", target.weight, self.backend)(target, left, right, self.move)

    def rest(self, target: Target) -> None:
        """Only decay, and add the residual."""
        pick("project_back", target.weight, self.backend)(target, None, None, self.move)


class Basis(ABC):
    """One way to keep a basis; stateless itself, its state is the tensors it describes."""

    names: tuple[str, ...] = ("basis",)
    """State tensors that hold it."""
    picks: bool = False
    """Whether P selects coordinates: then `A - R P^T` is A in all that is not selected."""
    counted: bool = False
    """Whether single coordinates may stay at a refresh: where moments are carried, each then has a step count."""

    @abstractmethod
    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """Describe the state."""

    @abstractmethod
    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Make a basis from a seed, for a matrix whose gradient does not tell one."""

    @abstractmethod
    def changes(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> list[Change]:
        """Compare the bases in use with new ones, matrix by matrix."""

    @abstractmethod
    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """`R <- A P`, products in the dtype `gemm`; `mine` are the projected coordinates of a piece of A."""

    @abstractmethod
    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """`W <- decay W + alpha (N P^T + residual)`, rounded once."""

    def of(self, size: int, mine: range | None) -> Basis:
        """Bind it to matrices whose projected side is `size` long, of which this rank has the coordinates `mine`."""
        return self

    def columns(self, held: State, dtype: torch.dtype) -> Tensor:
        """This rank's rows of P (b x r) as one matrix of a given dtype, for bases that are one."""
        raise NotImplementedError(f"{type(self).__name__} is not one matrix P")

    def store(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> None:
        """Write new bases into the states."""
        for state, bases in zip(held, new, strict=True):
            for name, value in zip(self.names, bases, strict=False):
                if value is not None:
                    state[name].copy_(value)


class Dense(Basis):
    """P itself, with orthonormal columns."""

    names = ("basis", "basis_left")

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """The basis in the weight's dtype or in few bits: `b r` elements, and `a r` for the left one of two."""
        described: dict[str, Spec] = {}
        for name, size in view.basis_shapes.items():
            axis: Axis = "basis" if name == "basis" else "kept"
            if hyper.basis_dtype is None:
                described[name] = Spec(size, param.dtype, param.device, axis=axis)
            else:
                described |= compact.specs(name, size, hyper.basis_dtype, param.device, axis)
        return described

    def read(self, held: State, dtype: torch.dtype, name: str = "basis") -> Tensor:
        """P, or with `name="basis_left"` Q, in a dtype: the stored tensor itself where it has that dtype."""
        scale = held.get(name + compact.SCALE)
        return held[name].to(dtype) if scale is None else compact.read(held[name], scale, dtype)

    def left(self, held: State, dtype: torch.dtype) -> Tensor | None:
        """Q of a full projection."""
        return self.read(held, dtype, "basis_left") if "basis_left" in held else None

    def store(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> None:
        """Write new bases into the states."""
        if not held or "basis" + compact.SCALE not in held[0]:
            super().store(held, new, layout)
            return
        for name, parts in zip(self.names, zip(*new, strict=True), strict=False):
            if name in held[0]:
                scales = [state[name + compact.SCALE] for state in held]
                lies = layout if name == "basis" else layout.flipped
                compact.write([state[name] for state in held], scales, stacked(parts), lies)

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Random orthonormal columns."""
        found = (
            linalg.orthonormal(random.normal(random.mix(seed, side), rows, cols, device))
            for side, (rows, cols) in enumerate(view.basis_shapes.values())
        )
        return Bases(*found)

    def changes(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> list[Change]:
        """Overlaps of old and new directions (r, r)."""
        right = reduced(layout.sum_cols, self._overlaps(held, [bases.basis for bases in new], "basis"))
        if not new or new[0].left is None:
            return [Turn(turn) for turn in right]
        left = reduced(layout.sum_rows, self._overlaps(held, [bases.left for bases in new], "basis_left"))
        return [Turn(*turns) for turns in zip(right, left, strict=True)]

    def _overlaps(self, held: Sequence[State], new: Sequence[Tensor | None], name: str) -> list[Tensor]:
        # In the dtype of the moments, which the overlaps multiply.
        wide = [None if found is None else found.to(codec.work_dtype(found.dtype)) for found in new]
        pairs = zip(held, wide, strict=True)
        return [found.T @ self.read(state, found.dtype, name) for state, found in pairs if found is not None]

    def columns(self, held: State, dtype: torch.dtype) -> Tensor:
        """P itself."""
        return self.read(held, dtype)

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """One product, `A P`, or two, `Q^T A P`."""
        multiply(matrix, self.read(held, gemm), gemm, out, self.left(held, gemm))

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """One product in place, `N P^T`, or two, `Q N P^T`."""
        gemm = step.move.gemm
        left = self.left(held, gemm)
        if left is not None:
            direction = left @ direction.to(gemm)  # (a, r)
        step.add(target, direction, self.read(held, gemm))

    def across(self, held: State, rows: Tensor, cols: Tensor) -> Tensor:
        """The rows of P (k, r) for the entries (rows, cols) of `R P^T`: entry (i, j) is row i of R times row j of P."""
        return self.read(held, torch.float32)[cols] if "basis" + compact.SCALE in held else held["basis"][cols]


def multiply(matrix: Tensor, basis: Tensor, gemm: torch.dtype, out: Tensor, left: Tensor | None = None) -> None:
    """`R <- A P` or `Q^T A P`; a matrix of another dtype is converted a block of rows at a time."""
    basis = basis.to(gemm)
    if left is not None:
        parts = [left[rows].to(gemm).T @ (matrix[rows].to(gemm) @ basis) for rows in row_blocks(matrix, gemm)]
        out.copy_(torch.stack(parts).sum(0) if parts else torch.zeros_like(out))  # (r, r); a piece may be empty
    elif out.dtype == gemm == matrix.dtype:
        torch.mm(matrix, basis, out=out)
    else:
        for rows in row_blocks(matrix, gemm):
            out[rows] = (matrix[rows].to(gemm) @ basis).to(out.dtype)


DENSE = Dense()
