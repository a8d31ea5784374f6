"""How far a kernel is from its specification."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.blockwise import Blocks
from ..kernels.rounding import Target


class Found(NamedTuple):
    """An error and the largest one that is right."""

    what: str
    error: float
    tolerance: float

    @property
    def fine(self) -> bool:
        """Whether it is right; NaN is not."""
        return self.error <= self.tolerance


def relative(what: str, ours: Tensor, theirs: Tensor, tolerance: float, base: Tensor | None = None) -> Found:
    """`|ours - theirs| / |theirs - base|`, infinite where only one of both is finite."""
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return Found(what, math.inf, tolerance)
    one, other = ours.double().nan_to_num(0, 0, 0), theirs.double().nan_to_num(0, 0, 0)
    size = (other if base is None else other - base.double()).norm()
    difference = (one - other).norm()
    return Found(what, float(difference / size) if size > 0 else float(difference), tolerance)


def equal(what: str, ours: Tensor, theirs: Tensor) -> Found:
    """The share of entries that differ; none may."""
    return Found(what, float((ours != theirs).double().mean()) if ours.numel() else 0.0, 0.0)


def codes(what: str, ours: Blocks, theirs: Blocks) -> list[Found]:
    """Codes differ where an ulp crosses the border of two, by one and rarely; scales by ulps."""
    moved = (ours.codes.int() - theirs.codes.int()).abs()
    share = math.inf if bool((moved > 1).any()) else float(moved.double().mean())
    allowed = 2e-3 + 2.0 / max(moved.numel(), 1)
    return [Found(f"{what} codes", share, allowed), relative(f"{what} scales", ours.scale, theirs.scale, 1e-5)]


def written(ours: Target, theirs: Target, before: Tensor, tolerance: float = 1e-4) -> Found:
    """Weights: by the size of the step where they hold it, else by the share of entries that went to another side."""
    one, other = ours.read(), theirs.read()
    if ours.mode == "compensated8":
        tolerance = max(tolerance, 1e-3)  # the last of its 24 bits is rounded at random, and an ulp of fp32 may turn it
    if ours.exact or ours.correction is not None:
        return relative("weight", one, other, tolerance, before)
    ulp = 2.0**-7 if ours.weight.dtype == torch.bfloat16 else 2.0**-10
    far = (one - other).abs() > ulp * other.abs() + 1e-6
    share = math.inf if bool(far.any()) or not bool(one.isfinite().all()) else float((one != other).double().mean())
    return Found("weight", share, 0.01 + 2.0 / max(one.numel(), 1))
