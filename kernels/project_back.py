"""Moving weights on any device with torch's operations: products in place, or tile by tile and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from .reference import Move, Scaled, Signed, residual
from .rounding import Target
from .tiles import chunk, tiles


def project_back_(target: Target, left: Tensor | None, right: Tensor | None, move: Move) -> None:
    """Compute `lowmem.kernels.reference.project_back_` without a temporary of the weight's size."""
    products = [] if left is None or right is None else [left, right]
    left, right = (factor.to(move.gemm) for factor in products) if products else (None, None)
    if isinstance(move.residual, Scaled) and _all_zero(move.residual):
        move = move._replace(residual=None)
    same = left is None or left.dtype == target.weight.dtype
    fused = left is not None and move.residual is None and not isinstance(move.decay, Tensor)
    once = target.exact or (target.mode == "nearest" and fused)
    if same and once and not isinstance(move.residual, Signed):
        _in_place_(target.weight, left, right, move)
        return
    if isinstance(move.residual, Signed):
        move = move._replace(residual=_narrow(move.residual, move.gemm))
    if left is not None and right is not None and _in_bf16(target, move):
        _in_steps_(target.weight, left, right, move)
        return
    for rows, cols in tiles(target.weight):
        part = target.part(rows, cols)
        value = part.edit(move.decay)
        if left is not None and right is not None:
            _add_(value, (left[rows] @ right[cols].T).to(part.work), move.alpha)
        _add_residual_(value, piece(move.residual, rows, cols), move)
        part.write(value)


def _in_bf16(target: Target, move: Move) -> bool:
    """Whether a step may be made in bf16, as the factors of its product are, and added to the weight in one pass."""
    weight, rest = target.weight, move.residual
    if weight.device.type != "cpu" or rest is None or target.mode != "nearest":
        return False
    narrow = weight.dtype == rest.grad.dtype == move.gemm == torch.bfloat16
    sound = isinstance(rest, Scaled) or bool(rest.sound)
    return narrow and sound and (weight.is_contiguous() or weight.T.is_contiguous())


def _in_steps_(weight: Tensor, left: Tensor, right: Tensor, move: Move) -> None:
    """`S <- L R^T + residual` in bf16, `W <- decay W + alpha S` rounded once, for W (m, n) of either memory order.

    Torch has that pass as `W + alpha S`, and with a decay as `lerp(W, S', 1 - decay)`, S' = `alpha / (1 - decay) S`: in
    fp32 there would be conversions of W, of S and of W back around it.
    """
    if not weight.is_contiguous():
        _in_steps_(weight.T, right, left, move._replace(residual=_transposed(move.residual)))
        return
    alpha, share = float(move.alpha), 1.0 - float(move.decay)
    scale = alpha / share if share else 1.0
    for rows, cols in tiles(weight, 2 * chunk(weight.device), even=True):  # as many bytes as those in fp32
        part, rest = weight[rows, cols], piece(move.residual, rows, cols)
        step, own = (_signs(rest, weight.dtype), rest.scale) if isinstance(rest, Signed) else (_scaled(rest), 1.0)
        step.addmm_(left[rows], right[cols].T, beta=scale * own, alpha=scale)
        if share:
            part.lerp_(step, share)
        else:
            part.add_(step, alpha=alpha)


def _scaled(rest: Scaled | None) -> Tensor:
    """`s o G` in the dtype of G."""
    assert rest is not None
    step = rest.grad * rest.factors.to(rest.grad.dtype)
    return step if _none_zero(rest) else step.masked_fill_(rest.factors == 0, 0.0)


def _add_(value: Tensor, step: Tensor, alpha: float | Tensor) -> None:
    if isinstance(alpha, Tensor):
        value.add_(step.mul_(alpha))
    else:
        value.add_(step, alpha=alpha)


def _add_residual_(value: Tensor, rest: Scaled | Signed | None, move: Move) -> None:
    """`V <- V + alpha residual`; on a CPU, where it can be asked, in few passes if nothing is silenced."""
    if rest is None:
        return
    if value.device.type != "cpu" or isinstance(move.alpha, Tensor):
        _add_(value, _whole(rest, value, move), move.alpha)
    elif isinstance(rest, Scaled) and _none_zero(rest):
        value.addcmul_(rest.grad.to(value.dtype), rest.factors.to(value.dtype), value=move.alpha)
    elif isinstance(rest, Signed) and rest.sound:
        value.add_(_signs(rest, value.dtype), alpha=move.alpha * rest.scale)
    else:
        value.add_(_whole(rest, value, move), alpha=move.alpha)


