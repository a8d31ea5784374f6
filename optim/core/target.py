"""Weights as they are written to: as matrices in the order of their memory, with their mode of rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import random
from ...kernels.rounding import CORRECTIONS, Target
from .codec import State, rows_and_columns
from .sharding import Box
from .spec import Spec

CORRECTION = "correction"
"""State of a compensated bf16 weight: what it lacks of a value of 24 or 32 bits."""


TAG = 0x77
"""Keeps random bits of weights apart from those of moments."""


class Rounds(Protocol):
    """Options that say how weights are rounded."""

    @property
    def rounding(self) -> str:
        """One of `ROUNDINGS`."""

    @property
    def seed(self) -> int:
        """Seed of stochastic rounding."""


def specs(param: Tensor, rounding: str) -> dict[str, Spec]:
    """Describe the correction of a weight: one or two bytes an element of bf16, nothing for wider ones."""
    if rounding not in CORRECTIONS or param.dtype != torch.bfloat16:
        return {}
    return {CORRECTION: Spec(tuple(param.shape), CORRECTIONS[rounding], param.device, axis="param")}


def check(param: Tensor, group: dict[str, Any]) -> None:
    """Refuse a mode of rounding that the dtype of a parameter does not have.

    Raises:
        TypeError: Any mode but "nearest" is asked of fp16, which is not the upper half of fp32 as bf16 is.
    """
    if param.dtype == torch.float16 and group["rounding"] != "nearest":
        raise TypeError(
            f"rounding={group['rounding']!r} is for bf16 weights, got {param.dtype}: convert them, "
            "model.to(torch.bfloat16), or pass rounding='nearest'"
        )


def writing(
    param: Tensor,
    held: State,
    how: Rounds,
    position: int,
    shape: tuple[int, int] | None = None,
    box: Box | None = None,
) -> Iterator[Target]:
    """Yield a parameter to write to, as a matrix of a given shape or of (first dimension, rest).

    One that cannot be viewed as a matrix, channels-last say, is copied back. Random bits are a function of the seed,
    the position of the parameter and its step, and of rows and columns in the whole weight of which it is the box.
    """
    shape = shape or rows_and_columns(param.shape)
    weight = param.detach().reshape(shape)
    correction = held[CORRECTION].view(shape) if CORRECTION in held else None
    mode = how.rounding if param.dtype == torch.bfloat16 else "nearest"  # wider weights are exact
    seed = 0 if mode in ("nearest", "compensated") else random.mix(how.seed, position, _known(held["step"]), TAG)
    row, col = (box.row, box.col) if box else (0, 0)
    yield Target(weight, mode, correction, seed, row, col)
    if weight.data_ptr() != param.data_ptr():
        param.copy_(weight.view_as(param))


def _known(count: Tensor) -> random.Seed:
    """A step count as a number, unless it is on a device, which would have to be asked."""
    return int(count) if count.device.type == "cpu" else count
