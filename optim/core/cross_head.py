"""Cross-head projections (arXiv 2412.19820): the heads of a query or key weight share the basis of one of them.

    A = [A_1; ...; A_h]                               rows of the gradient in blocks, one a head     (h dk, d)
    P = r leading right singular vectors of A_i       i one head, chosen anew at every refresh       (d, r)
    R = A P                                                                                          (h dk, r)

A refresh searches a matrix dk x d in the place of h dk x d. Where r > dk, ceil(r / dk) heads are stacked. A fused
weight is described by ranges of its rows, each with heads and a basis of its own: `segments`.

Where the weight is sharded, the chosen heads are searched as a sharded weight of their own: every rank holds those of
their rows that it has anyway, perhaps none, and nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import random
from .basis import DENSE, Bases
from .together import reduced

if TYPE_CHECKING:
    from .projector import Find, Request

Heads = int | tuple[tuple[int, int | None], ...]
"""The heads of a weight, or the (rows, heads) of its ranges; None heads for a range without any."""

HEAD_SELECT = ("random", "first", "cycle", "max_norm")
"""Which heads lend their basis: seeded, the first, the next at every refresh, those of the largest gradient."""


def cross_head(search: Find, requests: Sequence[Request]) -> list[Bases]:
    """Find the basis of one head, or of one head in every range of a fused weight.

    Args:
        search: Finds the leading subspaces of the chosen heads.
        requests: Requests for the weights with all heads.
    """
    hyper, whole = requests[0].hyper, requests[0].whole
    if hyper is None or hyper.num_heads is None:
        raise TypeError("projector='cross_head' got no num_heads")
    if isinstance(heads := hyper.num_heads, int):
        return _of_heads(search, requests, range(whole.a), heads)
    found, first = [], 0
    for position, (rows, count) in enumerate(heads):
        own = [_of_range(request, position) for request in requests]
        found.append(_of_heads(search, own, range(first, first + rows), count or 1))
        first += rows
    stacks = [torch.stack([bases.basis for bases in ranges]) for ranges in zip(*found, strict=True)]
    return [Bases(bases) for bases in _all_rows(stacks, requests[0])]


def _of_range(request: Request, position: int) -> Request:
    """The request of a range of rows, by its number."""
    mine = request.layout.projected(request.view)
    old = None if request.old is None else request.old[position, mine.start : mine.stop]
    return replace(request, seed=random.mix(request.seed, position), old=old)


def _of_heads(search: Find, requests: Sequence[Request], rows: range, heads: int) -> list[Bases]:
    """Find bases for a range of rows in chosen heads whose gradient is not zero; without any keep the old basis."""
    size, dtype, layout = len(rows) // heads, requests[0].scale.dtype, requests[0].layout
    peaks = reduced(layout.max_all, [_by_head(request, rows, heads, "amax").to(dtype) for request in requests])
    found, blocks = [_kept(request) for request in requests], {}
    for index, order in enumerate(_orders(requests, rows, heads)):
        alive = (peaks[index] >= torch.finfo(dtype).tiny).tolist()
        chosen = sorted([head for head in order if alive[head]][: math.ceil(requests[index].view.rank / size)])
        if chosen:
            starts = [rows.start + head * size for head in chosen]
            blocks[index] = _stack(requests[index], starts, size, peaks[index][chosen].amax())
    if blocks:
        for index, bases in zip(blocks, search(list(blocks.values())), strict=True):
            found[index] = bases if heads == 1 else Bases(bases.basis)
    return found


def _stack(request: Request, starts: list[int], size: int, scale: Tensor) -> Request:
    """The request for the chosen heads alone, of whose rows this rank holds those that it has of the whole weight."""
    layout, kept = request.layout, request.layout.kept(request.view)
    parts: list[Tensor] = []
    first = 0
    for position, start in enumerate(starts):
        low, high = max(start, kept.start), min(start + size, kept.stop)
        if low < high:
            first = first if parts else position * size + low - start
            parts.append(request.matrix[low - kept.start : high - kept.start])
    matrix = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else request.matrix[:0]
    if layout.box is not None:
        layout = replace(layout, box=layout.box._replace(row=first, m=len(matrix)))
    return replace(
        request,
        matrix=matrix,
        scale=scale,
        view=replace(request.view, m=len(matrix)),
        whole=replace(request.whole, m=len(starts) * size),
        layout=layout,
    )


def _by_head(request: Request, rows: range, heads: int, how: str) -> Tensor:
    """The largest entry ("amax") or the squared norm ("sum") of every head (h,), of this rank's piece."""
    kept = request.layout.kept(request.view)
    low, high = max(rows.start, kept.start), max(rows.start, min(rows.stop, kept.stop))
    block = request.matrix[low - kept.start : high - kept.start] if low < high else request.matrix[:0]
    if how == "sum":
        of_rows = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square()
    elif block.numel():
        of_rows = torch.maximum(block.amax(1), -block.amin(1))
    else:  # an empty block has no largest entry
        of_rows = block.new_zeros(len(block))
    head = torch.arange(low, low + len(block), device=block.device).sub_(rows.start) // (len(rows) // heads)
    found: Tensor = of_rows.new_zeros(heads).scatter_reduce_(0, head, of_rows, how)
    return found


