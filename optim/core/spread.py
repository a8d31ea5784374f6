"""Bases of which every rank keeps a share (`shard_basis`): gathered for the time of a step, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import entries
from .bucket import Bucket
from .flat import Flat


@contextmanager
def whole_bases(b: Bucket) -> Iterator[None]:
    """Put whole bases into the states of a bucket; at the end store this rank's share of them, changed or not."""
    shares = [held["basis"] for held in b.states if "basis" in held]
    whole, mine = _gathered(b, shares) if shares else (shares, slice(0))
    if whole is shares:
        yield
        return
    for held, basis in zip(b.states, whole, strict=True):
        held["basis"] = basis
    try:
        yield
    finally:
        for held, basis, share in zip(b.states, whole, shares, strict=True):
            share.copy_(basis[mine])
            held["basis"] = share


def _gathered(b: Bucket, shares: list[Tensor]) -> tuple[Sequence[Tensor], slice]:
    """Whole bases, and which part of them is this rank's; returns `shares` itself if they are whole already."""
    layout = b.layout
    if isinstance(layout, Flat):
        return entries.collect(shares, layout.count, layout), entries.share(layout.count, layout)
    if not layout.spread or shares[0].ndim != 2 or b.hyper.projector == "descend":
        return shares, slice(0)  # every rank has all: indices, stacks of bases, bases that move in every step
    whole = layout.gather_bases(torch.stack(shares), b.whole.b)
    return whole.unbind(), layout.own_basis(b.whole.b)
