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
    """What `writing` reads of the options of a group."""

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
    """Yield a parameter as a matrix to write to, once, in a `for` loop: code after the yield stores what was written.

    Args:
        param: The parameter, or this rank's piece of it.
        held: Its state: the step count, and a correction if it has one.
        how: The mode and the seed of rounding.
        position: Its position in the optimizer; with seed, step, row and column it decides the random bits.
        shape: Shape of the matrix; None is (first dimension, rest).
        box: Where the piece lies in the whole weight; None for all of it.
    """
    shape = shape or rows_and_columns(param.shape)
    weight = param.detach().reshape(shape)
    correction = held[CORRECTION].view(shape) if CORRECTION in held else None
    mode = how.rounding if param.dtype == torch.bfloat16 else "nearest"  # wider weights are exact
    seed = 0 if mode in ("nearest", "compensated") else random.mix(how.seed, position, _known(held["step"]), TAG)
    row, col = (box.row, box.col) if box else (0, 0)
    yield Target(weight, mode, correction, seed, row, col)
    if weight.data_ptr() != param.data_ptr():  # a copy: channels-last weights cannot be viewed as a matrix
        param.copy_(weight.view_as(param))


def _known(count: Tensor) -> random.Seed:
    """A step count as a number; on a device it stays a tensor, for reading it would synchronise."""
    return int(count) if count.device.type == "cpu" else count
