"""Flora: low-rank adapters are secretly gradient compressors (arXiv 2402.03293)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels import EVERYWHERE
from ..kernels.rounding import ROUNDINGS
from .core import adafactor, codec
from .core.bucket import Bucket
from .core.codec import State
from .core.counts import tally
from .core.hyper import scalar
from .core.lifecycle import Lifecycle
from .core.linalg import product_in
from .core.seeded import DISTRIBUTIONS, SeededBasis, bases, shortest_window
from .core.spec import Spec, counter
from .core.together import Recipe, buckets, reduced, stacked
from .core.validate import check_choices, check_rank
from .core.view import SIDES, MatrixView, matrix_shape, rank_of
from .core.whitened import blend_, move_whitened, whiten

CHOICES: dict[str, tuple[Any, ...]] = {
    "distribution": DISTRIBUTIONS,
    "proj_type": tuple(side for side in SIDES if side != "full"),
    "state_dtype": codec.STATE_DTYPES,
    "rounding": ROUNDINGS,
    "backend": EVERYWHERE,
}

FIXED = {"momentum_on": "update", "decay_by": "alpha", "eps_mode": "square", "warmup_init": False}
FIXED |= {"factor_dims": "last2", "min_dim_size_to_factor": 0}
"""Options of Adafactor that have one value in Flora."""


@dataclass(frozen=True, slots=True)
class Options(adafactor.Options):
    """Live options of one group, documented by `Flora`."""

    rank: int | None
    density: float | None
    update_proj_gap: int
    distribution: str
    proj_type: str


class Flora(Lifecycle):
    """Flora: Adafactor whose momentum is compressed by random bases that are never stored.

    For a weight W (m x n) with gradient G, oriented so that the smaller side is projected from the right:

        U_t     = G_t / sqrt(V_t), V_t factored as in Adafactor              (a, b)
        P_t     = random(seed, parameter, floor(t / T)), E[P P^T] = I        (b, r)
        Ubar_t  = (1 - b1) U_t + b1 C_{t-1} P_{t-1}^T                        (a, b)
        C_t     = b1 C_{t-1} (P_{t-1}^T P_t) + (1 - b1) U_t P_t              (a, r)
        alpha_t = max(eps2, rms(W_{t-1})) lr
        W_t     = (1 - alpha_t wd) W_{t-1} - alpha_t Ubar_t / max(1, rms(Ubar_t) / d)

    Only the history is compressed, the current gradient counts in full. Within a window of T steps C keeps its basis
    and the factor P_{t-1}^T P_t is left out. State of a matrix: `max(m,n) r + m + n` elements.

    Args:
        params: Parameters, groups or (name, parameter) pairs; `kappa` (the paper's T) and `density` are accepted in
            groups too.
        lr: Learning rate, a number or a 1-element tensor; None takes Adafactor's relative step, capped at 1e-2.
        beta1: b1, decay rate of the momentum; None has none, which is Adafactor.
        beta2_decay: Exponent of the decay rate of the second moment, 1 - t^beta2_decay.
        eps: eps1 added to the squared gradient, and eps2, the smallest parameter scale.
        clip_threshold: d, the largest root mean square of an update; None does not clip.
        weight_decay: Decoupled, by `alpha_t weight_decay`.
        rank: r. If any group names a rank, groups that do not are plain; otherwise it applies to every weight of at
            least two dimensions (viewed as first x rest) whose smaller side exceeds it. Plain is the same with P = I.
        update_proj_gap: Steps T of a window. A change of basis adds noise, which short windows would pile up.
        distribution: "rademacher" (least noise of independent entries), "gaussian" (the paper) or "orthonormal".
        proj_type: Side that is projected: "std" (the smaller), "reverse_std", "left" or "right".
        relative_step: Learning rate min(lr, 1/sqrt(t)); None means: where no `lr` is given.
        scale_parameter: Multiply the learning rate by max(eps2, rms(W)).
        state_dtype: Dtype of the momentum: "float32" (fp64 for fp64 parameters), "bfloat16", "8bit", ...
        rounding: How bf16 weights are written, see `GaLore`.
        seed: Seed of the bases, which are a function of it, of parameter order and of step.
        maximize: Ascend instead of descend.
        backend: "auto", or the only kernel backend to make bases with.

    Raises:
        ValueError: An option is out of range, or windows are so short that the momentum would grow without bound,
            `b1^T sqrt((b + r - 1) / r) >= 1` (rademacher).

    Differences from the authors' code: defaults compress (there none is the default); bases are the same on every
    device and after a resume; a change of basis costs r x r instead of m x n; all shapes and aspect ratios are
    compressed; a gradient that is not finite counts as zero instead of destroying the state.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        beta1: float | None = 0.9,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 1000,
        distribution: str = "rademacher",
        proj_type: str = "std",
        relative_step: bool | None = None,
        scale_parameter: bool = True,
        state_dtype: str | torch.dtype = "float32",
        rounding: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        step = {**adafactor.rate_options(lr, relative_step), "scale_parameter": scale_parameter}
        update = {"beta1": beta1, "beta2_decay": beta2_decay, "eps": eps, "clip_threshold": clip_threshold}
        subspace = {"rank": rank, "update_proj_gap": update_proj_gap, "distribution": distribution, "seed": seed}
        storage: dict[str, Any] = {"proj_type": proj_type, "state_dtype": state_dtype, "backend": backend}
        storage |= {"rounding": rounding, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, step | update | subspace | storage)

    def update(self, b: Bucket) -> None:
        """One step of Flora, the box above: by matrix, or where sharded by bucket, to share collectives."""
        o = self._hyper(self.param_groups[b.plan.group])
        for batch in buckets(b):
            _compressed(batch, o)

    def plain(self, b: Bucket) -> None:
        """The same with P = I, for parameters that are not compressed."""
        o = self._hyper(self.param_groups[b.plan.group])
        for batch in buckets(b):
            _plain(batch, o)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see `Lifecycle.add_param_group`; windows that are too short for a matrix are refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                self._sees(param, group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _validate(self, group: dict[str, Any]) -> None:
        check_choices(group, CHOICES)
        adafactor.check_update(group)
        if isinstance(group["rank"], str):
            raise ValueError(f"rank={group['rank']!r} is not for random bases: pass a number, as rank=128")
        check_rank(group)

    def _hyper(self, group: dict[str, Any]) -> Options:
        values = {"density": None, **group, **FIXED}
        return Options(**{field.name: scalar(values[field.name]) for field in fields(Options)})

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        names = ("rank", "density", "proj_type", "update_proj_gap", "distribution", "state_dtype")
        return (group["beta1"] is None, *(group.get(name) for name in names))

    def _view(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        o = self._hyper(group)
        shape = matrix_shape(param.shape) if param.ndim >= 2 else (0, 0)
        rank = rank_of(shape, o.rank, o.density)
        if o.beta1 is None or rank is None or rank >= min(shape):
            return None
        view = MatrixView.of(param.shape, rank, o.proj_type)
        least = shortest_window(o.distribution, view.b, rank, o.beta1)
        if o.update_proj_gap < least:
            raise ValueError(
                f"update_proj_gap={o.update_proj_gap}: a {o.distribution} basis of rank {rank} that changes so often "
                f"makes the momentum of a {tuple(param.shape)} parameter grow without bound (beta1={o.beta1}); pass "
                f"update_proj_gap={least} or more, or a larger rank"
            )
        return view

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        o = self._hyper(group)
        if view is None:
            return adafactor.specs(param, o)
        work = codec.work_dtype(param.dtype)
        return {
            "step": counter(),
            "basis_key": Spec((), torch.int64, torch.device("cpu")),
            "exp_avg_sq_row": Spec((view.m,), work, param.device, axis="m"),
            "exp_avg_sq_col": Spec((view.n,), work, param.device, axis="n"),
            **codec.specs("exp_avg", view.low_shape, param, o.state_dtype, "kept"),
        }


def _compressed(b: Bucket, o: Options) -> None:
    """One step on matrices with a compressed momentum, in the order of Flora's box."""
    layout, beta1, every = b.layout, o.beta1 or 0.0, range(len(b.params))
    gemm = b.params[0].dtype if b.params[0].dtype == torch.bfloat16 else b.dtype
    counts = tally(b.states)
    white = whiten(b, counts, o)  # U_t = G_t / sqrt(V_t)                                              (m, n)
    places = zip(b.positions, counts, strict=True)
    now = [SeededBasis.of(b.whole, o.distribution, o.seed, at, t // o.update_proj_gap) for at, t in places]
    old, new = bases(b, now, o.backend)  # P_{t-1}, P_t                                                (b, r)
    images = (product_in(gemm, b.view.orient(white[index]()), new[index]()) for index in every)
    low = layout.reduce(stacked([*images]))  # U_t P_t                                                 (a, r)
    moments = [codec.load(held, "exp_avg", o.state_dtype, b.dtype) for held in b.states]  # C_{t-1}    (a, r)
    past = layout.gather(stacked(moments), b.view.a).unbind() if layout.dealt else tuple(moments)

    def blended(index: int) -> Tensor:
        """(1-b1) U_t + b1 C_{t-1} P_{t-1}^T (a, b), in place of U_t."""
        update = white[index]()
        blend_(b.view.orient(update), past[index].to(gemm), old[index]().to(gemm), beta1)
        return update

    updates = [Recipe(partial(blended, index), keep=layout.alone) for index in every]
    moved = [index for index in every if old[index] is not new[index]]
    turns = reduced(layout.sum_cols, [old[index]().T @ new[index]() for index in moved])
    for index, turn in zip(moved, turns, strict=True):
        moments[index] = moments[index] @ turn  # C_{t-1} P_{t-1}^T P_t                                (a, r)
    for index, (held, size) in enumerate(zip(b.states, adafactor.step_sizes(b, counts, updates, o), strict=True)):
        move_whitened(b, index, updates[index](), size, o)  # W <- (1 - alpha wd) W - alpha clip(Ubar)
        codec.store(held, "exp_avg", torch.lerp(moments[index], low[index], 1 - beta1), o.state_dtype)  # C_t


def _plain(b: Bucket, o: Options) -> None:
    """One step on parameters with an ordinary momentum M, or none."""
    counts = tally(b.states)
    updates = whiten(b, counts, o)
    if o.beta1 is not None:
        averages = (partial(_average, make, held, o) for make, held in zip(updates, b.states, strict=True))
        updates = [Recipe(make, keep=b.layout.alone) for make in averages]
    for index, (held, size) in enumerate(zip(b.states, adafactor.step_sizes(b, counts, updates, o), strict=True)):
        update = updates[index]()
        if o.beta1 is not None:
            codec.store(held, "exp_avg", update, o.state_dtype)
        move_whitened(b, index, update, size, o)
        del update  # so that only one exists at a time


def _average(white: Recipe, held: State, o: Options) -> Tensor:
    """(1-b1) U_t + b1 M_{t-1}, in place of U_t."""
    update = white()
    moment = codec.load(held, "exp_avg", o.state_dtype, update.dtype)
    return torch.lerp(moment, update, 1 - (o.beta1 or 0.0), out=update)
