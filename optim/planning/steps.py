"""What a step of an optimizer allocates: its own code, run on meta tensors, which have no data."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.codec import work_dtype
from ..core.lifecycle import Lifecycle
from ..core.optimizer import SubspaceOptimizer
from ..core.state import zeros
from .watch import META, Watch

Kind = tuple[int, torch.Size, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Step:
    """Largest bytes that a step allocates beside weights, gradients and state, on a GPU.

    Args:
        plain: Of a step without a refresh, by torch's operations; fused kernels make no copies but `buffers`.
        refresh: Of a step in which every basis is found anew; None where there are no refreshes.
        buffers: The low-rank gradients R and directions N of the largest bucket, which every backend makes.
    """

    plain: int
    refresh: int | None
    buffers: int

    @property
    def largest(self) -> int:
        """The larger of both steps."""
        return max(self.plain, self.refresh or 0)


def without_data(optimizer: Optimizer, device: str) -> Optimizer:
    """Copy an optimizer: meta parameters, no state, and the forms (`fused`, `backend`) that the device would run."""
    memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}
    for group in optimizer.param_groups:
        for param in group["params"]:
            bare = param.detach().new_empty_strided(param.shape, param.stride(), device=META)
            memo[id(param)] = nn.Parameter(bare, requires_grad=param.requires_grad)
        if isinstance(group["lr"], Tensor):
            memo[id(group["lr"])] = 1e-3
    shadow = copy.deepcopy(optimizer, memo)
    for group in shadow.param_groups:
        if group.get("backend", "auto") != "auto":
            group["backend"] = "auto"
        if group.get("fused", True) is None and group.get("foreach") is None:
            if isinstance(shadow, Lifecycle):
                group["fused"] = True
            else:
                group["foreach"] = device != "cpu"
    return shadow


def kind_of(group: int, param: Tensor) -> Kind:
    """A key that is equal for parameters which are stepped alike."""
    return group, param.shape, param.dtype, param.stride()


def together(shadow: Optimizer) -> Step:
    """What a step of all parameters allocates."""
    return largest(_step_bytes(shadow, batch) for batch in _batches(shadow))


def alone(shadow: Optimizer) -> dict[Kind, Step]:
    """What steps of single parameters allocate, as gradient release takes them."""
    groups = enumerate(shadow.param_groups)
    kinds = {kind_of(index, param): param for index, group in groups for param in group["params"]}
    return {kind: _step_bytes(shadow, [param]) for kind, param in kinds.items()}


def _batches(shadow: Optimizer) -> list[list[Tensor]]:
    """Parameters that are stepped together, bucket by bucket; of buckets of one view and dtype the largest."""
    if not isinstance(shadow, Lifecycle):
        return [[param for group in shadow.param_groups for param in group["params"]]]
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for index, bucket in enumerate(shadow._planned()):
        if bucket.view is None:  # stepped one after the other
            found[index,] = list({kind_of(bucket.group, param): param for param in bucket.params}.values())
        else:
            alike = (bucket.group, bucket.view, bucket.params[0].dtype)
            found[alike] = max(found.get(alike, []), bucket.params, key=len)
    return list(found.values())


def _step_bytes(shadow: Optimizer, params: list[Tensor]) -> Step:
    """Step some parameters with a first basis, without a refresh, and with one that has an old basis and moments."""
    for param in params:
        param.grad = torch.empty_like(param)
    _allocate(shadow, params)
    first = _peak(shadow)
    plain = _peak(shadow) if isinstance(shadow, Lifecycle) else first
    waiting = [held for held in map(shadow.state.__getitem__, params) if "until_refresh" in held]
    for held in waiting:
        held["until_refresh"].zero_()
    refresh = max(first, _peak(shadow)) if waiting else None
    buffers = _buffers(shadow, params)
    for param in params:
        param.grad = None
    return Step(plain, refresh, buffers)


def _allocate(shadow: Optimizer, params: list[Tensor]) -> None:
    """Create state anew, so that a step is not charged with it."""
    shadow.state.clear()
    if not isinstance(shadow, Lifecycle):
        shadow.step()
        return
    chosen = set(params)
    for bucket in shadow._planned():
        for param in chosen.intersection(bucket.params):
            described = shadow._state_of(param, bucket.view, bucket.group)
            shadow.state[param] = zeros(described)


def _peak(shadow: Optimizer) -> int:
    with Watch() as watch:
        shadow.step()
    return watch.peak


def _buffers(shadow: Optimizer, params: list[Tensor]) -> int:
    """R and N of an optimizer that makes them."""
    sizes, own = [0], set(params)
    for bucket in shadow._planned() if isinstance(shadow, SubspaceOptimizer) else ():
        if bucket.view is not None:
            places = zip(bucket.params, bucket.positions, strict=True)
            count = min(bucket.most, sum(len(numbers) for param, numbers in places if param in own))
            a, r = bucket.view.low_shape
            sizes.append(2 * count * a * r * work_dtype(bucket.params[0].dtype).itemsize)
    return max(sizes)


def largest(steps: Iterable[Step]) -> Step:
    """The largest of every field."""
    every = list(steps)
    refreshes = [step.refresh for step in every if step.refresh is not None]
    return Step(
        max((step.plain for step in every), default=0),
        max(refreshes, default=None),
        max((step.buffers for step in every), default=0),
    )
