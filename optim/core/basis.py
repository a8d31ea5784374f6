"""Bases: how P (b x r) is kept in the state of a matrix between refreshes, and how it multiplies.

    Dense     P itself, in the weight's dtype; with a left basis Q (a x r) where both sides are projected
    Index     r coordinates of the projected side, int32: P is a choice of columns of the unit matrix
    Cosine    r columns of the fixed cosine matrix of size b, int32

A change of basis is seen by the moments as a `Turn` (a matrix of overlaps) or a `Match` (a list of what stays).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...kernels import pick, random
from ...kernels.reference import Move, Scaled, scaled
from ...kernels.rounding import Target
from ...kernels.tiles import row_blocks
from . import compact, linalg
from .change import Change, Match, Turn
from .layout import ALONE, Layout
from .spec import Spec
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper

State = dict[str, Tensor]


class Bases(NamedTuple):
    """What a refresh finds.

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
    splits: bool = False
    """The projected side may be sharded: every rank multiplies by its own rows of P."""
    counted: bool = False
    """Coordinates have an identity of their own, and so a step count of their own where moments are carried."""

    @abstractmethod
    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """Describe the state."""

    @abstractmethod
    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Make a basis where no gradient tells one."""

    @abstractmethod
    def change(self, held: State, new: Bases, layout: Layout = ALONE) -> Change:
        """Compare the basis in use with a new one."""

    @abstractmethod
    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """`R <- A P`, products in the dtype `gemm`; `mine` are the projected coordinates of a piece of A."""

    @abstractmethod
    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """`W <- decay W + alpha (N P^T + residual)`, rounded once."""

    def columns(self, held: State, size: int, dtype: torch.dtype) -> Tensor:
        """P (b x r) as one matrix of a given dtype, b = `size`, for bases that are one."""
        raise NotImplementedError(f"{type(self).__name__} is not one matrix P")

    def store(self, held: State, new: Bases) -> None:
        """Take the new basis over."""
        for name, value in zip(self.names, new, strict=False):
            if value is not None:
                held[name].copy_(value)


class Dense(Basis):
    """P itself, with orthonormal columns."""

    names = ("basis", "basis_left")
    splits = True

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """The basis in the weight's dtype or in few bits: `b r` elements, and `a r` for the left one of two."""
        if hyper.basis_dtype is None:
            axes = {"basis": "basis", "basis_left": "kept"}
            return {
                name: Spec(size, param.dtype, param.device, axis=axes[name]) for name, size in view.basis_shapes.items()
            }
        described: dict[str, Spec] = {}
        for name, size in view.basis_shapes.items():
            described |= compact.specs(name, size, hyper.basis_dtype, param.device)
        return described

    def read(self, held: State, dtype: torch.dtype, name: str = "basis") -> Tensor:
        """P, or with `name="basis_left"` Q, in a dtype: the stored tensor itself where it has that dtype."""
        scale = held.get(name + compact.SCALE)
        return held[name].to(dtype) if scale is None else compact.read(held[name], scale, dtype)

    def left(self, held: State, dtype: torch.dtype) -> Tensor | None:
        """Q of a full projection."""
        return self.read(held, dtype, "basis_left") if "basis_left" in held else None

    def store(self, held: State, new: Bases) -> None:
        """Take the new basis over."""
        for name, value in zip(self.names, new, strict=False):
            if value is not None and name + compact.SCALE in held:
                compact.write(held[name], held[name + compact.SCALE], value)
            elif value is not None:
                held[name].copy_(value)

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Random orthonormal columns."""
        found = (
            linalg.orthonormal(random.normal(random.mix(seed, side), rows, cols, device))
            for side, (rows, cols) in enumerate(view.basis_shapes.values())
        )
        return Bases(*found)

    def change(self, held: State, new: Bases, layout: Layout = ALONE) -> Turn:
        """Overlaps of old and new directions."""
        dtype = new.basis.dtype
        right = layout.sum_cols(new.basis.T @ self.read(held, dtype))  # (r, r)
        if new.left is None:
            return Turn(right)
        return Turn(right, layout.sum_rows(new.left.T @ self.read(held, dtype, "basis_left")))

    def columns(self, held: State, size: int, dtype: torch.dtype) -> Tensor:
        """P itself."""
        return self.read(held, dtype)

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """One product, `A P`, or two, `Q^T A P`."""
        _multiply(matrix, self.read(held, gemm), gemm, out, self.left(held, gemm))

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """One product in place, `N P^T`, or two, `Q N P^T`."""
        gemm = step.move.gemm
        left = self.left(held, gemm)
        if left is not None:
            direction = left @ direction.to(gemm)  # (a, r)
        step.add(target, direction, self.read(held, gemm))

    def across(self, held: State, rows: Tensor, cols: Tensor) -> Tensor:
        """The rows of P (k, r) that meet the entries (rows, cols) of A in `R P^T`."""
        return self.read(held, torch.float32)[cols] if "basis" + compact.SCALE in held else held["basis"][cols]


class Index(Basis):
    """A choice of r coordinates of the projected side: nothing is multiplied."""

    counted = True
    splits = True

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`r` integers of 4 bytes."""
        return {"basis": Spec((view.rank,), torch.int32, param.device)}

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """A random subset."""
        return Bases(random.subset(seed, view.b, view.rank, device).int())

    def change(self, held: State, new: Bases, layout: Layout = ALONE) -> Match:
        """Which coordinates stay."""
        return Match.of(new.basis, held["basis"])

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """Gather columns; those of other pieces are zero here, and summed up later."""
        here, chosen = _among(held["basis"], mine)
        if here is not None:
            out.zero_()
            out[:, here] = matrix.index_select(1, chosen).to(out.dtype)
        else:
            out.copy_(matrix.index_select(1, chosen))

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """Scatter columns; a signed residual is zero in them."""
        (here, chosen), (decay, alpha, _, residual) = _among(held["basis"], step.mine), step.move
        direction = direction if here is None else direction[:, here]
        columns = target.select(chosen, 0 if step.transposed else 1)
        value = columns.read().mul_(decay)  # (a, r), or its transpose as all that follows
        moved = direction.T if step.transposed else direction
        if isinstance(residual, Scaled):
            there = Scaled(residual.grad.index_select(0 if step.transposed else 1, chosen), residual.factors)
            moved = moved + scaled(there, value.dtype)
        if residual is not None or isinstance(decay, Tensor) or decay != 1.0:
            step.rest(target)
        columns.write(value.add_(moved * alpha))
        target.put(columns, chosen, 0 if step.transposed else 1)


