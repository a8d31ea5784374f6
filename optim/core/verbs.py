"""The verbs in which optimizers are written; each acts on a bucket of same-shape matrices.

    refresh         P <- basis of the gradient, where it is due
    project         R = A P
    inner           N = rule(R)
    project_back_   W <- (1 - lr wd) W - lr scale N P^T
    follow          P <- moved after the step, by projectors that do so

None of them synchronises with the device outside a refresh, nor allocates more than the bucket's R and N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .apply import count_step, rates, run_rule
from .basis import Step
from .bucket import Bucket
from .refresh import follow, refresh
from .rules import Work
from .state import AGE
from .tiles import tiles

__all__ = ["follow", "inner", "project", "project_back_", "refresh"]


def project(b: Bucket) -> Tensor:
    """Return the low-rank gradients R = A P as one buffer (k, a, r) in the working dtype.

    A matrix whose R is not finite counts as having a zero gradient, so that one bad batch cannot poison its moments.
    """
    low = torch.empty((len(b.params), *b.view.low_shape), dtype=b.dtype, device=b.params[0].device)
    for index, held in enumerate(b.states):
        known = b.projected[index] if b.ready[index] is None else b.ready[index]
        if known is None:
            b.basis.project(b.matrix(index), held, b.gemm_dtype, low[index])
        else:
            low[index].copy_(known)
            b.projected[index] = None
    low = b.layout.sum_cols(low)
    if b.hyper.maximize:
        low.neg_()
    b.usable[:] = _silence_non_finite_(low).unbind()
    return low


def _silence_non_finite_(low: Tensor) -> Tensor:
    """Zero every matrix (k, a, r) that has a non-finite entry, or whose square overflows; tell which are sound (k,)."""
    norms = torch.linalg.vector_norm(low, dim=(1, 2))
    if low.device.type == "cpu":
        for index, norm in enumerate(norms.tolist()):
            if not math.isfinite(norm):
                low[index].zero_()
    else:  # asking would synchronise
        low.masked_fill_(~norms.isfinite()[:, None, None], 0.0)
    finite: Tensor = norms.isfinite()
    return finite


def inner(b: Bucket, low: Tensor) -> Tensor:
    """Run the inner rule on R (k, a, r) and return the directions N (k, a, r)."""
    step = torch.empty_like(low)
    torch._foreach_sub_([held["until_refresh"] for held in b.states], 1)
    counts = count_step(b)
    ages = [held[AGE].add_(1) for held in b.states] if b.hyper.counts_coordinates else None
    work = Work(low.unbind(), b.states, counts, b.params, step.unbind(), ages)
    run_rule(b, work, list(zip(b.positions, counts, strict=True)))
    return step


def project_back_(b: Bucket, step: Tensor | None, rows: Tensor | None = None) -> None:
    """Move the weights, `W <- (1 - lr wd) W - lr scale (N P^T + s o A)`: one GEMM a matrix, W in place.

    Args:
        b: The bucket.
        step: N (k, a, r); None leaves the first term out.
        rows: s, factors of the rows of the gradient, (k, a) or (k, 1); None leaves the last term out.
    """
    for index, (weight, held) in enumerate(zip(b.weights(), b.states, strict=True)):
        lr, decay = rates(b, index)
        if step is None:
            weight.mul_(decay)
        else:
            direction, rate = (step[index] * lr, 1.0) if isinstance(lr, Tensor) else (step[index], lr)
            b.basis.project_back_(weight, direction, held, Step(decay, -rate * b.hyper.scale, b.gemm_dtype))
        if rows is not None:
            _add_rows_(b, index, weight, rows[index] * lr)


def _add_rows_(b: Bucket, index: int, oriented: Tensor, rows: Tensor) -> None:
    """`W <- W - scale s o A`, A of either sign; rows of zeros leave W alone even where A is not finite."""
    matrix, on_cpu = b.matrix(index), oriented.device.type == "cpu"
    if on_cpu and not rows.any():
        return
    scale = -b.hyper.scale if b.hyper.maximize else b.hyper.scale
    if on_cpu and oriented.dtype == rows.dtype:
        oriented.addcmul_(rows[:, None], matrix, value=-scale)
        return
    for row, col in tiles(oriented):
        factor, tile = rows[row, None], oriented[row, col]
        piece = matrix[row, col].to(rows.dtype)
        piece = piece if on_cpu else torch.where(factor == 0, 0.0, piece)  # asking would synchronise
        tile.copy_(tile.to(rows.dtype).addcmul_(factor, piece, value=-scale))
