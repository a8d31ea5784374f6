"""Several sums in one collective: what a bucket sends should not depend on how many matrices it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import Layout

Sum = Callable[[Tensor], Tensor]


def summed(add: Sum, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors of one dtype over ranks by one of a layout's sums, in one collective.

    Args:
        add: `Layout.sum_rows`, `sum_cols`, `sum_all`, ...
        tensors: This rank's parts, of any shapes.
    """
    if len(tensors) < 2:
        return [add(tensor) for tensor in tensors]
    whole = add(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def batches(layout: Layout, indices: Sequence[int]) -> list[list[int]]:
    """Matrices that are worked on at a time: all whose sums share a collective, or one by one where none is sent."""
    if layout.alone:
        return [[index] for index in indices]
    return [list(indices)] if indices else []
