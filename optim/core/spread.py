"""Bases that are spread over ranks: whole for the time of a step, one bucket at a time."""

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
    """Gather the bases of a bucket, and keep this rank's rows of what became of them."""
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
    """Whole bases, and which part of them is this rank's; the shares themselves where they are whole."""
    layout = b.layout
    if isinstance(layout, Flat):
        return entries.collect(shares, layout.count, layout), entries.share(layout.count, layout)
    if not layout.spread or shares[0].ndim != 2 or b.hyper.projector == "descend":
        return shares, slice(0)  # replicated: indices, bases that move in every step
    whole = layout.gather_bases(torch.stack(shares), b.whole.b)
    return whole.unbind(), layout.own_basis(b.whole.b)
