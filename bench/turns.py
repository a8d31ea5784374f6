"""Contenders timed in turns, so that what disturbs the machine meets all alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from .measure import amortised, timed
from .optimizers import state_bytes
from .peers import Contender, Stepper

REFRESH_EVERY = 3
"""Turns between two steps that refresh."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender; refreshes are None where it has none.

    Args:
        name: What is shown.
        first: The step that makes the state.
        plain: Median of the steps without a refresh.
        p95: Their 95th percentile.
        plain_spread: Fastest and slowest of them.
        refresh: Median of the steps that refresh every basis.
        worst: Slowest of all steps but the first.
        floor: What a step of this kind cannot beat, measured in the same turns; None where nothing was.
        state_mb: Megabytes of optimizer state.
        peak_mb: Megabytes that a step allocates at most on top of what it finds.
    """

    name: str
    first: float
    plain: float
    p95: float
    plain_spread: tuple[float, float]
    refresh: float | None
    worst: float
    floor: float | None
    state_mb: float
    peak_mb: float

    def amortised(self, gap: int) -> float:
        """Mean step over an interval with one refresh of every basis."""
        return amortised(self.plain, self.refresh, gap)


def take_turns(
    contenders: Sequence[Contender], floors: Mapping[str, Stepper], rounds: int, device: torch.device
) -> tuple[list[Timing], dict[str, float]]:
    """Time all contenders and floors round by round.

    Args:
        contenders: What is timed.
        floors: Steppers of the floors that the contenders name.
        rounds: Steps of each, and a third as many refreshes.
        device: Where the parameters are.

    Returns:
        A timing for every contender, and the median milliseconds of every floor.
    """
    first = {c.name: timed(c.stepper.step, device) if c.first is None else c.first for c in contenders}
    bare = {name: list[float]() for name in floors}
    plain = {contender.name: list[float]() for contender in contenders}
    refreshes = {contender.name: list[float]() for contender in contenders}
    for floor in floors.values():
        floor.step()
    for turn in range(rounds):
        for name, floor in floors.items():
            bare[name].append(timed(floor.step, device))
        for contender in contenders:
            plain[contender.name].append(timed(contender.stepper.step, device))
        for contender in contenders if turn % REFRESH_EVERY == REFRESH_EVERY - 1 else ():
            if contender.refresh is not None:
                contender.refresh()
                refreshes[contender.name].append(timed(contender.stepper.step, device))
    medians = {name: float(np.median(times)) for name, times in bare.items()}
    rows = []
    for contender in contenders:
        steps, renewals = plain[contender.name], refreshes[contender.name]
        stepper = contender.stepper
        rows.append(
            Timing(
                name=contender.name,
                first=first[contender.name],
                plain=float(np.median(steps)),
                p95=float(np.percentile(steps, 95)),
                plain_spread=(min(steps), max(steps)),
                refresh=float(np.median(renewals)) if renewals else None,
                worst=max(steps + renewals),
                floor=sum(medians[name] for name in contender.floor) if contender.floor else None,
                state_mb=state_bytes(stepper) / 1e6 if isinstance(stepper, torch.optim.Optimizer) else 0.0,
                peak_mb=peak_bytes(stepper) / 1e6,
            )
        )
    return rows, medians


def peak_bytes(stepper: Stepper) -> int:
    """Bytes that one step allocates at most at a time, by the allocator's own record."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read by the first profile, whose notes would come between tables
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds, profile_memory=True) as recorded:
        stepper.step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
