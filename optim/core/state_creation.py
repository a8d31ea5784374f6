"""The step that checkpointing tools run to create state to load into, as torch's `get_optimizer_state_dict` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import stack
from .layout import Layout


def only_creates_state(groups: Sequence[dict[str, Any]]) -> bool:
    """Recognise that step: all learning rates are 0 and all gradients zero. The caller checks that there is no state.

    It must allocate state and do nothing else: not search bases in zeros, not count a step.
    """
    if any(float(group["lr"]) != 0.0 for group in groups):
        return False
    given = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
    return not any(_nonzero(p, bool(group.get(stack.OPTION))) for p, group in given if not p.grad.is_sparse)


def _nonzero(param: Tensor, stacked: bool) -> Tensor:
    """Count entries of a gradient that are not zero, in the piece that has most of them: zero only if all are."""
    assert param.grad is not None
    layout = Layout.of(param, stacked=stacked)
    if isinstance(layout.sharding, stack.Stacked):
        layout = replace(layout, rows=(*layout.rows, *layout.sharding.dealers()))
    return layout.max_all(layout.piece(param.grad).count_nonzero())
