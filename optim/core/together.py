"""Several sums in one collective: what a bucket sends should not depend on how many matrices it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import Layout

if TYPE_CHECKING:
    from .bucket import Bucket

Sum = Callable[[Tensor], Tensor]
Make = Callable[[], Tensor]


def reduced(add: Sum, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Reduce tensors of one dtype over ranks by one of a layout's sums or maxima, in one collective.

    Args:
        add: `Layout.sum_rows`, `sum_cols`, `max_all`, ...
        tensors: This rank's parts, of any shapes.
    """
    if len(tensors) < 2:
        return [add(tensor) for tensor in tensors]
    whole = add(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape as one (k, ...); one by itself is not copied."""
    return torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0][None]


def batches(layout: Layout, indices: Sequence[int]) -> list[list[int]]:
    """Matrices that are worked on at a time: all whose sums share a collective, or one by one where none is sent."""
    if layout.alone:
        return [[index] for index in indices]
    return [list(indices)] if indices else []


def buckets(b: Bucket) -> Iterator[Bucket]:
    """What `batches` are of a bucket: itself, or one of every matrix."""
    for batch in batches(b.layout, range(len(b.params))):
        yield b if len(batch) == len(b.params) else b.only(*batch)


@dataclass(slots=True)
class Recipe:
    """A large tensor that several phases need: made anew in each, for all of a batch at once would not fit.

    Args:
        make: Makes it in memory of its own.
        keep: Make it once, where the batch is a single matrix; who calls it last may write to it.
    """

    make: Make
    keep: bool
    _made: Tensor | None = field(default=None, init=False)

    def __call__(self) -> Tensor:
        """Return it."""
        made = self.make() if self._made is None else self._made
        if self.keep:
            self._made = made
        return made
