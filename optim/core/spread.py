"""Bases whose rows are spread over many ranks: whole for the time of a step, one bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .bucket import Bucket


@contextmanager
def whole_bases(b: Bucket) -> Iterator[None]:
    """Gather the bases of a bucket, and keep this rank's rows of what became of them."""
    shares = [held["basis"] for held in b.states if "basis" in held] if b.layout.spread else []
    if not shares or shares[0].ndim != 2 or b.hyper.projector == "descend":
        yield  # replicated: indices, bases that move in every step, none at all
        return
    mine, rows = b.layout.own_basis(b.whole.b), b.whole.b
    whole = b.layout.gather_bases(torch.stack(shares), rows)
    for held, basis in zip(b.states, whole, strict=True):
        held["basis"] = basis
    try:
        yield
    finally:
        for held, basis, share in zip(b.states, whole, shares, strict=True):
            share.copy_(basis[mine])
            held["basis"] = share
