"""Adafactor's update of one parameter (arXiv 1804.04235), which `Adafactor` and `Flora` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import codec, factored, sides
from .codec import State
from .layout import ALONE, Layout
from .spec import Spec, counter
from .validate import check_adam, check_factored


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


def step_size(param: Tensor, t: int, o: Options, layout: Layout = ALONE) -> float | Tensor:
    """`alpha_t`, a device scalar where the parameter scale is in it."""
    lr = factored.relative_step(t, o.lr, warmup_init=o.warmup_init) if o.relative_step else o.lr
    if o.scale_parameter:
        lr = lr * factored.parameter_scale(param, o.eps[1], codec.work_dtype(param.dtype), layout)
    return lr


def precondition(grad: Tensor, held: State, t: int, o: Options, eps1: float, layout: Layout = ALONE) -> Tensor:
    """Update the second moment with G and return `U = G / sqrt(V)` in a tensor of its own."""
    fresh = 1.0 - factored.beta2(t, o.beta2_decay)
    floor = o.eps_mode == "floor"
    added = 0.0 if floor else eps1
    if "exp_avg_sq" in held:
        whole = held["exp_avg_sq"].lerp_(grad.square().add_(added), fresh)
        return (factored.floor_variance(whole.clone(), eps1) if floor else whole).rsqrt().mul_(grad)
    order = o.dims(tuple(grad.shape)) or tuple(range(grad.ndim))  # of a piece too small to factor by itself
    matrix, row, col = grad.permute(order), held["exp_avg_sq_row"], held["exp_avg_sq_col"]
    pair = sides.pair(layout, grad.ndim)
    factored.accumulate(matrix, (row, col), fresh, added, o.backend, pair)
    if floor:
        update = factored.precondition_floored(matrix, row, col, eps1, pair)
    else:
        update = factored.precondition(matrix, row, col, pair)
    return update.permute([order.index(d) for d in range(len(order))])


def whitened(grad: Tensor, held: State, t: int, o: Options, eps1: float, layout: Layout) -> factored.Whitened | None:
    """Update R and C with G (m, n); None where U cannot be made tile by tile, and then nothing has happened."""
    if grad.ndim != 2 or "exp_avg_sq" in held or o.eps_mode == "floor" or o.beta1 is not None:
        return None
    stats = held["exp_avg_sq_row"], held["exp_avg_sq_col"]
    factored.accumulate(grad, stats, 1.0 - factored.beta2(t, o.beta2_decay), eps1, o.backend, layout)
    return factored.Whitened(grad, *factored.whitening(*stats, layout))


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
