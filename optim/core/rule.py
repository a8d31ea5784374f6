"""The interface of inner rules: the states that a rule keeps, how they follow a change of basis, and its direction.

The direction `N` is such that the weight moves by `-lr N`, or by `-N` where the rule is `absolute`: it has the learning
rate in it already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...kernels.random import Seed
from ...kernels.reference import Count
from .layout import ALONE, Layout

if TYPE_CHECKING:
    from .hyper import Hyper

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What a rule works on: lists with one entry a tensor, all in the working dtype.

    Args:
        grads: Gradients R (a, r), or full gradients of any shape.
        states: State tensors by name; updated in place.
        counts: Step count t of each tensor, from 1; tensors on the device in steps that may be captured.
        weights: The parameters, for rules that scale by their size.
        out: Directions N, of the shapes of `grads`; written.
        ages: Step counts of each column (r,), in the place of `counts`, where columns have started at different steps.
        layout: Sums over the pieces of `grads`.
        weighs: Sums over the pieces of `weights`.
    """

    grads: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]
    counts: Sequence[Count]
    weights: Sequence[Tensor]
    out: Sequence[Tensor]
    ages: Sequence[Tensor] | None = None
    layout: Layout = ALONE
    weighs: Layout = ALONE


class Rule(ABC):
    """An inner rule: stateless itself, its state is the tensors it describes."""

    linear: tuple[str, ...] = ("exp_avg",)
    """States that follow a change of basis as R does."""
    drifting: tuple[str, ...] = ()
    """Second moments, whose small relative changes low-precision storage must not lose."""
    absolute: bool = False
    """The direction includes the learning rate."""
    elementwise: bool = True
    """Every entry of the direction depends on its own entry of the gradient only."""

    @abstractmethod
    def buffers(self, shape: Shape, hyper: Hyper) -> dict[str, Shape]:
        """Shapes of the state tensors for a gradient of this shape."""

    @abstractmethod
    def direction(self, work: Work, hyper: Hyper) -> None:
        """Update the states and write the directions."""

    def coded_direction(self, work: Work, hyper: Hyper, seeds: Sequence[Seed]) -> bool:
        """`direction` in one pass over states that are coded in 8 bits; returns False, and does nothing, if it cannot.

        Args:
            work: The work, whose states may be coded in 8 bits.
            hyper: Hyper-parameters.
            seeds: Seed of the rounding of each tensor.
        """
        return False
