"""What cannot be sharded yet, refused before the first step with the line to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .bucket import Plan
from .codec import form_of
from .flat import Flat
from .layout import Layout
from .projector import PROJECTORS
from .view import MatrixView


def check_sharded(plans: Iterable[Plan], groups: Sequence[dict[str, Any]]) -> None:
    """Refuse sharded parameters whose options need more than the sums that a layout offers.

    Args:
        plans: All buckets.
        groups: The parameter groups.

    Raises:
        NotImplementedError: A group does.
    """
    for plan in plans:
        if plan.layout.alone:
            continue
        for param in plan.params:
            reason = _reason(param, groups[plan.group], plan)
            if reason:
                raise NotImplementedError(f"got a sharded {tuple(param.shape)} parameter, and {reason}")


def _reason(param: Tensor, group: Mapping[str, Any], plan: Plan) -> str | None:
    view, layout = plan.view, plan.layout
    whole = view is None or view.rank in (0, view.b)  # stepped entry by entry, not projected
    reason = _cut(param, group, layout) if whole else None
    if param.ndim > 2 and group.get("factor_dims") == "largest2":
        return "factor_dims='largest2' may factor sharded dimensions in another order: pass factor_dims='last2'"
    return reason or (None if view is None else _projected(group, view, plan))


def _cut(param: Tensor, group: Mapping[str, Any], layout: Layout) -> str | None:
    name = str(group.get("state_dtype"))
    if not layout.natural.cols or form_of("exp_avg", param.shape, name) is None:
        return None
    return (
        f"state_dtype={name!r} has blocks along its rows, which are cut: put it into a group with "
        "'state_dtype': 'bfloat16', or shard rows, fully_shard(model, shard_placement_fn=lambda p: Shard(0))"
    )


def _projected(group: Mapping[str, Any], view: MatrixView, plan: Plan) -> str | None:
    if view.rank in (0, view.b):  # stepped entry by entry, not projected: all that projector="blocks" has
        return None
    flat = PROJECTORS[group.get("projector", "sketch")].side == "flat"
    return _single(group, view, plan) if flat else None


def _single(group: Mapping[str, Any], view: MatrixView, plan: Plan) -> str | None:
    """Why a group with `projector="randk"` cannot be sharded: its R is a vector of entries and has no rows."""
    name = str(group.get("state_dtype"))
    if form_of("exp_avg", view.low_shape, name) is not None:
        return f"state_dtype={name!r} has blocks of entries, which projector='randk' deals out: choose 'bfloat16'"
    scaled = "gamma" in group and ("residual_density" not in group or group["residual"] in ("norm", "channel"))
    looks = {"weight_norm=True": group.get("weight_norm"), "rule='adafactor'": group.get("rule") == "adafactor"}
    looks |= {"a norm-scaled residual": scaled, "stacked=True": plan.stacked}
    looks["a weight of a single row"] = not isinstance(plan.layout, Flat)
    looks |= {f"residual={kind!r}": group.get("residual") == kind for kind in ("exact", "additive")}
    for option in (option for option, on in looks.items() if on):
        return f"{option} needs rows, projector='randk' has single entries: choose 'columns'"
    return None
