"""The step that checkpointing tools run to create state to load into, as torch's `get_optimizer_state_dict` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import stack
from .magnitude import magnitude


def only_creates_state(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Recognise that step: all learning rates are 0 and all gradients zero. The caller checks that there is no state.

    It must allocate state and do nothing else: not search bases in zeros, not count a step.
    """
    if any(float(group["lr"]) != 0.0 for group in groups):
        return False
    every = [(p, bool(group.get(stack.OPTION))) for group in groups for p in group["params"]]
    asked = [(p, stacked) for p, stacked in every if p.grad is None or not p.grad.is_sparse]
    return not any(magnitude(p, stacked=stacked) > 0.0 for p, stacked in asked)
