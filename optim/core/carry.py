"""What becomes of the moments when the basis changes."""

from __future__ import annotations

from torch import Tensor

from ...kernels import random
from . import codec, factored, sides
from .bucket import Bucket
from .change import Change
from .layout import ALONE, Layout
from .state import AGE


def carry_moments(b: Bucket, index: int, change: Change) -> None:
    """Take the moments of one matrix along to its new basis, as the group's `carry` says.

    keep     M and V keep their numbers, which then refer to other directions
    reset    M = 0, V = 0, and bias correction starts again
    rotate   the same moments in the new coordinates, with C = P_new^T P_old:
             M <- M C^T,  V <- V (C o C)^T  (coordinates taken as uncorrelated)
             coordinates of an index basis that stay keep their numbers and their age, new ones start at zero
    """
    held, stored = b.states[index], b.hyper.state_dtype
    names = list(b.rule.buffers(b.view.low_shape, b.hyper))
    if b.hyper.carry == "reset":
        for name in [*names, "step"]:
            codec.zero_(held, name)
    if b.hyper.carry != "rotate":
        return
    moments = {name: codec.load(held, name, stored, b.dtype) for name in names}
    carried = {name: change.first(moments[name]) for name in b.rule.linear if name in moments}
    if "exp_avg_sq" in moments:
        carried["exp_avg_sq"] = change.second(moments["exp_avg_sq"])
    if "exp_avg_sq_row" in moments:
        lies = sides.low(b.layout, b.whole)
        row, col = carry_factored(moments["exp_avg_sq_row"], moments["exp_avg_sq_col"], change, lies)
        carried |= {"exp_avg_sq_row": row, "exp_avg_sq_col": col}
    for name, value in carried.items():
        seed = random.mix(b.hyper.seed, b.positions[index], int(held["refreshes"]), 2)
        codec.store(held, name, value, stored, seed if b.dithers(name) else None)
    if AGE in held:
        held[AGE].copy_(change.cols(held[AGE]))


def carry_factored(row: Tensor, col: Tensor, change: Change, layout: Layout = ALONE) -> tuple[Tensor, Tensor]:
    """Row and column means of the carried `V = R C^T / mean(R)`, without V; zero stays zero."""
    total = factored.mean(row, layout).clamp_min(1e-38)
    rows, cols = change.rows(row), change.cols(col)
    return rows * (cols.mean() / total), cols * (factored.mean(rows, layout) / total)
