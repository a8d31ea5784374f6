"""The verbs in which optimizers are written; each acts on a bucket of same-shape matrices.

    refresh         P <- basis of the gradient, where it is due
    project         R = A P
    inner           N = rule(R)
    project_back_   W <- (1 - lr wd) W - lr scale N P^T

None of them synchronises with the device outside a refresh, nor allocates more than the bucket's R and N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels import random
from . import linalg
from .apply import count_step, rates, run_rule
from .bucket import Bucket
from .carry import carry_moments
from .projector import PROJECTORS, Request, official_svd
from .rules import Work


def refresh(b: Bucket, *, once: bool = False) -> None:
    """Find a new basis for every matrix whose interval is over; `once` finds the first one only.

    A gradient that is zero or not finite says nothing about the subspace: the old basis stays (a random one is made
    if there is none), `skipped_refreshes` counts it, and the refresh is tried again in the next step.
    """
    for index, held in enumerate(b.states):
        if held["until_refresh"].item() > 0 or b.ready[index] is not None:
            continue  # not due, or no full gradient to learn from
        low, high = torch.aminmax(b.grads[index])  # an order of magnitude faster than the maximum norm
        scale = torch.maximum(-low, high).to(b.dtype)  # max|A|
        if scale.isfinite() and scale >= torch.finfo(b.dtype).tiny:
            _renew(b, index, scale)
            if once:
                held["until_refresh"].fill_(math.inf)
        else:
            _skip(b, index)


def _renew(b: Bucket, index: int, scale: Tensor) -> None:
    held, hyper = b.states[index], b.hyper
    done = int(held["refreshes"])
    matrix = b.matrix(index)
    request = Request(
        matrix=matrix.float() if matrix.dtype == torch.float16 else matrix,
        scale=scale,
        view=b.view,
        layout=b.layout,
        seed=random.mix(hyper.seed, b.positions[index], done),
        old=held["basis"] if done else None,
    )
    projector = official_svd if hyper.official and hyper.projector == "svd" else PROJECTORS[hyper.projector]
    bases = projector(request)
    if done:
        carry_moments(b, held, bases)
    held["basis"].copy_(bases.basis)
    if bases.left is not None:
        held["basis_left"].copy_(bases.left)
    b.ready[index] = bases.image
    held["refreshes"] += 1
    early = b.offsets[index] if done == 0 and hyper.stagger else 0
    held["until_refresh"].fill_(hyper.update_proj_gap - early)


def _skip(b: Bucket, index: int) -> None:
    held = b.states[index]
    held["skipped_refreshes"] += 1
    if int(held["refreshes"]) == 0:
        for name in b.view.basis_shapes:
            seed = random.mix(b.hyper.seed, b.positions[index], len(name))
            rows, cols = held[name].shape
            held[name].copy_(linalg.orthonormal(random.normal(seed, rows, cols, held[name].device)))


def project(b: Bucket) -> Tensor:
    """Return the low-rank gradients R = A P as one buffer (k, a, r) in the working dtype.

    A matrix whose R is not finite counts as having a zero gradient, so that one bad batch cannot poison its moments.
    """
    view, gemm = b.view, b.gemm_dtype
    low = torch.empty((len(b.params), *view.low_shape), dtype=b.dtype, device=b.params[0].device)
    for index, held in enumerate(b.states):
        ready = b.ready[index]
        if ready is not None:
            low[index].copy_(ready)
            b.ready[index] = None
        elif gemm == b.dtype and not view.full:
            torch.mm(b.matrix(index).to(gemm), held["basis"].to(gemm), out=low[index])
        else:
            matrix = b.matrix(index).to(gemm)
            if view.full:
                matrix = held["basis_left"].to(gemm).T @ matrix  # (r, b)
            low[index].copy_(matrix @ held["basis"].to(gemm))
    low = b.layout.sum_cols(low)
    if b.hyper.maximize:
        low.neg_()
    _silence_non_finite_(low)
    return low


def _silence_non_finite_(low: Tensor) -> None:
    """Zero every matrix (k, a, r) that has a non-finite entry, or whose square overflows."""
    norms = torch.linalg.vector_norm(low, dim=(1, 2))
    if low.device.type == "cpu":
        for index, norm in enumerate(norms.tolist()):
            if not math.isfinite(norm):
                low[index].zero_()
    else:  # asking would synchronise
        low.masked_fill_(~norms.isfinite()[:, None, None], 0.0)


def inner(b: Bucket, low: Tensor) -> Tensor:
    """Run the inner rule on R (k, a, r) and return the directions N (k, a, r)."""
    step = torch.empty_like(low)
    torch._foreach_sub_([held["until_refresh"] for held in b.states], 1)
    counts = count_step(b)
    work = Work(low.unbind(), b.states, counts, b.params, step.unbind())
    run_rule(b, work, list(zip(b.positions, counts, strict=True)))
    return step


def project_back_(b: Bucket, step: Tensor, rows: Tensor | None = None) -> None:
    """Move the weights, `W <- (1 - lr wd) W - lr scale (N P^T + s o A)`: one GEMM a matrix, W in place.

    Args:
        b: The bucket.
        step: N (k, a, r).
        rows: s, factors of the rows of the gradient, (k, a) or (k, 1); None leaves the last term out.
    """
    view, gemm = b.view, b.gemm_dtype
    for index, (param, held) in enumerate(zip(b.params, b.states, strict=True)):
        lr, decay = rates(b, index)
        direction, rate = step[index], lr
        if isinstance(lr, Tensor):
            direction, lr = direction * lr, 1.0
        direction, basis = direction.to(gemm), held["basis"].to(gemm)
        if view.full:
            direction = held["basis_left"].to(gemm) @ direction  # (a, r)
        factors = (basis, direction.T) if view.transposed else (direction, basis.T)
        weight = param.detach().reshape(view.m, view.n)
        _addmm_(weight, factors, decay, -lr * b.hyper.scale)
        if rows is not None:
            _add_rows_(b, index, weight, rows[index] * rate)
        if weight.data_ptr() != param.data_ptr():  # a weight that cannot be viewed as a matrix, channels-last say
            param.copy_(weight.view_as(param))


def _add_rows_(b: Bucket, index: int, weight: Tensor, rows: Tensor) -> None:
    """`W <- W - scale s o A`, A of either sign; rows of zeros leave W alone even where A is not finite."""
    matrix = b.matrix(index)
    if weight.device.type != "cpu":
        matrix = torch.where(rows[:, None] == 0, 0.0, matrix)
    elif not rows.any():
        return
    scale = -b.hyper.scale if b.hyper.maximize else b.hyper.scale
    oriented = weight.T if b.view.transposed else weight
    oriented.addcmul_(rows[:, None].to(weight.dtype), matrix, value=-scale)


def _addmm_(weight: Tensor, factors: tuple[Tensor, Tensor], decay: float | Tensor, alpha: float) -> None:
    """`W <- decay W + alpha X Y`."""
    if isinstance(decay, Tensor):
        weight.mul_(decay)
        decay = 1.0
    if factors[0].dtype == weight.dtype:
        weight.addmm_(*factors, beta=decay, alpha=alpha)
    else:
        weight.mul_(decay).add_(factors[0] @ factors[1], alpha=alpha)
