"""Adafactor's update (arXiv 1804.04235), which `Adafactor` and `Flora` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import codec, factored, sides
from .codec import State
from .layout import Layout
from .spec import Spec, counter
from .together import Make
from .validate import check_adam, check_factored

if TYPE_CHECKING:
    from .bucket import Bucket

StepSize = tuple[float | Tensor, Tensor | None]
"""What scales an update U: alpha_t, and `max(1, rms(U) / d)` by which U is divided, None without clipping."""


@dataclass(frozen=True, slots=True)
class Options:
    """Live options of one group, documented by `Adafactor`."""

    lr: float | Tensor
    relative_step: bool
    scale_parameter: bool
    warmup_init: bool
    beta1: float | None
    momentum_on: str
    beta2_decay: float
    eps: tuple[float | None, float]
    eps_mode: str
    clip_threshold: float | None
    weight_decay: float
    decay_by: str
    factor_dims: str
    min_dim_size_to_factor: int
    state_dtype: str
    rounding: str
    seed: int
    maximize: bool
    backend: str

    def eps1(self, dtype: torch.dtype) -> float:
        """The regulariser of the second moment; None is the resolution of the parameter's dtype, as in torch."""
        return torch.finfo(dtype).eps if self.eps[0] is None else self.eps[0]

    def dims(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Order of dimensions that puts the factored pair last; None where V is kept whole."""
        order = list(range(len(shape)))
        if self.factor_dims == "largest2":
            pair = sorted(sorted(order, key=lambda d: shape[d])[-2:])
            order = [d for d in order if d not in pair] + pair
        small = len(shape) < 2 or min(shape[d] for d in order[-2:]) < self.min_dim_size_to_factor
        return None if small else tuple(order)


def rate_options(lr: float | Tensor | None, relative_step: bool | None) -> dict[str, Any]:
    """The options `lr` and `relative_step` for what a constructor was given: without a rate a relative one, cap 1e-2.

    Raises:
        ValueError: There is neither a rate nor a relative step.
    """
    relative = lr is None if relative_step is None else relative_step
    if lr is None and not relative:
        raise ValueError("lr=None needs relative_step=True: pass a learning rate, or leave relative_step out")
    return {"lr": 1e-2 if lr is None else lr, "relative_step": relative}


def check_update(group: dict[str, Any]) -> None:
    """Validate what all optimizers with Adafactor's update share."""
    if group["lr"] is None:
        raise ValueError("Invalid learning rate: None in a group; give a number, or lr=None to the constructor alone")
    check_adam(group)
    beta1, eps = group["beta1"], group["eps"]
    if not isinstance(eps, (tuple, list)) or len(eps) != 2 or eps[1] is None:
        raise ValueError(f"Invalid eps: {eps}; need the pair (eps1 or None, eps2), as (1e-30, 1e-3)")
    if beta1 is not None and not 0.0 <= beta1 < 1.0:
        raise ValueError(f"Invalid beta1: {beta1}; need 0 <= beta1 < 1, or None for no momentum")
    check_factored(group)


def step_sizes(b: Bucket, counts: Sequence[int], updates: Sequence[Make], o: Options) -> list[StepSize]:
    """`alpha_t` and the clipping of updates of parameters of one shape; tensors where they follow from the weights."""
    alphas = factored.learning_rates(o, counts, b.params, o.eps[1], b.dtype, b.layout)
    clips = factored.clip_factors(updates, o.clip_threshold, b.layout)
    return list(zip(alphas, clips, strict=True))


def whiten(
    grads: Sequence[Tensor], states: Sequence[State], counts: Sequence[int], o: Options, eps1: float, layout: Layout
) -> list[Make]:
    """Update the second moments of parameters of one shape with G; return functions that make `U = G / sqrt(V)`."""
    fresh = [1.0 - factored.beta2(t, o.beta2_decay) for t in counts]
    floor = o.eps_mode == "floor"
    added = 0.0 if floor else eps1
    if "exp_avg_sq" in states[0]:
        seconds = [held["exp_avg_sq"] for held in states]
        for grad, second, weight in zip(grads, seconds, fresh, strict=True):
            second.lerp_(grad.to(second.dtype).square().add_(added), weight)
        return [partial(_by_entries, *one, eps1 if floor else None) for one in zip(grads, seconds, strict=True)]
    ndim = grads[0].ndim
    order = o.dims(tuple(grads[0].shape)) or tuple(range(ndim))  # the whole is factored, a piece of it may be too small
    matrices = [grad.permute(order) for grad in grads]
    stats = [(held["exp_avg_sq_row"], held["exp_avg_sq_col"]) for held in states]
    pair = sides.pair(layout, ndim)
    factored.accumulate(matrices, stats, fresh, added, o.backend, pair)
    made: Sequence[Make]
    if floor:
        averages = factored.means([row for row, _ in stats], pair)
        made = [
            partial(factored.precondition_floored, grad, *both, average, eps1)
            for grad, both, average in zip(matrices, stats, averages, strict=True)
        ]
    else:
        made = factored.whitened(matrices, stats, pair)
    turned = order != tuple(range(ndim))
    return [partial(_turned_back, make, order) for make in made] if turned else list(made)


def _by_entries(grad: Tensor, second: Tensor, floor: float | None) -> Tensor:
    """`G / sqrt(V)` for a V that is kept whole."""
    root = second.rsqrt() if floor is None else factored.floor_variance(second.clone(), floor).rsqrt_()
    return root.mul_(grad)


def _turned_back(make: Make, order: tuple[int, ...]) -> Tensor:
    return make().permute([order.index(d) for d in range(len(order))])


def specs(param: Tensor, o: Options) -> dict[str, Spec]:
    """Describe the state of a parameter."""
    shape, order = tuple(param.shape), o.dims(tuple(param.shape))
    work = codec.work_dtype(param.dtype)
    if order is None:
        statistics = {"exp_avg_sq": shape}
    else:
        turned = tuple(shape[d] for d in order)
        statistics = {"exp_avg_sq_row": turned[:-1], "exp_avg_sq_col": turned[:-2] + turned[-1:]}
    axes = sides.axes(len(shape))
    described = {
        name: Spec(size, work, param.device, axis=axes.get(name, "param")) for name, size in statistics.items()
    }
    if o.beta1 is not None:
        described |= codec.specs("exp_avg", shape, param, o.state_dtype)
    return {"step": counter(), **described}
