"""Several matrices at a time: their sums share a collective, so that more matrices do not mean more messages."""

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
    """Which matrices to work on at a time: all where sums are sent, one by one (least memory) where none are."""
    if layout.alone:
        return [[index] for index in indices]
    return [list(indices)] if indices else []


def buckets(b: Bucket) -> Iterator[Bucket]:
    """Cut a bucket into `batches`: itself, or one bucket a matrix."""
    for batch in batches(b.layout, range(len(b.params))):
        yield b if len(batch) == len(b.params) else b.only(*batch)


@dataclass(slots=True)
class Recipe:
    """A large tensor that is needed several times: made anew every time, as those of a whole batch would not fit.

    Args:
        make: Makes it, in memory of its own.
        keep: Make it once and hold it, for a batch of a single matrix; then only the last caller may overwrite it.
    """

    make: Make
    keep: bool
    _made: Tensor | None = field(default=None, init=False)

    def __call__(self) -> Tensor:
        """Make the tensor, or return the one that is held."""
        made = self.make() if self._made is None else self._made
        if self.keep:
            self._made = made
        return made
