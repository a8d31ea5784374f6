"""Bases that are a choice: r indices stand for P, among the coordinates of a side or the columns of a fixed matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import random
from ...kernels.choice import select
from ...kernels.reference import Scaled, scaled
from ...kernels.rounding import Target
from .basis import Bases, Basis, State, Step, multiply
from .change import Change, Match
from .layout import ALONE, Layout
from .spec import Spec
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper


class Index(Basis):
    """A choice of r coordinates of the projected side: nothing is multiplied."""

    picks = True
    counted = True

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`r` integers of 4 bytes.

        Raises:
            ValueError: A coordinate may not fit into 4 bytes.
        """
        if view.b > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"got a {tuple(param.shape)} parameter with {view.b} coordinates to choose from, which 4-byte indices "
                "do not number: choose projector='columns'"
            )
        return {"basis": Spec((view.rank,), torch.int32, param.device)}

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """A random subset."""
        return Bases(random.subset(seed, view.b, view.rank, device).int())

    def changes(self, held: Sequence[State], new: Sequence[Bases], layout: Layout = ALONE) -> list[Change]:
        """Which coordinates stay."""
        return [Match.of(bases.basis, state["basis"]) for state, bases in zip(held, new, strict=True)]

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """Gather columns; those of other pieces are zero here, and filled in by `Layout.reduce`."""
        here, chosen = _among(held["basis"], mine)
        if here is not None:
            out.zero_()
            out[:, here] = select(matrix, chosen, 1).to(out.dtype)
        else:
            out.copy_(select(matrix, chosen, 1))

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """Move the chosen columns, and all others by decay and residual; a signed residual is zero in chosen ones."""
        (here, chosen), (decay, alpha, _, residual) = _among(held["basis"], step.mine), step.move
        direction = direction if here is None else direction[:, here]
        columns = target.select(chosen, 0 if step.transposed else 1)
        value = columns.edit(decay)  # (a, r), or its transpose as all that follows
        moved = direction.T if step.transposed else direction
        if isinstance(residual, Scaled):
            there = Scaled(select(residual.grad, chosen, 0 if step.transposed else 1), residual.factors)
            moved = moved + scaled(there, value.dtype)
        if residual is not None or isinstance(decay, Tensor) or decay != 1.0:
            step.rest(target)
        columns.write(value.add_(moved * alpha) if isinstance(alpha, Tensor) else value.add_(moved, alpha=alpha))
        target.put(columns, chosen, 0 if step.transposed else 1)


@dataclass(frozen=True)
class Cosine(Index):
    """Columns of the fixed cosine matrix D (b x b), which all matrices of that side share and no state holds.

    Args:
        size: b; 0 until the matrix is known.
        mine: The projected coordinates of a piece of it, which are rows of D; None where it is whole.
    """

    picks = False

    size: int = 0
    mine: range | None = None

    def of(self, size: int, mine: range | None) -> Cosine:
        """Bind it to the size of D and to this rank's rows of it."""
        return Cosine(size, mine)

    def project(self, matrix: Tensor, held: State, gemm: torch.dtype, out: Tensor, mine: range | None = None) -> None:
        """`A D_S`, S the chosen columns."""
        multiply(matrix, self.columns(held, gemm), gemm, out)

    def project_back_(self, target: Target, direction: Tensor, held: State, step: Step) -> None:
        """`N D_S^T`."""
        step.add(target, direction, self.columns(held, step.move.gemm))

    def columns(self, held: State, dtype: torch.dtype) -> Tensor:
        """`D_S`, of a piece its rows."""
        whole = random.cosines(self.size, dtype, held["basis"].device)
        return whole[_rows(self.mine)].index_select(1, held["basis"])


def _among(chosen: Tensor, mine: range | None) -> tuple[Tensor | None, Tensor]:
    """Which of the r chosen coordinates are in this rank's piece (None: all), and their numbers within the piece."""
    if mine is None:
        return None, chosen.long()
    here = ((chosen >= mine.start) & (chosen < mine.stop)).nonzero()[:, 0]
    return here, chosen[here].long() - mine.start


def _rows(mine: range | None) -> slice:
    return slice(None) if mine is None else slice(mine.start, mine.stop)


INDEX, COSINE = Index(), Cosine()