class Cosine(Index):
    """Columns of the fixed cosine matrix D (b x b), which all matrices of that side share and no state holds."""

    splits = False

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """`A D_S`, S the chosen columns."""
        _multiply(matrix, self.columns(held, matrix.shape[1], gemm), gemm, out)

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """`N D_S^T`."""
        size = target.weight.shape[0 if step.transposed else 1]
        step.add(target, direction, self.columns(held, size, step.move.gemm))

    def columns(self, held: State, size: int, dtype: torch.dtype) -> Tensor:
        """`D_S`."""
        return random.cosines(size, dtype, held["basis"].device).index_select(1, held["basis"])


def _among(chosen: Tensor, mine: range | None) -> tuple[Tensor | None, Tensor]:
    """Which of some coordinates (r,) are among those of a piece, None for all, and what they are there."""
    if mine is None:
        return None, chosen.long()
    here = ((chosen >= mine.start) & (chosen < mine.stop)).nonzero()[:, 0]
    return here, chosen[here].long() - mine.start


def _multiply(matrix: Tensor, basis: Tensor, gemm: torch.dtype, out: Tensor, left: Tensor | None = None) -> None:
    """`R <- A P` or `Q^T A P`; a matrix of another dtype is converted a block of rows at a time."""
    basis = basis.to(gemm)
    if left is not None:
        parts = [left[rows].to(gemm).T @ (matrix[rows].to(gemm) @ basis) for rows in row_blocks(matrix, gemm)]
        out.copy_(torch.stack(parts).sum(0))  # (r, r)
    elif out.dtype == gemm == matrix.dtype:
        torch.mm(matrix, basis, out=out)
    else:
        for rows in row_blocks(matrix, gemm):
            out[rows] = (matrix[rows].to(gemm) @ basis).to(out.dtype)


DENSE, INDEX, COSINE = Dense(), Index(), Cosine()