def _orders(requests: Sequence[Request], rows: range, heads: int) -> list[list[int]]:
    """All heads of every matrix, in the order in which they are taken."""
    if heads == 1:
        return [[0] for _ in requests]
    how = "first" if requests[0].hyper is None else requests[0].hyper.head_select
    if how == "max_norm":
        squares = reduced(requests[0].layout.sum_all, [_by_head(request, rows, heads, "sum") for request in requests])
        return [each.argsort(descending=True, stable=True).tolist() for each in squares]
    if how == "random":
        bits = (random.bits(random.mix(request.seed, 1), range(1), heads)[0] for request in requests)
        return [each.argsort().tolist() for each in bits]
    taken = math.ceil(requests[0].view.rank / (len(rows) // heads))
    firsts = (request.done * taken if how == "cycle" else 0 for request in requests)
    return [[(first + position) % heads for position in range(heads)] for first in firsts]


def _kept(request: Request) -> Bases:
    """The basis in use; where there is none this rank's rows of one from the seed."""
    if request.old is not None:
        return Bases(request.old)
    mine = request.layout.projected(request.view)
    found = DENSE.arbitrary(request.whole, request.seed, request.matrix.device).basis
    return Bases(found[mine.start : mine.stop].to(request.scale.dtype))


def _all_rows(bases: Sequence[Tensor], request: Request) -> list[Tensor]:
    """All rows of bases (s, b, r) where the projected side is sharded: each rank has its own, and they are reduced."""
    if not request.layout.cols:
        return list(bases)
    mine = request.layout.projected(request.view)
    wholes = [each.new_zeros(len(each), request.whole.b, each.shape[2]) for each in bases]
    for whole, each in zip(wholes, bases, strict=True):
        whole[:, mine.start : mine.stop] = each
    return reduced(request.layout.sum_cols, wholes)


def frozen(heads: Any) -> Heads | None:
    """The option `num_heads` as a hashable value."""
    if isinstance(heads, (list, tuple)):
        return tuple((rows, count) for rows, count in heads)
    return heads  # type: ignore[no-any-return]


def check_heads(group: Mapping[str, Any]) -> None:
    """Validate `num_heads` and `head_select` of a group.

    Raises:
        ValueError: They are out of range, or do not go with the projector or the rule.
    """
    heads, select = group.get("num_heads"), group.get("head_select", "random")
    if select not in HEAD_SELECT:
        raise ValueError(f"Invalid head_select: {select!r}; choose one of {', '.join(map(repr, HEAD_SELECT))}")
    if (group["projector"] == "cross_head") != (heads is not None):
        raise ValueError(
            f"projector={group['projector']!r} with num_heads={heads}: heads share a basis with both, write "
            '{"params": [...], "rank": 128, "projector": "cross_head", "num_heads": 32}; others drop num_heads'
        )
    if heads is None or _is_count(heads):
        return
    if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads or not all(map(_is_range, heads)):
        raise ValueError(
            f"Invalid num_heads: {heads!r}; need an integer of at least 1, or for a fused weight the (rows, heads) of "
            "its ranges, heads dividing rows or None: [(4096, 32), (1024, 8), (1024, None)]"
        )
    if group["rule"] == "adafactor":
        raise ValueError(
            "rule='adafactor' has column statistics, which rows of different bases would share: choose another rule, "
            "or an integer num_heads"
        )


def check_rows(shape: tuple[int, int], heads: Heads, rank: int) -> None:
    """Validate `num_heads` against a weight.

    Raises:
        ValueError: The heads do not divide its rows, or the ranges do not cover them or are not larger than the rank.
    """
    rows = shape[0]
    if isinstance(heads, int):
        if rows % heads:
            raise ValueError(
                f"got a weight of {rows} rows, need a multiple of num_heads={heads}: give every layer a group with its "
                "own count (key layers have fewer in grouped-query attention)"
            )
        return
    sizes = [size for size, _ in heads]
    if sum(sizes) != rows:
        raise ValueError(f"the ranges of num_heads={heads} cover {sum(sizes)} rows, the weight has {rows}")
    if min(sizes) <= rank:
        raise ValueError(f"rank={rank} needs ranges of more rows, num_heads={heads} has one of {min(sizes)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_range(pair: Any) -> bool:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not _is_count(pair[0]):
        return False
    return pair[1] is None or (_is_count(pair[1]) and pair[0] % pair[1] == 0)
