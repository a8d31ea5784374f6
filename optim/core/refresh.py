"""When and how the basis of a matrix changes: found anew before the projection, or moved after the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import random
from . import linalg
from .basis import DENSE, Bases, State
from .bucket import Bucket
from .carry import carry_moments
from .change import Change
from .descend import descend_
from .magnitude import largest
from .projector import Request, official_svd, own_piece
from .state import INTERVAL
from .together import reduced, stacked

LAZIEST = 16
"""Largest multiple of `update_proj_gap` to which a lazy interval grows."""

BATCH = 1 << 24
"""Elements of the bases, or of A P, that are searched together: a GPU factors many matrices in little more time than
one, and matrices that are sharded share collectives."""
CPU_BATCH = 0
"""The same on a single CPU, where nothing is gained: one matrix at a time."""


def refresh(b: Bucket) -> None:
    """Find a new basis for every matrix whose interval is over; a projector that follows only needs a first one.

    A gradient that is zero or not finite says nothing about the subspace: the old basis stays (an arbitrary one is
    made if there is none), `skipped_refreshes` counts it, and the refresh is tried again in the next step.
    """
    due = [index for index, held in enumerate(b.states) if b.ready[index] is None and _is_due(b, held)]
    if not due:  # a matrix whose gradient arrived projected has none to find a basis from
        return
    scales = b.layout.max_all(torch.stack([largest(b.grads[index]).to(b.dtype) for index in due]))  # max|A|
    tells = [torch.finfo(b.dtype).tiny <= value < math.inf for value in scales.cpu().tolist()]
    _skip(b, [index for index, told in zip(due, tells, strict=True) if not told])
    chosen = {index: scale for index, scale, told in zip(due, scales, tells, strict=True) if told}
    shares = b.layout.replicas is not None and b.hyper.strategy.searches
    find, batches = (_shared, [list(chosen)]) if shares and chosen else (_find, _batches(b, list(chosen)))
    # The search has A P at hand. It is R only if the basis is stored as it was found, and if R is not summed later.
    exact = b.hyper.basis_dtype is None and not b.layout.cols
    for batch in batches:
        found = find(b, batch, [chosen[index] for index in batch])
        _adopt(b, batch, found)
        for index, bases in zip(batch, found, strict=True):
            b.fresh[index] = True
            b.projected[index] = bases.image if exact else None


def _is_due(b: Bucket, held: State) -> bool:
    return held["until_refresh"].item() <= 0 and not (b.hyper.strategy.follows and held["refreshes"].item() > 0)


def _batches(b: Bucket, indices: list[int]) -> Iterator[list[int]]:
    """Cut into batches whose bases are found together, the same ones on every rank."""
    budget = CPU_BATCH if b.layout.alone and b.params[0].device.type == "cpu" else BATCH
    size = max(1, budget // max(1, max(b.plan.piece) * b.view.rank))
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def follow(b: Bucket, low: Tensor) -> None:
    """Move the bases of projectors that follow: "descend" in every step, "track" where the interval is over.

    Args:
        b: The bucket, whose weights have moved already.
        low: R (k, a, r) of this step.
    """
    if not b.hyper.strategy.follows:
        return
    low = b.layout.gather(low, b.view.a)
    if b.hyper.projector == "descend":
        descend_(b, low)
        return
    due = [i for i, held in enumerate(b.states) if b.ready[i] is None and held["until_refresh"].item() <= 0]
    for batch in _batches(b, due):
        _track(b, batch, low)


def _find(b: Bucket, batch: list[int], scales: list[Tensor]) -> list[Bases]:
    """Find the bases of some matrices."""
    requests = [_request(b, index, scale) for index, scale in zip(batch, scales, strict=True)]
    if b.hyper.official and b.hyper.projector == "svd":
        return [official_svd(request) for request in requests]
    return b.hyper.strategy.find(requests)


def _request(b: Bucket, index: int, scale: Tensor) -> Request:
    held, hyper = b.states[index], b.hyper
    done = int(held["refreshes"])
    return Request(
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


def _shared(b: Bucket, batch: list[int], scales: list[Tensor]) -> list[Bases]:
    """Find every basis on one of the replicas, in turns, and send it to the others: the same bits everywhere."""
    group = b.layout.replicas
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    owners: dict[int, list[int]] = {}
    for place, index in enumerate(batch):
        owners.setdefault(b.positions[index] % world, []).append(place)
    found = {place: _find(b, [batch[place]], [scales[place]])[0] for place in owners.get(rank, [])}
    shapes = list(b.view.basis_shapes.values())
    sizes = [math.prod(shape) for shape in shapes]
    for owner, places in owners.items():
        sent = scales[0].new_empty(len(places), sum(sizes))
        for row, place in zip(sent, places, strict=True):
            if owner == rank:
                torch.cat([part.reshape(-1) for part in found[place][:2] if part is not None], out=row)
        dist.broadcast(sent, group=group, group_src=owner)
        for row, place in zip(sent, places, strict=True):
            parts = zip(torch.split(row, sizes), shapes, strict=True)
            found[place] = Bases(*(part.view(shape) for part, shape in parts))
    return [found[place] for place in range(len(batch))]


def _track(b: Bucket, batch: list[int], low: Tensor) -> None:
    """One power step that reuses R, `P <- qr(A^T R)`, for the steps to come: one product more than other steps.

    Follows a drifting subspace at short intervals (`update_proj_gap=10`), where a cheap step often keeps more of the
    gradient's energy than an exact basis now and then (arXiv 2410.16103 does so in every step).
    """
    layout, matrices = b.layout, [_wide(b.matrix(index)) for index in batch]
    images = [low[index] for index in batch]
    if b.view.full:
        images = _images(b, matrices, [DENSE.read(b.states[index], b.dtype) for index in batch])  # A P (a, r)
    scales = layout.max_all(torch.stack([largest(image) for image in images]))
    parts = zip(matrices, images, scales, strict=True)
    adjoints = reduced(layout.sum_rows, [linalg.product(matrix.T, image / scale) for matrix, image, scale in parts])
    tops = layout.max_cols(torch.stack([largest(adjoint) for adjoint in adjoints]))
    sound = scales.isfinite() & tops.isfinite() & (scales >= torch.finfo(b.dtype).tiny)
    tops = torch.where(tops > 0, tops, 1.0)
    moving = []
    for place, sees in enumerate(sound.cpu().tolist()):
        if sees:
            moving.append(place)
        else:
            b.states[batch[place]]["skipped_refreshes"] += 1
    if not moving:
        return
    scaled = stacked([adjoints[place] / tops[place] for place in moving])
    bases = linalg.orthonormal(scaled, layout, layout.projected(b.view).start)
    found = [Bases(basis) for basis in bases]
    if b.view.full:
        lows = _images(b, [matrices[place] for place in moving], bases)
        scaled = stacked([image / scales[place] for place, image in zip(moving, lows, strict=True)])
        left = linalg.orthonormal(scaled, layout.flipped, layout.kept(b.view).start)
        found = [Bases(*both) for both in zip(bases, left, strict=True)]
    _adopt(b, [batch[place] for place in moving], found)


def _images(b: Bucket, matrices: Sequence[Tensor], bases: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """`A P` (a, r) of every matrix."""
    pairs = zip(matrices, bases, strict=True)
    return reduced(b.layout.sum_cols, [linalg.product(matrix, basis) for matrix, basis in pairs])


def _old(b: Bucket, held: State) -> Tensor:
    """The basis in use as it is stored, or decoded."""
    return held["basis"] if b.hyper.basis_dtype is None else DENSE.read(held, b.dtype)


def _wide(matrix: Tensor) -> Tensor:
    """An fp16 gradient in fp32: sums of its products overflow fp16."""
    return matrix.float() if matrix.dtype == torch.float16 else matrix


def _adopt(b: Bucket, batch: list[int], found: list[Bases]) -> None:
    """Carry the moments over to new bases, store them, and set the next refreshes."""
    states = [b.states[index] for index in batch]
    later = [place for place, held in enumerate(states) if held["refreshes"] > 0]
    before = b.basis.changes([states[place] for place in later], [found[place] for place in later], b.layout)
    changes = {batch[place]: change for place, change in zip(later, before, strict=True)}
    carry_moments(b, changes)
    for index, held in zip(batch, states, strict=True):
        _schedule(b, held, b.offsets[index], changes.get(index))
    b.basis.store(states, found, b.layout)
    for held in states:
        held["refreshes"] += 1


def _schedule(b: Bucket, held: State, offset: int, change: Change | None) -> None:
    """Set the step of the next refresh: sooner where they are staggered, later where the subspace hardly moved."""
    hyper, interval = b.hyper, float(b.hyper.update_proj_gap)
    if change is None:
        interval -= offset if hyper.stagger else 0
    elif hyper.lazy is not None and change.overlap() >= hyper.lazy:
        interval = min(2 * max(float(held[INTERVAL]), interval), LAZIEST * interval)
    if hyper.lazy is not None:
        held[INTERVAL].fill_(interval)
    held["until_refresh"].fill_(math.inf if hyper.projector == "descend" else interval)


def _skip(b: Bucket, indices: list[int]) -> None:
    """Count refreshes whose gradient is zero or not finite; matrices without a basis yet get an arbitrary one."""
    new = []
    for index in indices:
        b.states[index]["skipped_refreshes"] += 1
        if int(b.states[index]["refreshes"]) == 0:
            new.append(index)
    found = []
    for index in new:
        seed = random.mix(b.hyper.seed, b.positions[index])
        whole = b.basis.arbitrary(b.whole, seed, b.params[index].device)
        found.append(own_piece(whole, b.view, b.layout))
    b.basis.store([b.states[index] for index in new], found, b.layout)
