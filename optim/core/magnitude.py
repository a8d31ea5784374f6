"""The largest magnitude of a gradient, over all of its pieces: ranks that decide by it decide alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .layout import Layout
from .stack import Stacked


def magnitude(param: Tensor, *, stacked: bool = False) -> float:
    """Return max|G|: 0 where there is no gradient, infinite where an entry is not finite.

    Whoever has a piece of the parameter must ask, with a gradient or without: the answers are reduced.

    Args:
        param: The parameter.
        stacked: It is a stack of matrices.
    """
    layout = Layout.of(param, stacked=stacked)
    if isinstance(layout.sharding, Stacked):
        layout = replace(layout, rows=(*layout.rows, *layout.sharding.dealers()))
    if param.grad is None and layout.alone:
        return 0.0
    none = torch.zeros((), dtype=param.dtype, device=param.device)
    return float(layout.max_all(none if param.grad is None else largest(layout.piece(param.grad))))


def largest(tensor: Tensor) -> Tensor:
    """Return max|A| of this rank's piece, 0-d; infinite where an entry is not finite."""
    if not tensor.numel():  # an empty piece
        return tensor.new_zeros(())
    low, high = torch.aminmax(tensor)  # an order of magnitude faster than the maximum norm
    found = torch.maximum(-low, high)
    return torch.where(found.isnan(), torch.inf, found)  # NaN may get lost in a maximum over ranks
