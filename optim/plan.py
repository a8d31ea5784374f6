"""What training with an optimizer takes in memory, known before anything is allocated.

State follows from its description. For GaLore with `state_dtype="8bit"` a projected weight (m, n) keeps

    basis      min(m, n) r                        elements of the weight's dtype, unless `basis_dtype` is another
    moments    2 max(m, n) r                      bytes of codes
    scales     8 max(m, n) ceil(r / 128)          bytes: fp32, one for 128 codes of a row, twice

with the default `proj_type="std"`, and a plain parameter of (rows, cols), a vector being one row of itself,

    moments    2 rows cols                        bytes of codes
    scales     8 rows ceil(cols / 128)            bytes
    or, of fewer than 4096 elements or with rows of fewer than 16,
    moments    8 rows cols                        bytes: fp32

What a step takes besides is measured: the optimizer's own code runs on tensors without data, every one of which is
counted while it lives.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import random
from .core.codec import SCALE, work_dtype
from .core.lifecycle import Lifecycle
from .core.optimizer import SubspaceOptimizer
from .core.state import is_counter, zeros
from .core.target import CORRECTION

KINDS = ("moments", "bases", "scales", "corrections", "other")
"""Kinds of state: `other` are limits, ages, indices of single entries and what else takes a few bytes."""

META = torch.device("meta")


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


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of training by what they hold.

    Args:
        weights: All parameters.
        gradients: One for every parameter.
        largest_gradient: The largest of them: about all that there is at a time with gradient release.
        moments: First and second moments, those of a basis included.
        bases: Projections and what they are coded with, or the indices that stand for them.
        scales: Scales of coded moments.
        corrections: What compensated bf16 weights keep.
        other: All other state, counters left out, which are a few numbers of the host.
        step: What a step of all parameters at once allocates.
        released: What the largest step of a single parameter allocates.
    """

    weights: int
    gradients: int
    largest_gradient: int
    moments: int
    bases: int
    scales: int
    corrections: int
    other: int
    step: Step
    released: Step

    @property
    def state(self) -> int:
        """All state that the optimizer keeps between steps."""
        return self.moments + self.bases + self.scales + self.corrections + self.other

    @property
    def total(self) -> int:
        """All but activations, in a loop that calls `step()`."""
        return self.weights + self.gradients + self.state + self.step.largest

    @property
    def total_released(self) -> int:
        """All but activations, with `enable_gradient_release`."""
        return self.weights + self.largest_gradient + self.state + self.released.largest


