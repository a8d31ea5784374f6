"""Adafactor: adaptive learning rates with sublinear memory cost (arXiv 1804.04235)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels import EVERYWHERE
from ..kernels.rounding import ROUNDINGS, Target
from ..kernels.tiles import tiles
from .core import codec
from .core.adafactor import Options, StepSize, check_update, rate_options, specs, step_sizes, whiten
from .core.apply import move_
from .core.bucket import Bucket
from .core.codec import State
from .core.counts import tally
from .core.factored import Whitened
from .core.hyper import scalar
from .core.lifecycle import Lifecycle
from .core.spec import Spec
from .core.target import writing
from .core.together import Make, Recipe, buckets
from .core.validate import check_choices
from .core.view import MatrixView

CHOICES: dict[str, tuple[Any, ...]] = {
    "momentum_on": ("scaled_update", "update"),
    "decay_by": ("lr", "alpha", "one"),
    "eps_mode": ("square", "floor"),
    "factor_dims": ("last2", "largest2"),
    "state_dtype": codec.STATE_DTYPES,
    "rounding": ROUNDINGS,
    "backend": EVERYWHERE,
}


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
        lr: Learning rate, a number or a 1-element tensor; a schedule may set any value. None (the paper) takes the
            relative step, whose cap is then `group["lr"]` = 1e-2.
        beta1: Decay rate of a momentum, which averages updates (not gradients); None, the default, keeps none.
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
        factor_dims: Factor the "last2" dimensions, or the "largest2", which saves memory on convolutions.
        min_dim_size_to_factor: Keep V whole where a factored dimension is smaller.
        state_dtype: Dtype of the momentum, "float32" (fp64 for fp64 parameters), "bfloat16", "8bit", "bnb8",
            "parameter", or a torch.dtype; the statistics are fp32 always.
        rounding: How bf16 weights are written, see `GaLore`.
        seed: Seed of stochastic rounding.
        maximize: Ascend instead of descend.
        backend: "auto", or the only kernel backend to compute statistics with.

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
        state_dtype: str | torch.dtype = "float32",
        rounding: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        step = {**rate_options(lr, relative_step), "warmup_init": warmup_init}
        update = {"beta1": beta1, "momentum_on": momentum_on, "clip_threshold": clip_threshold}
        moment = {"beta2_decay": beta2_decay, "eps": eps, "eps_mode": eps_mode}
        decay = {"weight_decay": weight_decay, "decay_by": decay_by, "scale_parameter": scale_parameter}
        storage = {"factor_dims": factor_dims, "min_dim_size_to_factor": min_dim_size_to_factor}
        numerics = {"state_dtype": state_dtype, "rounding": rounding, "seed": seed, "maximize": maximize}
        numerics["backend"] = backend
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
        """One step of Adafactor: parameter by parameter, or where sharded bucket by bucket, to share collectives."""
        options = self._hyper(self.param_groups[b.plan.group])
        for batch in buckets(b):
            _step(batch, options)

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
        names = ("factor_dims", "min_dim_size_to_factor", "state_dtype")
        return (group["beta1"] is None, *(group[name] for name in names))

    def _view(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        return None

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        return specs(param, self._hyper(group))


def _step(b: Bucket, o: Options) -> None:
    counts, eps1 = tally(b.states), o.eps1(b.params[0].dtype)
    white = whiten(b.grads, b.states, counts, o, eps1, b.layout)  # U_t = G / sqrt(V_t)
    if o.beta1 is not None or not isinstance(white[0], Whitened) or white[0].grad.ndim != 2:
        white = [Recipe(make, keep=b.layout.alone) for make in white]
    for index, size in enumerate(step_sizes(b, counts, white, o)):  # alpha_t, max(1, rms(U_t) / d)
        _move(b, index, white[index], size, o)


def _move(b: Bucket, index: int, white: Make, size: StepSize, o: Options) -> None:
    """`X_t = decay X_{t-1} - alpha_t U_t / max(1, rms(U_t) / d)`, with momentum an average of such updates."""
    (alpha, clip), held = size, b.states[index]
    rate = {"lr": o.lr, "alpha": alpha, "one": 1.0}[o.decay_by]
    decay = 1 - o.weight_decay * rate if o.weight_decay else 1.0
    update = white if isinstance(white, Whitened) else _update(white(), size, held, o)
    for target in writing(b.params[index], held, o, b.positions[index], box=b.layout.box):
        if isinstance(update, Whitened):
            factor = -alpha if o.maximize else alpha
            _move_in_tiles(target, update, factor if clip is None else factor / clip, decay)
        else:
            move_(target, codec.matrix(update), decay)


def _move_in_tiles(target: Target, white: Whitened, factor: float | Tensor, decay: float | Tensor) -> None:
    """`W <- decay W - factor U` without a temporary of the weight's size."""
    for rows, cols in tiles(target.weight):
        move_(target.part(rows, cols), white.part(rows, cols).mul_(factor), decay)


def _update(update: Tensor, size: StepSize, held: State, o: Options) -> Tensor:
    """alpha_t times the clipped U_t, or the average of such updates; overwrites U_t."""
    alpha, clip = size
    if clip is not None:
        update.div_(clip)
    if o.maximize:
        update.neg_()
    if o.momentum_on == "scaled_update":
        update.mul_(alpha)
    if o.beta1 is not None:
        moment = codec.load(held, "exp_avg", o.state_dtype, update.dtype).lerp_(update, 1 - o.beta1)
        if moment is not held["exp_avg"]:
            codec.store(held, "exp_avg", moment, o.state_dtype)
        update.copy_(moment)
    return update.mul_(alpha) if o.momentum_on == "update" else update
