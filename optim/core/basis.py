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

from ...kernels import random
from . import linalg
from .change import Change, Match, Turn
from .spec import Spec
from .tiles import row_blocks
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
    """How a direction is added to a weight: `W <- decay W + alpha N P^T`, products in the dtype `gemm`."""

    decay: float | Tensor
    alpha: float
    gemm: torch.dtype


class Basis(ABC):
    """One way to keep a basis; stateless itself, its state is the tensors it describes."""

    names: tuple[str, ...] = ("basis",)
    """State tensors that hold it."""
    counted: bool = False
    """Coordinates have an identity of their own, and so a step count of their own where moments are carried."""

    @abstractmethod
    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """Describe the state."""

    @abstractmethod
    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Make a basis where no gradient tells one."""

    @abstractmethod
    def change(self, held: State, new: Bases) -> Change:
        """Compare the basis in use with a new one."""

    @abstractmethod
    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor) -> None:
        """`R <- A P`, products in the dtype `gemm`."""

    @abstractmethod
    def project_back_(self, weight: Tensor, direction: Tensor, held: State, step: Step) -> None:
        """`W <- decay W + alpha N P^T`, W oriented (a x b)."""

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

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """The basis in the weight's dtype: `b r` elements, and `a r` for the left one of a full projection."""
        return {name: Spec(size, param.dtype, param.device) for name, size in view.basis_shapes.items()}

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Random orthonormal columns."""
        found = (
            linalg.orthonormal(random.normal(random.mix(seed, side), rows, cols, device))
            for side, (rows, cols) in enumerate(view.basis_shapes.values())
        )
        return Bases(*found)

    def change(self, held: State, new: Bases) -> Turn:
        """Overlaps of old and new directions."""
        dtype = new.basis.dtype
        right = new.basis.T @ held["basis"].to(dtype)  # (r, r)
        return Turn(right, None if new.left is None else new.left.T @ held["basis_left"].to(dtype))

    def columns(self, held: State, size: int, dtype: torch.dtype) -> Tensor:
        """P itself."""
        return held["basis"].to(dtype)

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor) -> None:
        """One product, `A P`, or two, `Q^T A P`."""
        _multiply(matrix, held["basis"], gemm, out, held.get("basis_left"))

    def project_back_(self, weight: Tensor, direction: Tensor, held: State, step: Step) -> None:
        """One product in place, `N P^T`, or two, `Q N P^T`."""
        direction = direction.to(step.gemm)
        if "basis_left" in held:
            direction = held["basis_left"].to(step.gemm) @ direction  # (a, r)
        _addmm_(weight, direction, held["basis"].to(step.gemm), step)

    def across(self, held: State, rows: Tensor, cols: Tensor) -> Tensor:
        """The rows of P (k, r) that meet the entries (rows, cols) of A in `R P^T`."""
        return held["basis"][cols]


class Index(Basis):
    """A choice of r coordinates of the projected side: nothing is multiplied."""

    counted = True

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`r` integers of 4 bytes."""
        return {"basis": Spec((view.rank,), torch.int32, param.device)}

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """A random subset."""
        return Bases(random.subset(seed, view.b, view.rank, device).int())

    def change(self, held: State, new: Bases) -> Match:
        """Which coordinates stay."""
        return Match.of(new.basis, held["basis"])

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor) -> None:
        """Gather columns."""
        out.copy_(matrix.index_select(1, held["basis"]))

    def project_back_(self, weight: Tensor, direction: Tensor, held: State, step: Step) -> None:
        """Scatter columns, rounding once."""
        chosen = held["basis"].long()
        columns = weight.index_select(1, chosen).to(direction.dtype).mul_(step.decay)
        if not isinstance(step.decay, float) or step.decay != 1.0:
            weight.mul_(step.decay)
        weight.index_copy_(1, chosen, columns.add_(direction, alpha=step.alpha).to(weight.dtype))


class Cosine(Index):
    """Columns of the fixed cosine matrix D (b x b), which all matrices of that side share and no state holds."""

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor) -> None:
        """`A D_S`, S the chosen columns."""
        _multiply(matrix, self.columns(held, matrix.shape[1], gemm), gemm, out)

    def project_back_(self, weight: Tensor, direction: Tensor, held: State, step: Step) -> None:
        """`N D_S^T`."""
        _addmm_(weight, direction.to(step.gemm), self.columns(held, weight.shape[1], step.gemm), step)

    def columns(self, held: State, size: int, dtype: torch.dtype) -> Tensor:
        """`D_S`."""
        return random.cosines(size, dtype, held["basis"].device).index_select(1, held["basis"])


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


def _addmm_(weight: Tensor, direction: Tensor, basis: Tensor, step: Step) -> None:
    """`W <- decay W + alpha N P^T` for W (a x b) of either memory order."""
    factors = (direction, basis.T)
    if weight.stride(-1) != 1:
        weight, factors = weight.T, (basis, direction.T)
    decay = step.decay
    if isinstance(decay, Tensor):
        weight.mul_(decay)
        decay = 1.0
    if direction.dtype == weight.dtype:
        weight.addmm_(*factors, beta=decay, alpha=step.alpha)
        return
    for rows in row_blocks(weight, direction.dtype):  # rounded once
        product = (factors[0][rows] @ factors[1]).mul_(step.alpha)
        weight[rows] = product.add_(weight[rows].to(product.dtype), alpha=decay)


DENSE, INDEX, COSINE = Dense(), Index(), Cosine()
