"""The step that checkpointing tools run to create state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import stack
from .layout import Layout


def only_creates_state(groups: Sequence[dict[str, Any]]) -> bool:
    """Recognise it, where there is no state yet: nothing but rates of 0 and zero gradients.

    It must allocate and do nothing else: no basis of zeros, no step counted.
    """
    if any(float(group["lr"]) != 0.0 for group in groups):
        return False
    given = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
    return not any(_nonzero(p, bool(group.get(stack.OPTION))) for p, group in given if not p.grad.is_sparse)


def _nonzero(param: Tensor, stacked: bool) -> Tensor:
    """Whether an entry of a gradient is not zero, over all pieces."""
    assert param.grad is not None
    layout = Layout.of(param, stacked=stacked)
    if isinstance(layout.sharding, stack.Stacked):
        layout = replace(layout, rows=(*layout.rows, *layout.sharding.dealers()))
    return layout.max_all(layout.piece(param.grad).count_nonzero())
