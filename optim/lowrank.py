"""`LowRank`: every part of the subspace core as an option, for combinations that no paper named."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core import free, residual, sparse
from .core.bucket import Bucket
from .core.optimizer import SubspaceOptimizer
from .core.residual import Scaling
from .core.spec import Spec
from .core.validate import check_choices
from .core.verbs import follow, inner, project, project_back_, refresh
from .core.view import MatrixView

NORM, FREE, SPARSE = ("norm", "channel"), ("signsgd", "sgd"), ("exact", "additive")
CHOICES: dict[str, tuple[Any, ...]] = {"residual": (None, *NORM, *FREE, *SPARSE)}

Group = dict[str, Any]


class LowRank(SubspaceOptimizer):
    """LowRank: projector x rule x residual x carry x state dtype, in any combination that makes sense.

    For a weight W oriented so that its gradient A (a x b) is projected from the right:

        P_t    = projector(A_t), every T steps                  (b, r)
        R_t    = A_t P_t                                        (a, r)
        N_t    = rule(R_t)                                      (a, r)
        W_t    = (1 - lr wd) W_{t-1} - lr scale (N_t P_t^T + S_t)

    and what becomes of `E_t = A_t - R_t P_t^T` is the slot `residual`:

        None          S = 0                                                     GaLore
        "norm"        S = phi o E / L,  phi_i = |N_i| / |R_i|                   Fira
        "channel"     S = phi o A / L - N P^T:  the gradient itself, rescaled   Fira's "only scaling"
        "signsgd"     S = residual_scale sign(E)                                FRUGAL
        "sgd"         S = residual_scale E                                      FRUGAL
        "exact"       Adam of its own on k entries of A, in the place of N P^T  GaLore+
        "additive"    Adam of its own on k entries of E                         GaLore+

    with L the limiter that keeps S from growing by more than gamma in a step. State of a projected matrix: that of the
    basis, of the rule on R, and of the residual: one number for "norm" and "channel", `4 k` bytes of indices and two
    moments of k entries for the last two.

    Args:
        params: Parameters, groups or (name, parameter) pairs; see `GaLore`.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update.
        residual: What is done with the part of the gradient outside the subspace; see above.
        residual_scale: Factor of a "signsgd" or "sgd" residual.
        gamma: Largest growth of a "norm" or "channel" residual in a step; None does not limit it.
        scale_mode: "row" has a factor phi for every row of A, "matrix" one for all.
        residual_density: Share of entries of an "exact" or "additive" residual.
        residual_warmup: Steps that find those entries.
        options: Every option of `GaLore`: `rank`, `update_proj_gap`, `scale`, `projector`, `rule`, `carry`, ...

    Raises:
        ValueError: An option is out of range, or the combination has no meaning; the message says why.
    """

    shards = True
    linear_between_refreshes = True  # groups with a residual are refused where it matters

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float, float] = 1e-8,
        weight_decay: float = 1e-2,
        *,
        residual: str | None = None,
        residual_scale: float = 1.0,
        gamma: float | None = 1.01,
        scale_mode: str = "row",
        residual_density: float = 0.01,
        residual_warmup: int = 20,
        **options: Any,
    ) -> None:
        self._declare(residual=residual, residual_scale=residual_scale, gamma=gamma, scale_mode=scale_mode)
        self._declare(residual_density=residual_density, residual_warmup=residual_warmup)
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def update(self, b: Bucket) -> None:
        """One step on a bucket of same-shape matrices."""
        group = self.param_groups[b.plan.group]
        support = _support(group, b.whole)
        with sparse.rebased(b, support):
            refresh(b)  # P_t, every T steps              (b, r)
        low = project(b)  # R_t = A_t P_t                 (k, a, r)
        sound = free.silence_(b, low) if group["residual"] in FREE else None
        step = inner(b, low)  # N_t = rule(R_t)           (k, a, r)
        entries = sparse.residual(b, low, support)  # Adam at k entries
        _descend_(b, (step, low), sound, group)  # W <- (1 - lr wd) W - lr scale (N P^T + S)
        sparse.write_(b, entries, support)
        follow(b, low)  # P_{t+1}, by projectors that move after the step

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        check_choices(group, CHOICES)
        kind = group["residual"]
        sparse.check({**group, "residual": kind if kind in SPARSE else None})
        if kind in NORM:
            residual.check(group)
        if not 0.0 <= group["residual_scale"] < float("inf"):
            raise ValueError(f"Invalid residual_scale: {group['residual_scale']}; need a number of at least 0")
        if kind in FREE and group["rule"] == "adafactor":
            raise ValueError(
                f"rule='adafactor' has the learning rate in its direction, residual={kind!r} has not: choose adamw, "
                "lion, rmsprop or sgd"
            )
        if kind in FREE and isinstance(group["num_heads"], (list, tuple)):
            raise ValueError(
                f"num_heads={group['num_heads']}: rows of several bases have no one P for residual={kind!r}; pass one "
                "number of heads, or another residual"
            )
        if kind is not None and group["compat"] is not None:
            raise ValueError(f"compat={group['compat']!r} follows code without residual={kind!r}: drop one of them")

    def _structure(self, group: Group) -> tuple[Any, ...]:
        return (*super()._structure(group), *residual.structure(group), group["residual"], group["residual_density"])

    def _specs_to_load(self, param: Tensor, view: MatrixView | None, group: int) -> dict[str, Spec]:
        described, options = super()._specs_to_load(param, view, group), self.param_groups[group]
        if view is None:
            return described
        return sparse.specs_to_load(described, _support(options, view), param, self._hyper(options))

    def _specs(self, param: Tensor, view: MatrixView | None, group: Group) -> dict[str, Spec]:
        described = super()._specs(param, view, group)
        if view is None:
            return described
        if group["residual"] in NORM:
            return described | residual.limit_spec(param)
        support, held = _support(group, view), self.state.get(param, {})
        if support.mode is None:
            return described
        return described | support.specs(param, view, self._hyper(group), chosen=sparse.INDEX in held)


def _support(group: Group, view: MatrixView) -> sparse.Support:
    kind = group["residual"]
    return sparse.Support.of({**group, "residual": kind if kind in SPARSE else None}, view)


def _descend_(b: Bucket, pair: tuple[Tensor, Tensor], sound: Tensor | None, group: Group) -> None:
    """Move the weights by N and the group's residual S; `pair` is (N, R), `sound` tells which gradients are finite."""
    kind, (step, low) = group["residual"], pair
    if kind in NORM:
        how = Scaling.of(group, leak=1.0 if kind == "norm" else 0.0)
        phi = residual.factors(b, step, low, how)
        if kind == "norm":
            step.addcmul_(phi[..., None], low, value=-1.0)  # N - phi o R
            project_back_(b, step, rows=phi)
        else:
            project_back_(b, None, rows=phi)
    elif sound is not None:
        free.descend_(b, step, low, sound, free.Free(kind, group["residual_scale"], complement=False))
    else:
        project_back_(b, step)
