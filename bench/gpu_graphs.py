"""Steps by CUDA graph beside the same steps launched one by one: what they compute, and what the host costs no more."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import optim
from ..optim.core.lifecycle import Lifecycle
from .floors import LR
from .gpu_compare import relative
from .gpu_device import Bench
from .gpu_steps import MODELS, TINY_MODELS, Model, outcome, parameters

Groups = list[dict[str, Any]]
Build = Callable[[Groups], Lifecycle]

GAP, STEPS = 4, 12
"""Interval of refreshes, and steps that are compared: two refreshes lie between replays."""
TOLERANCE = 0.02
"""Largest difference of weights over their change: products may be summed in another order, a frozen count is more."""


def contenders() -> dict[str, Build]:
    """Optimizers whose steps are captured, with a learning rate on the device."""

    def rate(groups: Groups) -> Tensor:
        return torch.tensor(LR, device=groups[0]["params"][0].device)

    coded: dict[str, Any] = {"state_dtype": "8bit", "rounding": "stochastic"}
    shared: dict[str, Any] = {"capturable": True, "update_proj_gap": GAP}
    return {
        "GaLore": lambda groups: optim.GaLore(groups, lr=rate(groups), **shared),
        "GaLore compensated": lambda groups: optim.GaLore(groups, lr=rate(groups), rounding="compensated", **shared),
        "GaLore 8bit": lambda groups: optim.GaLore(groups, lr=rate(groups), **coded, **shared),
        "Fira": lambda groups: optim.Fira(groups, lr=rate(groups), **shared),
        "Frugal": lambda groups: optim.Frugal(_by_density(groups), lr=rate(groups), **shared),
        "OnlineSubspaceDescent": lambda groups: optim.OnlineSubspaceDescent(groups, lr=rate(groups), capturable=True),
    }


def _by_density(groups: Groups) -> Groups:
    return [{"params": group["params"], "density": 0.25 if group["rank"] else None} for group in groups]


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Compare all contenders on small models, where launches cost the most."""
    for model in TINY_MODELS if bench.interpreted else MODELS[:2]:
        for name, build in contenders().items():
            row = {"model": model.name, "rank": model.rank, "optimizer": name, "layers": model.layers}
            if bench.device.type != "cuda":
                yield row | {"skipped": "needs a CUDA device"}
            elif bench.budget.left() < model.seconds:
                yield row | {"skipped": f"needs up to {model.seconds} s"}
            else:
                yield row | outcome(bench, lambda model=model, build=build: compare(bench, model, build))  # type: ignore[misc]


@torch.no_grad()
def compare(
    bench: Bench, model: Model, build: Build, graphed: Callable[[Lifecycle], optim.GraphedStep] = optim.GraphedStep
) -> dict[str, Any]:
    """Train two copies, one by graph, then time steps of both that refresh nothing.

    Args:
        bench: The device.
        model: Sizes of the parameters.
        build: Makes an optimizer of groups.
        graphed: Makes the step by graph.
    """
    start = parameters(bench, model)
    copies = copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [build([{"params": m, "rank": model.rank}, {"params": rest, "rank": None}]) for m, rest in copies]
    step = graphed(optimizers[1])
    first, second = ([*matrices, *rest] for matrices, rest in copies)
    for _ in range(STEPS):
        for one, other in zip(first, second, strict=True):
            _feed((one, other), 1e-3 * bench.normal(*one.shape))
        optimizers[0].step()
        step()
    weights = zip(second, first, [*start[0], *start[1]], strict=True)
    difference = max(relative("weight", one, other, TOLERANCE, base).error for one, other, base in weights)
    found: dict[str, Any] = {"difference": difference, "captures": step.captures, "replays": step.replays}
    found |= {"eager_ms": _time(bench, optimizers[0], optimizers[0].step), "ms": _time(bench, optimizers[1], step)}
    if not difference <= TOLERANCE:
        found["error"] = f"weights differ by {difference:.2e} of their change after {STEPS} steps"
    return found


def _feed(params: tuple[Tensor, ...], grad: Tensor) -> None:
    """Give a gradient to copies of a parameter, where it was before."""
    for param in params:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(grad)


def _time(bench: Bench, optimizer: Lifecycle, step: Callable[[], Any]) -> float:
    """Median milliseconds of steps without a refresh."""
    for held in optimizer.state.values():
        if "until_refresh" in held:
            held["until_refresh"].fill_(math.inf)
    bench.time_steps(step, 0 if bench.interpreted else 3)
    return float(np.median(bench.time_steps(step, 1 if bench.interpreted else 20)))
