"""What the host decides by counting: whether the next step is the same operations on the device as the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.capture import capturing
from . import blocks
from .projector import PROJECTORS
from .support import AVERAGE

if TYPE_CHECKING:
    from .lifecycle import Lifecycle


@dataclass(frozen=True, slots=True)
class Schedule:
    """The counters of the host at one step, of the parameters that have a gradient.

    Args:
        ready: There are such parameters and they have their state, ranks are chosen, no residual warms up, no gradient
            waits in a subspace.
        waits: Steps until the next refresh of every matrix; changed by `count`.
        first: The least of each at which a step is like the one before.
        turns: Groups whose blocks take turns.
    """

    ready: bool
    waits: list[Tensor]
    first: list[int]
    turns: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Lifecycle) -> Schedule:
        """Read it from an optimizer."""
        waits, first, held = [], [], []
        for group in optimizer.param_groups:
            follows = getattr(PROJECTORS.get(group.get("projector", "")), "follows", False)
            for state in _states(optimizer, group):
                held.append(state)
                if "until_refresh" in state:
                    waits.append(state["until_refresh"])
                    first.append(2 if follows else 1)  # such a basis moves at the end of the step before
        waiting = optimizer._low_grads or any(optimizer._waits(group) for group in optimizer.param_groups)
        ready = bool(held) and all(state and AVERAGE not in state for state in held) and not waiting
        turns = [
            group for group in optimizer.param_groups if group.get("projector") == "blocks" and blocks.turns(group)
        ]
        return cls(ready, waits, first, turns)

    @property
    def due(self) -> bool:
        """Whether the next step is another one: it searches bases, makes state or opens a window."""
        return self.searches or any(group[blocks.WAIT] <= 0 for group in self.turns)

    @property
    def searches(self) -> bool:
        """The same but for windows, which are opened before a step begins."""
        soon = (_least(wait) < first for wait, first in zip(self.waits, self.first, strict=True))
        return not self.ready or any(soon)

    def count(self) -> None:
        """Count a step that was replayed."""
        if self.waits:
            torch._foreach_sub_(self.waits, 1)
        for group in self.turns:
            group[blocks.WAIT] -= 1


def _least(wait: Tensor) -> float:
    return wait.item() if wait.ndim == 0 else wait.min().item()


def _states(optimizer: Lifecycle, group: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The states of the parameters of a group that have a gradient, empty where there is none."""
    for param in group["params"]:
        if param.grad is not None:
            yield optimizer.state.get(param, {})


def check_capture(optimizer: Lifecycle) -> None:
    """Refuse to be captured by a CUDA graph in a step that could not be replayed.

    Raises:
        RuntimeError: A group is not capturable, or a basis is searched in this step.
    """
    if not capturing():
        return
    name = type(optimizer).__name__
    if not all(group.get("capturable") for group in optimizer.param_groups):
        raise RuntimeError(
            f"step() of a {name} is captured in a CUDA graph, which would freeze its step counts: construct it with "
            "capturable=True"
        )
    if Schedule.of(optimizer).searches:
        raise RuntimeError(
            f"step() of a {name} is captured in a CUDA graph at a step that makes state or refreshes a basis: step by "
            "GraphedStep(optimizer), which runs such steps as they are, or call optimizer.step() before"
        )
