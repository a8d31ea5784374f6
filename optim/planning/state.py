"""State of an optimizer by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.codec import SCALE
from ..core.lifecycle import Lifecycle
from ..core.state import is_counter
from ..core.target import CORRECTION
from .steps import kind_of

KINDS = ("moments", "bases", "scales", "corrections", "other")
"""Kinds of state: `other` are limits, ages, indices of single entries and what else takes a few bytes."""


def described(optimizer: Lifecycle) -> dict[str, int]:
    """Bytes of state by kind, from its description."""
    optimizer.summary()
    sizes = dict.fromkeys(KINDS, 0)
    for bucket in optimizer._planned():
        for param in bucket.params:
            for name, spec in optimizer._state_of(param, bucket.view, bucket.group).items():
                if not is_counter(name):
                    sizes[kind(name)] += spec.nbytes
    return sizes


def kept(shadow: Optimizer) -> dict[str, int]:
    """Bytes of state by kind, of another package's optimizer: measured by stepping one parameter of every kind."""
    sizes = dict.fromkeys(KINDS, 0)
    for index, group in enumerate(shadow.param_groups):
        counts = Counter(kind_of(index, param) for param in group["params"])
        for key, param in {kind_of(index, param): param for param in group["params"]}.items():
            param.grad = torch.empty_like(param)
            shadow.step()
            param.grad = None
            for name, size in by_kind([shadow.state[param]]).items():
                sizes[name] += counts[key] * size
    return sizes


def by_kind(states: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of the state of parameters by kind, counters left out."""
    sizes = dict.fromkeys(KINDS, 0)
    for held in states:
        for name, value in held.items():
            if isinstance(value, Tensor) and not is_counter(name):
                sizes[kind(name)] += value.nbytes
    return sizes


def kind(name: str) -> str:
    """Which of `KINDS` a state tensor is, by its name."""
    if name == CORRECTION:
        return "corrections"
    if name.startswith("basis") and "exp_avg" not in name:
        return "bases"
    if name.endswith(SCALE):
        return "scales"
    return "moments" if "exp_avg" in name or name in ("momentum_buffer", "residual_avg") else "other"
