"""State of one parameter: tensors only, described by metadata before they exist."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import codec, counts, sides
from .hyper import Hyper
from .layout import ALONE, Layout
from .rules import RULES
from .spec import Axis, Spec, counter
from .view import MatrixView

COUNTERS = ("step", "until_refresh", "refreshes", "skipped_refreshes")
"""0-d CPU tensors: Adam's step count (with `capturable=True` on the parameter's device, for it enters the step), steps
until the next refresh, refreshes done, refreshes skipped."""

INTERVAL = "interval"
"""One more counter where refreshes are lazy: the current interval between two of them, in steps."""

AGE = "age"
"""Step count of each coordinate of an index basis (r,), where moments are carried coordinate by coordinate."""


def is_counter(name: str) -> bool:
    """Whether a state tensor is a counter, whose bytes no summary counts."""
    return name in COUNTERS or name == INTERVAL or name.endswith(("_step", "_key"))


def specs(param: Tensor, view: MatrixView | None, hyper: Hyper) -> dict[str, Spec]:
    """Describe the state of a parameter.

    A projected matrix stores its basis as the projector keeps it and its moments in the state dtype: with AdamW inside
    and a dense basis `min*r + 2*max*r` elements, and four counters.
    """
    shape = tuple(param.shape) if view is None else view.low_shape
    moments: dict[str, Spec] = {}
    for name, size in RULES[hyper.rule].buffers(shape, hyper).items():
        moments |= codec.specs(name, size, param, hyper.state_dtype, axis_of(name, param.ndim, view))
    if view is None:
        on_device = runs_fused(param, hyper) and param.device.type == "cuda"
        return {"step": counter(param.device) if on_device else counts.spec(param, hyper), **moments}
    described = {name: counter() for name in COUNTERS} | {"step": counts.spec(param, hyper)}
    if hyper.lazy is not None:
        described[INTERVAL] = counter()
    if hyper.counts_coordinates:
        axis: Axis = "entries" if hyper.side == "flat" else ""
        described[AGE] = Spec((view.rank,), torch.float32, param.device, axis=axis)
    return {**described, **hyper.basis.specs(param, view, hyper), **moments}


def axis_of(name: str, ndim: int, view: MatrixView | None) -> Axis:
    """`Spec.axis` of a moment."""
    if view is None:
        return sides.axes(ndim).get(name, "param")
    return "" if view.full or name.endswith("_col") else "kept"


def delegates(param: Tensor, hyper: Hyper) -> bool:
    """Tell whether a plain parameter is stepped by torch's own AdamW, bit for bit.

    Off a GPU only its fused form is capturable.
    """
    same_storage = codec.storage_dtype(param.dtype, hyper.state_dtype) == param.dtype
    same_storage = same_storage and codec.form_of("exp_avg", param.shape, hyper.state_dtype) is None
    full_precision = param.dtype == codec.work_dtype(param.dtype)
    runs = not hyper.capturable or param.device.type == "cuda" or _fused(param, hyper)
    return hyper.rule == "adamw" and not hyper.official and same_storage and full_precision and runs


def runs_fused(param: Tensor, hyper: Hyper) -> bool:
    """Whether that is torch's fused form: asked for by `fused=True`, or by default where the device has it."""
    return delegates(param, hyper) and _fused(param, hyper)


def _fused(param: Tensor, hyper: Hyper) -> bool:
    if not param.is_contiguous():
        return False  # torch's fused kernel for CPUs ignores strides
    if hyper.fused is None:
        return hyper.foreach is None and param.device.type in ("cpu", "cuda")
    return hyper.fused


def zeros(described: Mapping[str, Spec], layout: Layout = ALONE) -> dict[str, Tensor]:
    """Allocate state from its description; of a sharded parameter DTensors, of which this rank allocates its piece."""
    if layout.sharding is None:
        return {name: torch.zeros(s.shape, dtype=s.dtype, device=s.device) for name, s in described.items()}
    return {
        name: layout.sharding.zeros(s.shape, s.dtype, layout.place(s.axis))
        if s.shape
        else torch.zeros(s.shape, dtype=s.dtype, device=s.device)
        for name, s in described.items()
    }
