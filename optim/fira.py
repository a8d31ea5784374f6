"""Fira: full-rank training under low-rank constraint (arXiv 2410.01623)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core import residual
from .core.bucket import Bucket
from .core.optimizer import SubspaceOptimizer
from .core.residual import Scaling
from .core.spec import Spec
from .core.validate import check_choices
from .core.verbs import follow, inner, project, project_back_, refresh
from .core.view import MatrixView

CHOICES: dict[str, tuple[Any, ...]] = {"residual": (None, "exact", "official")}


class Fira(SubspaceOptimizer):
    """Fira: GaLore, plus the part of the gradient outside the subspace, scaled as the rule scaled the part inside.

    For a weight W oriented so that its gradient A (a x b) is projected from the right:

        P_t    = r leading right singular vectors of A_t, every T steps     (b, r)
        R_t    = A_t P_t                                                    (a, r)
        N_t    = rule(R_t)                                                  (a, r)
        phi_i  = |N_i| / |R_i|, a factor for every row i                    (a,)
        S_t    = phi o (A_t - R_t P_t^T)                                    (a, b)
        S_t    = S_t / L,  L = max(|S_t| / s, gamma) / gamma,  s = |S_t|    growth is limited to gamma
        W_t    = (1 - lr wd) W_{t-1} - lr scale (N_t P_t^T + S_t)

    S is never formed: `N P^T + s o (A - R P^T) = (N - s o R) P^T + s o A`, and its norm follows from row norms of A and
    R. State of a projected matrix: GaLore's and one number, `min(m,n) r + 2 max(m,n) r + 1`.

    Args:
        params: Parameters, groups or (name, parameter) pairs; see `GaLore`.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update.
        gamma: Largest growth of the residual's norm in a step; None does not limit it.
        scale_mode: "row" has a factor for every row of A (a column of W where it is projected from the left), "matrix"
            one for all. A `proj_type="full"` projection needs "matrix".
        residual: "exact" (the paper, default) or "official" (default of `compat="official"`): the authors' residual
            `A - scale R P^T`, added without `scale`.
        options: Every option of `GaLore`: `rank`, `update_proj_gap`, `scale`, `proj_type`, `projector`, ...

    Raises:
        ValueError: An option is out of range or unknown but close to a known one.

    Differences from the authors' code: the limiter's s is fp32 and a zero or non-finite s counts as none, so that a
    zero gradient does not lock it (`compat="official"` keeps the lock); with `residual="exact"`, `scale` is nothing but
    a factor of the learning rate.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float, float] = 1e-8,
        weight_decay: float = 1e-2,
        *,
        gamma: float | None = 1.01,
        scale_mode: str = "row",
        residual: str | None = None,
        **options: Any,
    ) -> None:
        self._declare(gamma=gamma, scale_mode=scale_mode, residual=residual)
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def update(self, b: Bucket) -> None:
        """One step of Fira on a bucket of same-shape matrices."""
        leak = b.hyper.scale if _leaks(self.param_groups[b.plan.group]) else 1.0
        how = Scaling.of(self.param_groups[b.plan.group], leak)
        refresh(b)  # P_t, every T steps                                       (b, r)
        low = project(b)  # R_t = A_t P_t                                      (k, a, r)
        step = inner(b, low)  # N_t = rule(R_t)                                (k, a, r)
        phi = residual.factors(b, step, low, how)  # phi_t / L                 (k, a)
        step.addcmul_(phi[..., None], low, value=-1.0)  # N - phi o R
        project_back_(b, step, rows=phi / leak)  # + phi o A
        follow(b, low)  # P_{t+1}, by projectors that move after the step

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        check_choices(group, CHOICES)
        residual.check(group)

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (*super()._structure(group), *residual.structure(group))

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        described = super()._specs(param, view, group)
        return described if view is None else described | residual.limit_spec(param)


def _leaks(group: dict[str, Any]) -> bool:
    """Whether the residual is the authors', `A - scale R P^T`, which takes out only a share of the subspace."""
    mode = group["residual"] or ("official" if group["compat"] == "official" else "exact")
    return bool(mode == "official")
