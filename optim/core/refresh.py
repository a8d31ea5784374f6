"""When and how the basis of a matrix changes: found anew before the projection, or moved after the step."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import random
from . import linalg
from .basis import DENSE, Bases, State
from .bucket import Bucket
from .carry import carry_moments
from .descend import descend_
from .projector import Request, official_svd, own_piece
from .state import INTERVAL

LAZIEST = 16
"""Largest multiple of `update_proj_gap` to which a lazy interval grows."""


def refresh(b: Bucket) -> None:
    """Find a new basis for every matrix whose interval is over; a projector that follows only needs a first one.

    A gradient that is zero or not finite says nothing about the subspace: the old basis stays (an arbitrary one is
    made if there is none), `skipped_refreshes` counts it, and the refresh is tried again in the next step.
    """
    due = []
    for index, held in enumerate(b.states):
        if held["until_refresh"].item() > 0 or b.ready[index] is not None:
            continue  # not due, or no full gradient to learn from
        if b.hyper.chooses.follows and held["refreshes"].item() > 0:
            continue
        scale = b.layout.max_all(_largest(b.grads[index]).to(b.dtype))  # max|A|
        if scale.isfinite() and scale >= torch.finfo(b.dtype).tiny:
            due.append((index, scale))
        else:
            _skip(b, index)
    if b.layout.replicas is not None and b.hyper.chooses.searches:
        _deal(b, due)
        return
    for index, scale in due:
        _take(b, index, _find(b, index, scale))


def _deal(b: Bucket, due: list[tuple[int, Tensor]]) -> None:
    """Find every basis on one of the replicas, in turns, and send it to the others: the same bits everywhere."""
    group = b.layout.replicas
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    found = {index: _find(b, index, scale) for turn, (index, scale) in enumerate(due) if turn % world == rank}
    for turn, (index, scale) in enumerate(due):
        shapes = b.view.basis_shapes.values()
        bases = found.get(index) or Bases(*(scale.new_empty(shape) for shape in shapes))
        sent = [part.to(scale.dtype).contiguous() for part in bases[:2] if part is not None]
        for part in sent:
            dist.broadcast(part, group=group, group_src=turn % world)
        _take(b, index, Bases(*sent))


def _largest(grad: Tensor) -> Tensor:
    if not grad.numel():  # an empty piece
        return grad.new_zeros(())
    low, high = torch.aminmax(grad)  # an order of magnitude faster than the maximum norm
    largest = torch.maximum(-low, high)
    return torch.where(largest.isnan(), torch.inf, largest)  # which survives the maximum over pieces


def follow(b: Bucket, low: Tensor) -> None:
    """Move the bases of projectors that follow: "descend" in every step, "track" where the interval is over.

    Args:
        b: The bucket, whose weights have moved already.
        low: R (k, a, r) of this step.
    """
    if not b.hyper.chooses.follows:
        return
    low = b.layout.gather(low, b.view.a)
    if b.hyper.projector == "descend":
        descend_(b, low)
        return
    for index, held in enumerate(b.states):
        if b.ready[index] is None and held["until_refresh"].item() <= 0:
            _track(b, index, low[index])


def _find(b: Bucket, index: int, scale: Tensor) -> Bases:
    held, hyper = b.states[index], b.hyper
    done = int(held["refreshes"])
    request = Request(
        matrix=_wide(b.matrix(index)),
        scale=scale,
        view=b.view,
        whole=b.whole,
        layout=b.layout,
        seed=random.mix(hyper.seed, b.positions[index], done),
        old=_old(b, held) if done else None,
        hyper=hyper,
        done=done,
    )
    find = official_svd if hyper.official and hyper.projector == "svd" else hyper.chooses.find
    return find(request)


def _take(b: Bucket, index: int, bases: Bases) -> None:
    """Take a basis over that was found in this step."""
    _adopt(b, index, bases)
    hyper = b.hyper
    known = hyper.basis_dtype is None and not b.layout.cols  # rounding turns the basis; sums over columns come later
    b.projected[index] = bases.image if known else None
    b.fresh[index] = True


def _track(b: Bucket, index: int, low: Tensor) -> None:
    """One power step that reuses R, `P <- qr(A^T R)`, for the steps to come: one product more than other steps.

    Follows a drifting subspace at short intervals (`update_proj_gap=10`), where a cheap step often keeps more of the
    gradient's energy than an exact basis now and then (arXiv 2410.16103 does so in every step).
    """
    matrix, held = _wide(b.matrix(index)), b.states[index]
    image = _image(b, matrix, DENSE.read(held, b.dtype)) if b.view.full else low  # A P (a, r)
    scale = b.layout.max_all(_largest(image))
    adjoint = b.layout.sum_rows(linalg.product(matrix.T, image / scale))
    largest = b.layout.max_cols(_largest(adjoint))
    if not (scale.isfinite() and largest.isfinite() and scale >= torch.finfo(b.dtype).tiny):
        held["skipped_refreshes"] += 1
        return
    first = b.layout.projected(b.view).start
    basis = linalg.orthonormal(adjoint / torch.where(largest > 0, largest, 1.0), b.layout, first)
    left = None
    if b.view.full:
        start = b.layout.kept(b.view).start
        left = linalg.orthonormal(_image(b, matrix, basis) / scale, b.layout.flipped, start)
    _adopt(b, index, Bases(basis, left))


def _image(b: Bucket, matrix: Tensor, basis: Tensor) -> Tensor:
    return b.layout.sum_cols(linalg.product(matrix, basis))


def _old(b: Bucket, held: State) -> Tensor:
    """The basis in use as it is stored, or decoded."""
    return held["basis"] if b.hyper.basis_dtype is None else DENSE.read(held, b.dtype)


def _wide(matrix: Tensor) -> Tensor:
    """A gradient in a dtype whose range holds sums of its products."""
    return matrix.float() if matrix.dtype == torch.float16 else matrix


def _adopt(b: Bucket, index: int, new: Bases) -> None:
    """Carry the moments over to a new basis, store it, and set the next refresh."""
    held, hyper = b.states[index], b.hyper
    interval: float = hyper.update_proj_gap
    if held["refreshes"] > 0:
        change = b.basis.change(held, new, b.layout)
        carry_moments(b, index, change)
        if hyper.lazy is not None and change.overlap() >= hyper.lazy:
            interval = min(2 * max(float(held[INTERVAL]), interval), LAZIEST * interval)
    elif hyper.stagger:
        interval -= b.offsets[index]
    b.basis.store(held, new, b.layout)
    held["refreshes"] += 1
    if hyper.lazy is not None:
        held[INTERVAL].fill_(interval)
    held["until_refresh"].fill_(math.inf if hyper.projector == "descend" else interval)


def _skip(b: Bucket, index: int) -> None:
    held = b.states[index]
    held["skipped_refreshes"] += 1
    if int(held["refreshes"]) == 0:
        seed = random.mix(b.hyper.seed, b.positions[index])
        found = b.basis.arbitrary(b.whole, seed, b.params[index].device)
        b.basis.store(held, own_piece(found, b.view, b.layout), b.layout)
