"""Whether the next step runs the same operations as the last one, so that a CUDA graph may replay it.

Counters on the host decide: a step in which one of them runs out refreshes a basis, creates state or opens a window of
blocks, and cannot be replayed.
"""

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
        ready: There are such parameters and all have their state, ranks are chosen, no residual is in its warm-up, and
            no gradient is held in a subspace.
        waits: Steps until the next refresh of every matrix; `count` decrements them.
        first: The smallest value of each at which the step is an ordinary one.
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
                    first.append(2 if follows else 1)  # a basis that follows moves at the end of the step before
        waiting = optimizer._low_grads or any(optimizer._waits(group) for group in optimizer.param_groups)
        ready = bool(held) and all(state and AVERAGE not in state for state in held) and not waiting
        turns = [
            group for group in optimizer.param_groups if group.get("projector") == "blocks" and blocks.turns(group)
        ]
        return cls(ready, waits, first, turns)

    @property
    def due(self) -> bool:
        """Whether the next step cannot be replayed: it searches bases, creates state or opens a window of blocks."""
        return self.searches or any(group[blocks.WAIT] <= 0 for group in self.turns)

    @property
    def searches(self) -> bool:
        """Whether it searches bases or creates state; windows are opened before a step is captured."""
        soon = (_least(wait) < first for wait, first in zip(self.waits, self.first, strict=True))
        return not self.ready or any(soon)

    def count(self) -> None:
        """Count a replayed step, in which the host did not count."""
        if self.waits:
            torch._foreach_sub_(self.waits, 1)
        for group in self.turns:
            group[blocks.WAIT] -= 1


def _least(wait: Tensor) -> float:
    return wait.item() if wait.ndim == 0 else wait.min().item()


def _states(optimizer: Lifecycle, group: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The states of the parameters of a group that have a gradient; an empty one where it does not exist yet."""
    for param in group["params"]:
        if param.grad is not None:
            yield optimizer.state.get(param, {})


def check_capture(optimizer: Lifecycle) -> None:
    """Raise an error where a CUDA graph captures a step that it could not replay.

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