def _whole(rest: Scaled | Signed, value: Tensor, move: Move) -> Tensor:
    step = residual(rest, value.dtype, move.gemm)
    assert isinstance(step, Tensor)
    return step


def _signs(rest: Signed, dtype: torch.dtype) -> Tensor:
    """`sign(G - E F^T)`, zero where the difference is not above the floor; torch's shrinkage compares fastest."""
    grad, left, right, floor = rest.grad, rest.left, rest.right, rest.floor
    if left is None or right is None or floor is None:
        return grad.to(dtype).sign()  # in bf16 it would be slower
    if grad.dtype == left.dtype == torch.bfloat16:
        difference = torch.addmm(grad, left, right.T, alpha=-1.0).to(floor.dtype)
    else:
        difference = grad.to(floor.dtype) - (left @ right.T).to(floor.dtype)
    tiny = torch.finfo(floor.dtype).tiny
    return hardshrink(difference.div_(floor.clamp(min=tiny)), 1.0).sign_().to(dtype)


def _in_place_(weight: Tensor, left: Tensor | None, right: Tensor | None, move: Move) -> None:
    """`W <- decay W + alpha (L R^T + s o G)` for W (m, n) of either memory order."""
    decay, alpha = move.decay, move.alpha
    if isinstance(decay, Tensor) or left is None or right is None:
        if isinstance(decay, Tensor) or decay != 1.0:
            weight.mul_(decay)
        decay = 1.0
    if left is not None and right is not None:
        if isinstance(alpha, Tensor):
            left, factor = left * alpha, 1.0
        else:
            factor = alpha
        if weight.stride(-1) == 1:
            weight.addmm_(left, right.T, beta=decay, alpha=factor)
        else:
            weight.T.addmm_(right, left.T, beta=decay, alpha=factor)
    rest = move.residual
    if isinstance(rest, Scaled):
        _add_scaled_(weight, rest, alpha)


def _add_scaled_(weight: Tensor, rest: Scaled, alpha: float | Tensor) -> None:
    """`W <- W + alpha s o G`, on a CPU without a temporary."""
    if rest.grad.dtype == weight.dtype and _none_zero(rest):
        factors = rest.factors * alpha if isinstance(alpha, Tensor) else rest.factors
        weight.addcmul_(factors, rest.grad, value=1.0 if isinstance(alpha, Tensor) else alpha)
        return
    for rows, cols in tiles(weight):
        scaled = residual(piece(rest, rows, cols), weight.dtype, weight.dtype)
        weight[rows, cols].add_(scaled * alpha)


def _all_zero(rest: Scaled) -> bool:
    """Whether all factors are zero, which on a CPU can be asked."""
    return rest.factors.device.type == "cpu" and not rest.factors.any()


def _none_zero(rest: Scaled) -> bool:
    """Whether no factor is zero: none needs to keep an infinite gradient out."""
    return rest.factors.device.type == "cpu" and bool(rest.factors.all())


def _narrow(rest: Signed, gemm: torch.dtype) -> Signed:
    if rest.left is None or rest.right is None:
        return rest
    return rest._replace(left=rest.left.to(gemm), right=rest.right.to(gemm))


def piece(rest: Scaled | Signed | None, rows: slice, cols: slice) -> Scaled | Signed | None:
    """The residual of some rows and columns."""
    if rest is None:
        return None
    grad = rest.grad[rows, cols]
    if isinstance(rest, Scaled):
        return Scaled(grad, _broadcast(rest.factors, rows, cols))
    if rest.left is None or rest.right is None or rest.floor is None:
        return rest._replace(grad=grad)
    return rest._replace(
        grad=grad, left=rest.left[rows], right=rest.right[cols], floor=_broadcast(rest.floor, rows, cols)
    )


def _transposed(rest: Scaled | Signed | None) -> Scaled | Signed | None:
    """The residual of the transposed weight."""
    if rest is None or isinstance(rest, Scaled):
        return None if rest is None else Scaled(rest.grad.T, rest.factors.T)
    floor = None if rest.floor is None else rest.floor.T
    return rest._replace(grad=rest.grad.T, left=rest.right, right=rest.left, floor=floor)


def _broadcast(factors: Tensor, rows: slice, cols: slice) -> Tensor:
    """Some of (m, 1), (1, n) or (1, 1) factors."""
    return factors[rows if factors.shape[0] > 1 else slice(None), cols if factors.shape[1] > 1 else slice(None)]
