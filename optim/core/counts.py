"""Step counts that enter formulas: numbers that the host reads, or with `capturable=True` tensors on the device.

A CUDA graph replays operations with the numbers of the step that was captured; a count that is a tensor on the device
advances within the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.reference import Count
from .spec import Spec, counter

if TYPE_CHECKING:
    from .hyper import Hyper


def spec(param: Tensor, hyper: Hyper) -> Spec:
    """Metadata of a count: on the host, or with the parameter where a graph is to advance it."""
    return counter(param.device if hyper.capturable else "cpu")


def advance(states: Sequence[dict[str, Tensor]], hyper: Hyper, name: str = "step") -> list[Count]:
    """Count a step in every state and return the new counts, without asking the device for them."""
    if not hyper.capturable:
        return [*tally(states, name)]
    counts = [held[name] for held in states]
    torch._foreach_add_(counts, 1)
    return [*counts]


def tally(states: Sequence[dict[str, Tensor]], name: str = "step") -> list[int]:
    """`advance` for counts on the host, which it returns as numbers."""
    counts = [held[name] for held in states]
    torch._foreach_add_(counts, 1)
    return [int(count) for count in counts]
