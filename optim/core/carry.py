"""What becomes of the moments when the basis changes."""

from __future__ import annotations

from torch import Tensor

from . import codec
from .bucket import Bucket, State
from .projector import Bases


def carry_moments(b: Bucket, held: State, new: Bases) -> None:
    """Take the moments of one matrix along to its new bases, as the group's `carry` says.

    keep     M and V keep their numbers, which then refer to other directions
    reset    M = 0, V = 0, and bias correction starts again
    rotate   the same moments in the new coordinates, with C = P_new^T P_old:
             M <- M C^T,  V <- V (C o C)^T  (coordinates taken as uncorrelated)
    """
    names = list(b.rule.buffers(b.view.low_shape, b.hyper))
    if b.hyper.carry == "reset":
        for name in [*names, "step"]:
            held[name].zero_()
    if b.hyper.carry != "rotate":
        return
    dtype = new.basis.dtype
    turn = new.basis.T @ held["basis"].to(dtype)  # (r, r)
    turn_left = None if new.left is None else new.left.T @ held["basis_left"].to(dtype)
    moments = {name: codec.load(held[name], dtype) for name in names}
    for name in b.rule.linear:
        if name in moments:
            held[name].copy_(rotate(moments[name], turn, turn_left))
    turn, turn_left = turn.square(), None if turn_left is None else turn_left.square()
    if "exp_avg_sq" in moments:
        held["exp_avg_sq"].copy_(rotate(moments["exp_avg_sq"], turn, turn_left))
    if "exp_avg_sq_row" in moments:
        row, col = rotate_factored(moments["exp_avg_sq_row"], moments["exp_avg_sq_col"], turn, turn_left)
        held["exp_avg_sq_row"].copy_(row)
        held["exp_avg_sq_col"].copy_(col)


def rotate(moment: Tensor, turn: Tensor, turn_left: Tensor | None = None) -> Tensor:
    """`M C^T`, and `C_left M C^T` for a matrix that is projected from both sides."""
    turned = moment @ turn.T
    return turned if turn_left is None else turn_left @ turned


def rotate_factored(row: Tensor, col: Tensor, turn: Tensor, turn_left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row and column means of the rotated `V = R C^T / mean(R)`, without V; zero stays zero."""
    total = row.mean().clamp_min(1e-38)
    rows = row if turn_left is None else turn_left @ row
    cols = turn @ col
    return rows * (cols.mean() / total), cols * (rows.mean() / total)
