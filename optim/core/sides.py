"""Layouts of the tensors beside a sharded matrix: R, P, one number a row, a batch of matrices in many dimensions."""

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
    """The last two dimensions of a gradient, the others being a batch; only its first two are ever sharded."""
    if ndim <= 2 or layout.sharding is None:
        return layout
    return _thin(layout, layout.natural.cols if ndim == 3 else (), layout.sharding.shape[-2:])


def axes(ndim: int) -> dict[str, Axis]:
    """`Spec.axis` of Adafactor's row and column statistics of a gradient of so many dimensions."""
    row: Axis = "m" if ndim == 2 else "param"
    col: Axis = "n" if ndim == 2 else "m" if ndim == 3 else "param"
    return {"exp_avg_sq_row": row, "exp_avg_sq_col": col}


def _thin(layout: Layout, rows: tuple[ProcessGroup, ...], shape: Sequence[int]) -> Layout:
    if layout.sharding is None:
        return layout
    sharding = replace(layout.sharding, shape=tuple(shape))
    return replace(layout, rows=rows, cols=(), box=None, sharding=sharding, transposed=False)
