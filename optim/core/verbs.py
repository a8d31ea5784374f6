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

from ...kernels.reference import Move, Scaled, Signed
from ...kernels.rounding import Target
from . import sides
from .apply import count_step, rates, run_rule
from .basis import Step
from .bucket import Bucket
from .refresh import follow, refresh
from .rules import Work
from .state import AGE

__all__ = ["follow", "inner", "project", "project_back_", "refresh"]


def project(b: Bucket) -> Tensor:
    """Return the low-rank gradients R = A P as one buffer (k, a, r) in the working dtype.

    A matrix whose R is not finite counts as having a zero gradient, so that one bad batch cannot poison its moments; of
    a sharded one every rank judges its own rows, for asking the others would cost a collective a step.
    """
    low = torch.empty((len(b.params), *b.view.low_shape), dtype=b.dtype, device=b.params[0].device)
    for index, held in enumerate(b.states):
        known = b.projected[index] if b.ready[index] is None else b.ready[index]
        if known is None:
            b.basis.project(b.matrix(index), held, b.gemm_dtype, low[index], b.mine)
        else:
            low[index].copy_(known)
            b.projected[index] = None
    low = b.layout.reduce(low)
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
    lies = {"layout": sides.low(b.layout, b.whole), "weighs": b.layout}
    work = Work(low.unbind(), b.states, counts, b.params, step.unbind(), ages, **lies)
    run_rule(b, work, list(zip(b.positions, counts, strict=True)))
    return step


def project_back_(b: Bucket, step: Tensor | None, rows: Tensor | None = None) -> None:
    """Move the weights, `W <- (1 - lr wd) W - lr scale (N P^T + s o A)`: one GEMM a matrix, W in place.

    Args:
        b: The bucket.
        step: N (k, a, r); None leaves the first term out.
        rows: s, factors of the rows of the gradient, (k, a) or (k, 1); None leaves the last term out.
    """
    step, rows = gathered(b, step, rows)
    for index, target in enumerate(b.targets()):
        residual = None if rows is None else scaled_rows(b, index, rows[index])
        move_back_(b, index, target, None if step is None else step[index], residual)


def gathered(b: Bucket, step: Tensor | None, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """All rows of N and of s, where they were dealt out with those of R: one collective."""
    if not b.layout.dealt:
        return step, rows
    count = b.layout.own(b.view.a)
    parts = [] if step is None else [step]
    if rows is not None:
        parts.append(rows.expand(-1, count)[..., None])
    whole = b.layout.gather(torch.cat(parts, dim=2), b.view.a)
    split = whole.shape[2] - (rows is not None)
    return (None if step is None else whole[..., :split]), (None if rows is None else whole[..., -1])


def scaled_rows(b: Bucket, index: int, rows: Tensor) -> Scaled:
    """`s o A` for factors s (a,) or (1,), in the order of the weight's memory."""
    signed = -rows if b.hyper.maximize else rows
    return Scaled(b.natural(index), signed[None, :] if b.view.transposed else signed[:, None])


def move_back_(
    b: Bucket, index: int, target: Target, step: Tensor | None, residual: Scaled | Signed | None = None
) -> None:
    """`W <- (1 - lr wd) W - lr scale (N P^T + residual)` for one weight."""
    lr, decay = rates(b, index)
    move = Step(Move(decay, -lr * b.hyper.scale, b.gemm_dtype, residual), b.view.transposed, b.hyper.backend, b.mine)
    if step is None:
        move.rest(target)
    else:
        b.basis.project_back_(target, step, b.states[index], move)
