"""Layouts of what belongs to a sharded matrix: R, P, one number a row, the factored pair of many dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .layout import Layout
from .spec import Axis
from .view import MatrixView

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def low(layout: Layout, whole: MatrixView) -> Layout:
    """R (a, r) as `Layout.reduce` leaves it: rows are sharded, or dealt out, and columns whole."""
    return _thin(layout, layout.low, whole.low_shape)


def basis(layout: Layout, whole: MatrixView) -> Layout:
    """P (b, r), which lies as the projected side does."""
    return _thin(layout, layout.cols, (whole.b, whole.rank))


def per_row(layout: Layout) -> Layout:
    """One number a row of the weight (m,)."""
    natural = layout.natural
    return _thin(layout, natural.rows, natural.shape[:1])


def pair(layout: Layout, ndim: int) -> Layout:
    """The last two dimensions of a gradient of many, a batch of matrices; only the first two are ever sharded."""
    if ndim <= 2 or layout.sharding is None:
        return layout
    return _thin(layout, layout.natural.cols if ndim == 3 else (), layout.sharding.shape[-2:])


def axes(ndim: int) -> dict[str, Axis]:
    """What the rows of the statistics of that pair are, for `Spec.axis`."""
    row: Axis = "m" if ndim == 2 else "param"
    col: Axis = "n" if ndim == 2 else "m" if ndim == 3 else "param"
    return {"exp_avg_sq_row": row, "exp_avg_sq_col": col}


def _thin(layout: Layout, rows: tuple[ProcessGroup, ...], shape: Sequence[int]) -> Layout:
    if layout.sharding is None:
        return layout
    sharding = replace(layout.sharding, shape=tuple(shape))
    return replace(layout, rows=rows, cols=(), box=None, sharding=sharding, transposed=False)
