"""Adafactor: adaptive learning rates with sublinear memory cost (arXiv 1804.04235)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels.rounding import ROUNDINGS
from .core import codec, factored
from .core.apply import move_
from .core.basis import State
from .core.bucket import Bucket
from .core.hyper import scalar
from .core.lifecycle import Lifecycle
from .core.spec import Spec, counter
from .core.target import writing
from .core.validate import check_adam, check_choices
from .core.view import MatrixView

CHOICES: dict[str, tuple[Any, ...]] = {
    "momentum_on": ("scaled_update", "update"),
    "decay_by": ("lr", "alpha", "one"),
    "eps_mode": ("square", "floor"),
    "factor_dims": ("last2", "largest2"),
    "momentum_dtype": codec.STATE_DTYPES,
    "rounding": ROUNDINGS,
}


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
    momentum_dtype: str
    rounding: str
    seed: int
    maximize: bool

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


class Adafactor(Lifecycle):
    """Adafactor: the second moment of a matrix is kept as the sums of its rows and columns.

    For a matrix X (m x n) with gradient G, in step t:

        rho_t   = min(lr, 1/sqrt(t))                    relative step
        alpha_t = max(eps2, rms(X_{t-1})) rho_t         parameter scale
        b2_t    = 1 - t^beta2_decay
        R_t     = b2_t R_{t-1} + (1-b2_t) rows(G^2 + eps1)        (m,)
        C_t     = b2_t C_{t-1} + (1-b2_t) columns(G^2 + eps1)     (n,)
        U_t     = G / sqrt(V_t),  V_t = R_t C_t^T / mean(R_t)     (m, n)
        X_t     = X_{t-1} - alpha_t U_t / max(1, rms(U_t) / d)

    with means for the paper's sums, which gives the same V. Vectors and scalars keep V whole. State of a matrix:
    `m + n` elements, `m n` more with momentum; more dimensions are a batch of matrices.

    Args:
        params: Parameters, groups or (name, parameter) pairs.
        lr: Learning rate, a number or a 1-element tensor, under any schedule and without caps; None (the paper) takes
            the relative step, with `group["lr"]` = 1e-2 as its cap.
        beta1: Momentum, an average of updates (not of gradients); None has none and stores none.
        beta2_decay: Exponent of the decay rate of the second moment.
        eps: eps1 added to the squared gradient, and eps2, the smallest parameter scale.
        clip_threshold: d, the largest root mean square of an update; None does not clip.
        weight_decay: Decoupled decay before the update, see `decay_by`.
        relative_step: Take rho_t; None means: where no `lr` is given.
        scale_parameter: Multiply the learning rate by max(eps2, rms(X)).
        warmup_init: With the relative step, its cap grows as 1e-6 t.
        momentum_on: Average "scaled_update" (alpha U, as the reference codes do) or "update" (U).
        decay_by: Decay by weight_decay times "lr" (the group's), "alpha" (alpha_t) or "one".
        eps_mode: "square" as above; "floor" bounds mean(R) by eps1 and V by eps1^2 instead, as torch does.
        factor_dims: Factor the "last2" dimensions or the "largest2", which is the rule that saves memory on
            convolutions.
        min_dim_size_to_factor: Keep V whole where a factored dimension is smaller.
        momentum_dtype: Dtype of the momentum, "float32" (fp64 for fp64 parameters), "bfloat16", "8bit", "bnb8",
            "parameter", or a torch.dtype; the statistics are fp32 always.
        rounding: How bf16 weights are written, see `GaLore`.
        seed: Seed of stochastic rounding.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: An option is out of range, unknown but close to a known one, or contradicts another.

    Differences from torch.optim.Adafactor: the update is invariant to the gradient's scale, statistics are fp32
    whatever the gradient's dtype, eps1 belongs to the parameter and not to its group, empty parameters are accepted,
    and no step synchronises with the device; `Adafactor.torch` has its formulas. `Adafactor.hf` has Hugging Face's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        beta1: float | None = None,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        weight_decay: float = 0.0,
        *,
        relative_step: bool | None = None,
        scale_parameter: bool = True,
        warmup_init: bool = False,
        momentum_on: str = "scaled_update",
        decay_by: str = "lr",
        eps_mode: str = "square",
        factor_dims: str = "last2",
        min_dim_size_to_factor: int = 0,
        momentum_dtype: str | torch.dtype = "float32",
        rounding: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        relative = lr is None if relative_step is None else relative_step
        if lr is None and not relative:
            raise ValueError("lr=None needs relative_step=True: pass a learning rate, or leave relative_step out")
        step = {"lr": 1e-2 if lr is None else lr, "relative_step": relative, "warmup_init": warmup_init}
        update = {"beta1": beta1, "momentum_on": momentum_on, "clip_threshold": clip_threshold}
        moment = {"beta2_decay": beta2_decay, "eps": eps, "eps_mode": eps_mode}
        decay = {"weight_decay": weight_decay, "decay_by": decay_by, "scale_parameter": scale_parameter}
        storage = {"factor_dims": factor_dims, "min_dim_size_to_factor": min_dim_size_to_factor}
        numerics = {"momentum_dtype": momentum_dtype, "rounding": rounding, "seed": seed, "maximize": maximize}
        super().__init__(params, step | update | moment | decay | storage | numerics)

    @classmethod
    def torch(
        cls,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        **options: Any,
    ) -> Adafactor:
        """Construct with the signature and the formulas of torch.optim.Adafactor.

        Raises:
            ValueError: `foreach=True`; there is one form, whose results equal both of torch's.
        """
        if foreach:
            raise ValueError("foreach=True is not supported: drop it, there is one form of this optimizer")
        preset: dict[str, Any] = {"beta2_decay": beta2_decay, "eps": eps, "clip_threshold": d}
        preset |= {"weight_decay": weight_decay, "decay_by": "lr", "relative_step": True, "eps_mode": "floor"}
        return cls(params, lr, **preset | options)

    @classmethod
    def hf(
        cls,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **options: Any,
    ) -> Adafactor:
        """Construct with the signature and the formulas of transformers' (and fairseq's) Adafactor.

        Raises:
            ValueError: `lr` with `relative_step=True`, as there.
        """
        if lr is not None and relative_step:
            raise ValueError(f"lr={lr} contradicts relative_step=True: pass relative_step=False or lr=None")
        preset: dict[str, Any] = {"beta1": beta1, "beta2_decay": decay_rate, "eps": eps}
        preset |= {"clip_threshold": clip_threshold, "weight_decay": weight_decay, "decay_by": "alpha"}
        preset |= {"relative_step": relative_step, "scale_parameter": scale_parameter, "warmup_init": warmup_init}
        return cls(params, lr, **preset | options)

    def plain(self, b: Bucket) -> None:
        """One step of Adafactor, parameter by parameter."""
        torch._foreach_add_([held["step"] for held in b.states], 1)
        options = self._hyper(self.param_groups[b.plan.group])
        for index in range(len(b.params)):
            self._step_one(b, index, options)

    @staticmethod
    def _step_one(b: Bucket, index: int, o: Options) -> None:
        param, held, work = b.params[index], b.states[index], b.dtype
        grad = -b.grads[index] if o.maximize else b.grads[index]
        t = int(held["step"])
        alpha = step_size(param, t, o)  # alpha_t = max(eps2, rms(X)) rho_t
        update = precondition(grad.to(work), held, t, o, o.eps1(param.dtype))  # U_t = G / sqrt(V_t)
        factored.clip_(update, o.clip_threshold)  # U_t / max(1, rms(U_t) / d)
        if o.momentum_on == "scaled_update":
            update.mul_(alpha)
        if o.beta1 is not None:
            moment = codec.load(held, "exp_avg", o.momentum_dtype, work).lerp_(update, 1 - o.beta1)
            if moment is held["exp_avg"]:
                update = moment.clone()
            else:
                codec.store(held, "exp_avg", moment, o.momentum_dtype)
                update = moment
        if o.momentum_on == "update":
            update.mul_(alpha)
        rate = {"lr": o.lr, "alpha": alpha, "one": 1.0}[o.decay_by]
        for target in writing(param, held, o, b.positions[index]):
            move_(target, codec.matrix(update), 1 - o.weight_decay * rate if o.weight_decay else 1.0)

    def _validate(self, group: dict[str, Any]) -> None:
        check_choices(group, CHOICES)
        check_update(group)
        smallest = group["min_dim_size_to_factor"]
        if not isinstance(smallest, int) or smallest < 0:
            raise ValueError(f"Invalid min_dim_size_to_factor: {smallest}; need an integer of at least 0")
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("warmup_init=True needs relative_step=True: leave out lr, or warmup_init")

    def _hyper(self, group: dict[str, Any]) -> Options:
        return Options(**{field.name: scalar(group[field.name]) for field in fields(Options)})

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["beta1"] is None, group["factor_dims"], group["min_dim_size_to_factor"])

    def _view(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        return None

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        return specs(param, self._hyper(group))


def check_update(group: dict[str, Any]) -> None:
    """Validate what all optimizers with Adafactor's update share."""
    if group["lr"] is None:
        raise ValueError("Invalid learning rate: None in a group; give a number, or lr=None to the constructor alone")
    check_adam(group)
    beta1, d, eps = (group[name] for name in ("beta1", "clip_threshold", "eps"))
    if not isinstance(eps, (tuple, list)) or len(eps) != 2 or eps[1] is None:
        raise ValueError(f"Invalid eps: {eps}; need the pair (eps1 or None, eps2), as (1e-30, 1e-3)")
    if beta1 is not None and not 0.0 <= beta1 < 1.0:
        raise ValueError(f"Invalid beta1: {beta1}; need 0 <= beta1 < 1, or None for no momentum")
    if not group["beta2_decay"] <= 0.0:
        raise ValueError(f"Invalid beta2_decay: {group['beta2_decay']}; need an exponent of at most 0, as -0.8")
    if d is not None and not d > 0.0:
        raise ValueError(f"Invalid clip_threshold: {d}; need a positive number, or None to not clip")


def step_size(param: Tensor, t: int, o: Options) -> float | Tensor:
    """`alpha_t`, a device scalar where the parameter scale is in it."""
    lr = factored.relative_step(t, o.lr, warmup_init=o.warmup_init) if o.relative_step else o.lr
    if o.scale_parameter:
        lr = lr * factored.parameter_scale(param, o.eps[1], codec.work_dtype(param.dtype))
    return lr


def precondition(grad: Tensor, held: State, t: int, o: Options, eps1: float) -> Tensor:
    """Update the second moment with G and return `U = G / sqrt(V)` in a tensor of its own."""
    fresh = 1.0 - factored.beta2(t, o.beta2_decay)
    floor = o.eps_mode == "floor"
    added = 0.0 if floor else eps1
    order = o.dims(tuple(grad.shape))
    if order is None:
        whole = held["exp_avg_sq"].lerp_(grad.square().add_(added), fresh)
        return (factored.floor_variance(whole.clone(), eps1) if floor else whole).rsqrt().mul_(grad)
    matrix, row, col = grad.permute(order), held["exp_avg_sq_row"], held["exp_avg_sq_col"]
    factored.accumulate(matrix, row, col, fresh, added)
    if floor:
        update = factored.precondition_floored(matrix, row, col, eps1)
    else:
        update = factored.precondition(matrix, row, col)
    return update.permute([order.index(d) for d in range(len(order))])


def specs(param: Tensor, o: Options) -> dict[str, Spec]:
    """Describe the state of a parameter."""
    shape, order = tuple(param.shape), o.dims(tuple(param.shape))
    work = codec.work_dtype(param.dtype)
    if order is None:
        statistics = {"exp_avg_sq": shape}
    else:
        turned = tuple(shape[d] for d in order)
        statistics = {"exp_avg_sq_row": turned[:-1], "exp_avg_sq_col": turned[:-2] + turned[-1:]}
    described = {name: Spec(size, work, param.device) for name, size in statistics.items()}
    if o.beta1 is not None:
        described |= codec.specs("exp_avg", shape, param, o.momentum_dtype)
    return {"step": counter(), **described}
