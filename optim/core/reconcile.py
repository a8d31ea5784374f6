"""Options and dtypes that change after the first step: existing state is converted to what its group needs now.

cast or moved      floating state follows the parameter and `state_dtype`
switched on        a momentum, a correction of rounding or a counter starts at zero
switched off       state that nothing reads any more is dropped
everything else    is refused: other shapes or ranks, 8-bit codes in the place of numbers or of other codes, and
                   second moments, which would start at zero while Adam's step count goes on

Nothing has changed where an error is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.rounding import converted
from .layout import Layout
from .projector import PROJECTORS
from .spec import Spec
from .state import AGE, zeros
from .target import CORRECTION
from .view import MatrixView
from .weight_norm import PREFIX

REMEDY = "set back what was changed, or construct a new optimizer and load convert_state(state_dict, optimizer)"

Described = Mapping[Tensor, Mapping[str, Spec]]


def reconcile(
    states: MutableMapping[Any, dict[str, Tensor]],
    described: Described,
    before: Described,
    layouts: Mapping[Tensor, Layout],
) -> None:
    """Drop the state of parameters that left, and convert or refuse what no longer fits; nothing changes if refused.

    Args:
        states: The state of an optimizer.
        described: What it should be now.
        before: How it was described when it was made or last reconciled.
        layouts: The layout of every parameter.

    Raises:
        ValueError: State cannot be converted to what a group needs now.
    """
    settled = {
        param: _settle(param, held, described[param], before.get(param, {}), layouts[param])
        | _started(param, held, described[param], layouts[param])
        for param, held in states.items()
        if held and param in described
    }
    for param in [p for p in states if isinstance(p, Tensor) and p not in described]:
        del states[param]
    for param, held in settled.items():
        states[param].clear()
        states[param].update(held)


def _settle(
    param: Tensor,
    held: Mapping[str, Tensor],
    specs: Mapping[str, Spec],
    before: Mapping[str, Spec],
    layout: Layout,
) -> dict[str, Tensor]:
    settled = {}
    for name, spec in specs.items():
        if name not in held:
            continue
        value = held[name]
        if name in before and before[name].meaning != spec.meaning:
            raise ValueError(
                f"{name} of a {tuple(param.shape)} parameter is that of {before[name].meaning}, its group now says "
                f"{spec.meaning}: {_options(name)} cannot change so after the first step; {REMEDY}"
            )
        recoded = name in before and before[name].form != spec.form
        if tuple(value.shape) != spec.shape or recoded or not _converts(name, value, spec):
            raise ValueError(
                f"{name} of a {tuple(param.shape)} parameter is {value.dtype} {tuple(value.shape)}, its group now "
                f"needs {spec.dtype} {spec.shape}{f' in another code, {spec.form}' if recoded and spec.form else ''}: "
                f"{_options(name)} cannot change so after the first step; {REMEDY}"
            )
        fits = value.dtype == spec.dtype
        settled[name] = layout.settle((value if fits else _cast(name, value, spec.dtype)).to(spec.device), spec.axis)
    return settled


def _started(param: Tensor, held: Mapping[str, Tensor], specs: Mapping[str, Spec], layout: Layout) -> dict[str, Tensor]:
    """State that is described and does not exist, as zeros; refused where zero is no start after many steps."""
    missing = {name: spec for name, spec in specs.items() if name not in held}
    for name in missing:
        prefix, drifts, _ = name.partition("exp_avg_sq")
        if (drifts and f"{prefix}step" in held) or name == AGE:
            raise ValueError(
                f"{name} of a {tuple(param.shape)} parameter does not exist after {int(held['step'])} steps: "
                f"{_options(name)} cannot change so after the first; {REMEDY}"
            )
    return zeros(missing, layout)


def meaning(name: str, view: MatrixView | None, group: Mapping[str, Any]) -> str:
    """What the numbers of a state stand for, where its shape does not tell."""
    side = "a whole gradient" if view is None else f"the {view.side} side"
    if name.startswith("basis"):
        kind = getattr(PROJECTORS.get(group.get("projector", "")), "basis", None)
        return f"a basis ({type(kind).__name__.lower()}) on {side}"
    if "exp_avg" in name and not name.startswith(PREFIX):
        rule = [str(group[option]) for option in ("rule", "momentum_on") if option in group]
        return f"{' '.join(rule) or 'moments'} on {side}"
    return ""


def _converts(name: str, value: Tensor, spec: Spec) -> bool:
    both = value.dtype.is_floating_point and spec.dtype.is_floating_point
    return value.dtype == spec.dtype or both or name == CORRECTION


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    return converted(value, dtype) if name == CORRECTION else value.to(dtype)


def _options(name: str) -> str:
    """Name the options that decide over a state, for messages."""
    if name.startswith("basis"):
        return "rank, density, proj_type, projector, num_heads and basis_dtype"
    if name.startswith("residual_"):
        return "residual, residual_density and state_dtype"
    return "rule, rank, density, proj_type, carry and state_dtype"
