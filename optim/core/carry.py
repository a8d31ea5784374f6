"""What becomes of the moments when the basis changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...kernels import random
from . import codec, factored, sides
from .bucket import Bucket
from .change import Change
from .layout import ALONE, Layout
from .state import AGE


def carry_moments(b: Bucket, changes: Mapping[int, Change]) -> None:
    """Take the moments of some matrices along to their new bases, as the group's `carry` says.

    keep     M and V keep their numbers, which then refer to other directions
    reset    M = 0, V = 0, and bias correction starts again
    rotate   the same moments in the new coordinates, with C = P_new^T P_old:
             M <- M C^T,  V <- V (C o C)^T  (coordinates taken as uncorrelated)
             coordinates of an index basis that stay keep their numbers and their age, new ones start at zero
    """
    names = list(b.rule.buffers(b.view.low_shape, b.hyper))
    if b.hyper.carry == "reset":
        for index in changes:
            for name in [*names, "step"]:
                codec.zero_(b.states[index], name)
    if b.hyper.carry != "rotate":
        return
    for index, change in changes.items():
        for name in names:
            if name in b.rule.linear:
                _store(b, index, name, change.first(_load(b, index, name)))
            elif name == "exp_avg_sq":
                _store(b, index, name, change.second(_load(b, index, name)))
        held = b.states[index]
        if AGE in held:
            held[AGE].copy_(change.cols(held[AGE]))
    if "exp_avg_sq_row" in names:
        rows, cols = ([_load(b, index, name) for index in changes] for name in ("exp_avg_sq_row", "exp_avg_sq_col"))
        carried = carry_factored(rows, cols, list(changes.values()), sides.low(b.layout, b.whole))
        for index, row, col in zip(changes, *carried, strict=True):
            _store(b, index, "exp_avg_sq_row", row)
            _store(b, index, "exp_avg_sq_col", col)


def _load(b: Bucket, index: int, name: str) -> Tensor:
    return codec.load(b.states[index], name, b.hyper.state_dtype, b.dtype)


def _store(b: Bucket, index: int, name: str, value: Tensor) -> None:
    held = b.states[index]
    seed = random.mix(b.hyper.seed, b.positions[index], int(held["refreshes"]), 2)
    codec.store(held, name, value, b.hyper.state_dtype, seed if b.dithers(name) else None)


def carry_factored(
    rows: Sequence[Tensor], cols: Sequence[Tensor], changes: Sequence[Change], layout: Layout = ALONE
) -> tuple[list[Tensor], list[Tensor]]:
    """Row and column means of the carried `V = R C^T / mean(R)` of some matrices, without V; zero stays zero."""
    totals = [total.clamp_min(1e-38) for total in factored.means(rows, layout)]
    rows = [change.rows(row) for change, row in zip(changes, rows, strict=True)]
    cols = [change.cols(col) for change, col in zip(changes, cols, strict=True)]
    averages = factored.means(rows, layout)
    scaled = [row * (col.mean() / total) for row, col, total in zip(rows, cols, totals, strict=True)]
    return scaled, [col * (average / total) for col, average, total in zip(cols, averages, totals, strict=True)]