def plan(optimizer: Optimizer) -> Plan:
    """Tell what training with an optimizer takes, without allocating any of it.

        with torch.device("meta"):
            model = build()
        print(plan(GaLore(param_groups(model, rank=1024), state_dtype="8bit")).state)

    Args:
        optimizer: An optimizer of this package or of torch; its parameters may have data or none, and are not touched.

    Returns:
        Bytes, for training on one GPU. What a step allocates is that of torch's operations, in pieces of the size that
        a GPU gets: fused kernels allocate less.

    Raises:
        RuntimeError: Ranks are left to the gradients (`rank="auto"`) and not chosen yet.
    """
    if isinstance(optimizer, Lifecycle):
        state = _described(optimizer)  # first, as it refuses what is not decided yet
        shadow = _without_data(optimizer)
    else:
        shadow = _without_data(optimizer)
        state = _kept(shadow)
    params = [param for group in shadow.param_groups for param in group["params"]]
    every = _largest(_step_bytes(shadow, batch) for batch in _batches(shadow))
    released = _largest(_step_bytes(shadow, [param]) for param in _distinct(shadow))
    sizes = [param.nbytes for param in params]
    return Plan(
        weights=sum(sizes),
        gradients=sum(sizes),
        largest_gradient=max(sizes, default=0),
        **state,
        step=every,
        released=released,
    )


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors without data that are made inside and alive, and the most of them at a time.

    Questions that only data could answer are answered: a number is 1, every condition holds and chooses every entry.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()
        self._numbers = _no_numbers()

    def __enter__(self) -> Watch:
        self._numbers.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._numbers.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor) and tensor.is_meta]
        for tensor in given:
            self._known.add(tensor.untyped_storage()._cdata)
        answer = _answer(func, given[0], kwargs or {}) if given else None
        made = func(*args, **(kwargs or {})) if answer is None else answer
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _answer(func: Any, asked: Tensor, how: Mapping[str, Any]) -> Any:
    """What is asked of data: one number, the entries that are not zero, or a copy on the host."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        return 1.0 if asked.is_floating_point() else True if asked.dtype == torch.bool else 1
    if func is aten.nonzero.default:
        return asked.new_empty((asked.numel(), asked.ndim), dtype=torch.int64)
    if func is aten._to_copy.default and how.get("device") == torch.device("cpu"):
        return torch.ones(asked.shape, dtype=how.get("dtype") or asked.dtype)
    return None


def _without_data(optimizer: Optimizer) -> Optimizer:
    """A copy of an optimizer whose parameters have no data, and which has no state yet."""
    memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}
    for group in optimizer.param_groups:
        for param in group["params"]:
            memo[id(param)] = nn.Parameter(torch.empty_like(param, device=META), requires_grad=param.requires_grad)
        if isinstance(group["lr"], Tensor):
            memo[id(group["lr"])] = 1e-3
    shadow = copy.deepcopy(optimizer, memo)
    for group in shadow.param_groups:
        if group.get("backend", "auto") != "auto":
            group["backend"] = "auto"
        if group.get("fused"):
            group["fused"] = None
    return shadow


def _batches(shadow: Optimizer) -> list[list[Tensor]]:
    """Parameters that are stepped together; of buckets that are alike the first."""
    if not isinstance(shadow, Lifecycle):
        return [[param for group in shadow.param_groups for param in group["params"]]]
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for index, bucket in enumerate(shadow._planned()):
        if bucket.view is None:  # stepped one after the other
            found[index,] = list({_kind_of(param): param for param in bucket.params}.values())
        else:
            found.setdefault((bucket.group, bucket.view, bucket.params[0].dtype, len(bucket.params)), bucket.params)
    return list(found.values())


def _distinct(shadow: Optimizer) -> list[Tensor]:
    """One parameter of every kind."""
    groups = enumerate(shadow.param_groups)
    return list({(index, _kind_of(param)): param for index, group in groups for param in group["params"]}.values())


def _kind_of(param: Tensor) -> tuple[Any, ...]:
    return param.shape, param.dtype, param.stride()


def _step_bytes(shadow: Optimizer, params: list[Tensor]) -> Step:
    """Step some parameters with a first basis, without a refresh, and with one that has an old basis and moments."""
    for param in params:
        param.grad = torch.empty_like(param)
    _allocate(shadow, params)
    first, plain = _peak(shadow), _peak(shadow)
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


@contextmanager
def _no_numbers() -> Iterator[None]:
    """Random numbers without data are made at once: block by block, as others are, counting would take minutes."""
    before = {name: getattr(random, name) for name in ("normal", "signs")}
    for name, make in before.items():
        setattr(random, name, partial(_numbers, make))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(random, name, make)


def _numbers(make: Callable[..., Tensor], seed: int, rows: int | range, cols: int, device: Any = "cpu") -> Tensor:
    if torch.device(device) != META:
        return make(seed, rows, cols, device)
    return torch.empty((rows if isinstance(rows, int) else len(rows), cols), device=META)


def _buffers(shadow: Optimizer, params: list[Tensor]) -> int:
    """R and N of an optimizer that makes them."""
    sizes = [0]
    for bucket in shadow._planned() if isinstance(shadow, SubspaceOptimizer) else ():
        count = len(set(params).intersection(bucket.params))
        if bucket.view is not None:
            a, r = bucket.view.low_shape
            sizes.append(2 * count * a * r * work_dtype(bucket.params[0].dtype).itemsize)
    return max(sizes)


def _largest(steps: Iterable[Step]) -> Step:
    every = list(steps)
    refreshes = [step.refresh for step in every if step.refresh is not None]
    return Step(
        max((step.plain for step in every), default=0),
        max(refreshes, default=None),
        max((step.buffers for step in every), default=0),
    )


def _described(optimizer: Lifecycle) -> dict[str, int]:
    """Bytes of state by kind, from its description."""
    optimizer.summary()
    sizes = dict.fromkeys(KINDS, 0)
    for bucket in optimizer._planned():
        for param in bucket.params:
            for name, spec in optimizer._state_of(param, bucket.view, bucket.group).items():
                if not is_counter(name):
                    sizes[kind(name)] += spec.nbytes
    return sizes


def _kept(shadow: Optimizer) -> dict[str, int]:
    """Bytes of state by kind, of an optimizer that does not describe it: what a step of all parameters leaves."""
    params = [param for group in shadow.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.empty_like(param)
    shadow.step()
    for param in params:
        param.grad = None
    return by_kind(shadow.state.values())


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
