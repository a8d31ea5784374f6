"""Sorting parameters into buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import stack
from .bucket import Plan
from .flat import Flat
from .layout import Layout
from .view import MatrixView

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

See = Callable[[Tensor, dict[str, Any]], MatrixView | None]


def make_plans(groups: Sequence[dict[str, Any]], see: See, replicas: ProcessGroup | None = None) -> list[Plan]:
    """Sort the parameters of all groups into buckets of equal view, dtype, device and layout.

    Args:
        groups: Parameter groups.
        see: Returns the view of a parameter of a group; None for a plain one.
        replicas: Processes that hold the same parameters.
    """
    sorted_out: dict[tuple[Any, ...], Plan] = {}
    position = 0
    for index, group in enumerate(groups):
        for param in group["params"]:
            view = see(param, group)
            turned, full = (view.transposed, view.full) if view is not None else (False, False)
            stacked, size = bool(group.get(stack.OPTION)), stack.count(param, group)
            layout = Layout.of(
                param, transposed=turned, replicas=replicas, spread=group.get("shard_basis"), full=full, stacked=stacked
            )
            if view is not None and not stacked:
                layout = Flat.seeing(layout, view)
            key = (index, view, param.dtype, param.device, layout)
            plan = sorted_out.setdefault(key, Plan(index, view, layout, [], [], [], stacked))
            plan.params.append(param)
            plan.positions.append(range(position, position + size))
            plan.offsets.append([0] * size)
            position += size
    _stagger([plan for plan in sorted_out.values() if plan.view is not None], groups)
    return list(chain.from_iterable(plan.split() for plan in sorted_out.values()))


def _stagger(plans: list[Plan], groups: Sequence[dict[str, Any]]) -> None:
    """Spread the refreshes of all projected matrices evenly over their interval, in parameter order."""
    positions = sorted(position for plan in plans for numbers in plan.positions for position in numbers)
    place = {position: ordinal for ordinal, position in enumerate(positions)}
    for plan in plans:
        gap = groups[plan.group]["update_proj_gap"]
        plan.offsets[:] = [[place[at] * gap // len(positions) for at in numbers] for numbers in plan.positions]


def seen(param: Tensor) -> tuple[Any, ...]:
    """What of a parameter decides its bucket; it changes if the parameter is replaced, cast, moved or reshaped."""
    return id(param), param.dtype, param.device, param.shape
