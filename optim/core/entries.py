"""Single entries of a weight and its pieces: the largest of them, where they lie, and an even share for every rank.

S has k entries, flat indices of the whole in ascending order, the same for any number of pieces. What belongs to S is
dealt out evenly, k / W entries to a rank, wherever these lie:

    deal       values of entries, each where it lies   ->  the share of this rank          one reduce-scatter
    collect    shares                                  ->  all k on every rank             one gather
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import layout as sums
from .layout import Layout

DIGIT = 8
"""Bits of a digit by which the largest entries are found."""

CHUNK = 1 << 20
"""Entries that are read at a time, which bounds temporary memory."""


class Place(NamedTuple):
    """Which of the k entries S are in this rank's piece, and where.

    Args:
        here: Their positions among the k; None for all.
        flat: Their flat indices in the piece.
    """

    here: Tensor | None
    flat: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Select from (k,) the values of the entries in this piece."""
        return values if self.here is None else values[self.here]

    def among(self, values: Tensor, count: int) -> Tensor:
        """Put values of the entries in this piece into (k,), zero for all others."""
        return values if self.here is None else values.new_zeros(count).index_copy_(0, self.here, values)


def locate(index: Tensor, width: int, layout: Layout) -> Place:
    """Find the entries (k,) of a weight with rows of a given width in this rank's piece."""
    index, box = index.long(), layout.box
    if box is None:
        return Place(None, index)
    row, col = index // width - box.row, index % width - box.col
    here = ((row >= 0) & (row < box.m) & (col >= 0) & (col < box.n)).nonzero()[:, 0]
    return Place(here, (row * box.n + col)[here])


def share(count: int, layout: Layout) -> slice:
    """Which of k entries are this rank's to keep."""
    first = 0
    for group in _everywhere(layout):
        mine = sums.share(count, group)
        first, count = first + mine.start, mine.stop - mine.start
    return slice(first, first + count)


def deal(values: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Sum vectors (k,) over all pieces, and keep this rank's shares."""
    if layout.alone or not values:
        return list(values)
    parts = torch.stack(list(values))[..., None]
    for group in _everywhere(layout):
        parts = sums.deal(parts, group)
    return list(parts[..., 0].unbind())


def collect(shares: Sequence[Tensor], count: int, layout: Layout) -> list[Tensor]:
    """Gather vectors (k,) of which every rank keeps a share."""
    if layout.alone or not shares:
        return list(shares)
    levels = []
    for group in _everywhere(layout):
        levels.append((group, count))
        mine = sums.share(count, group)
        count = mine.stop - mine.start
    parts = torch.stack(list(shares))[..., None]
    for group, size in reversed(levels):
        parts = sums.collect(parts, size, group)
    return list(parts[..., 0].unbind())


def largest(magnitudes: Tensor, count: int, width: int, layout: Layout) -> Tensor:
    """Choose the k largest entries of a weight, of equal ones the first.

    Args:
        magnitudes: |dM| of this rank's piece (m, n), finite.
        count: k.
        width: Length of the rows of the whole.
        layout: Where the piece lies.

    Returns:
        This rank's share of their flat indices in the whole, ascending.
    """
    words = magnitudes.reshape(-1).view(torch.int64 if magnitudes.itemsize == 8 else torch.int32)
    limit, above, equal = kth_largest(words, count, layout.sum_all)
    where = (words >= limit).nonzero()[:, 0]
    tie = words[where] == limit
    if layout.box is not None:
        box = layout.box
        where = (where // max(box.n, 1) + box.row) * width + where % max(box.n, 1) + box.col
    if above + equal > count:
        early = torch.iinfo(torch.int64).max - where  # the first entry is the largest
        latest = kth_largest(early[tie.nonzero()[:, 0]], count - above, layout.sum_all)[0]
        where = where[(~tie | (early >= latest)).nonzero()[:, 0]]
    if layout.alone:
        return where[:count]
    return _gathered(where, count, layout)[share(count, layout)]


def _gathered(where: Tensor, count: int, layout: Layout) -> Tensor:
    """The indices (k,) that all pieces have found, ascending: each writes its own, and they are summed."""
    rank, world = 0, 1
    for group in _everywhere(layout):
        size = torch.distributed.get_world_size(group)
        rank, world = rank * size + torch.distributed.get_rank(group), world * size
    found = where.new_zeros(world)
    found[rank] = len(where)
    first = layout.sum_all(found).cumsum(0)[rank] - len(where)
    whole = where.new_zeros(count)
    whole.index_copy_(0, first + torch.arange(len(where), device=where.device), where)
    ascending: Tensor = layout.sum_all(whole).sort().values
    return ascending


def kth_largest(words: Tensor, count: int, total: Callable[[Tensor], Tensor]) -> tuple[int, int, int]:
    """The k-th largest of integers of at least 0, how many are larger, and how many are equal, over all pieces.

    Digit by digit from the highest: a histogram tells the digit of the k-th, and only numbers that share it are left.

    Args:
        words: The integers of this rank.
        count: k.
        total: Sums histograms over pieces.
    """
    limit = above = equal = 0
    one = torch.ones((), dtype=torch.int64, device=words.device)
    for shift in range(8 * words.itemsize - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=words.device)
        for part in torch.split(words, CHUNK):
            digits = _digits(part, shift).long()
            counts.scatter_add_(0, digits, one.expand_as(digits))
        counts = total(counts)
        atleast = counts.flip(0).cumsum(0).flip(0)  # numbers whose digit is at least this
        digit = int((atleast >= count - above).sum()) - 1
        equal = int(counts[digit])
        above += int(atleast[digit]) - equal
        limit |= digit << shift
        words = torch.cat([part[(_digits(part, shift) == digit).nonzero()[:, 0]] for part in torch.split(words, CHUNK)])
    return limit, above, equal


def _digits(words: Tensor, shift: int) -> Tensor:
    return (words >> shift).bitwise_and_((1 << DIGIT) - 1)


def _everywhere(layout: Layout) -> tuple[torch.distributed.ProcessGroup, ...]:
    return () if layout.sharding is None else layout.sharding.everywhere
