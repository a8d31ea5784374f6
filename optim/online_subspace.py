"""Online Subspace Descent (arXiv 2408.12857)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core.bucket import Bucket
from .core.optimizer import SubspaceOptimizer
from .core.verbs import follow, inner, project, project_back_, refresh


class OnlineSubspaceDescent(SubspaceOptimizer):
    """Online Subspace Descent: the basis follows the gradient by one descent step of online PCA in every step.

    For a weight W oriented so that its gradient A (a x b) is projected from the right:

        R_t     = A_t P_t                                               (a, r)
        N_t     = rule(R_t)                                             (a, r)
        W_t     = (1 - lr wd) W_{t-1} - lr scale N_t P_t^T
        L(P)    = |A P P^T - A|^2 / |A|^2 + ortho |P^T P - I|^2
        P_{t+1} = (1 - e wd_P) P_t - e rule_P(grad L(P_t)),  e = proj_ratio lr

    P_1 is the dominant subspace of the first gradient. The gradient of L is in closed form: R serves again, and one
    product A^T R more a step replaces every decomposition. Moments are not rotated, by design.

    State of a projected matrix: `min r + 2 max r` for GaLore's part, and for P's own rule `2 min r` (adam), `min r`
    (lion), `min + r` (adafactor) or nothing (sgd), with P in fp32.

    Args:
        params: Parameters, groups or (name, parameter) pairs; see `GaLore`.
        lr: Learning rate, of the basis too: a schedule moves both.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update.
        scale: Factor of the learning rate of projected matrices; the paper has none.
        proj_rule: Optimizer of the basis: "adam", "sgd", "lion" or "adafactor".
        proj_init: How P_1 is found: "sketch" or "svd" of the first gradient, or "random".
        proj_ratio: Learning rate of the basis over that of the weights.
        proj_betas: Decay rates of the basis' optimizer; None takes (0.9, 0.999), for lion (0.9, 0.99), for sgd and
            adafactor no momentum.
        proj_weight_decay: Decoupled decay of the basis.
        ortho: Weight of the orthogonality term.
        options: Every option of `GaLore` but those of refreshes: `rank`, `proj_type`, `rule`, `state_dtype`, ...

    Raises:
        ValueError: An option is out of range, unknown but close to a known one, or one of refreshes.

    Differences from the authors' code, which has no orthogonality term, another rate of the basis and a decay of it:
    this is the paper. A zero or non-finite gradient leaves the basis as it is; the step that creates the basis does not
    move it, since there its gradient is rounding noise that the rules would blow up.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float, float] = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scale: float = 1.0,
        proj_rule: str = "adam",
        proj_init: str = "sketch",
        proj_ratio: float = 5.0,
        proj_betas: tuple[float, float] | None = None,
        proj_weight_decay: float = 0.0,
        ortho: float = 0.1,
        **options: Any,
    ) -> None:
        refused = {"projector", "carry", "stagger", "lazy", "update_proj_gap", "compat"} & options.keys()
        if refused:
            raise ValueError(f"{', '.join(sorted(refused))}: the basis is never refreshed, drop the option")
        self._declare(proj_rule=proj_rule, proj_init=proj_init, proj_ratio=proj_ratio, proj_betas=proj_betas)
        self._declare(proj_weight_decay=proj_weight_decay, ortho=ortho)
        super().__init__(params, lr, betas, eps, weight_decay, scale=scale, projector="descend", **options)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        # An `update_proj_gap` may stand in a group that other methods share.
        usual = {"projector": "descend", "carry": None, "stagger": False, "compat": None}
        refused = [name for name, value in usual.items() if group[name] != value]
        if refused:
            raise ValueError(f"{', '.join(refused)}: the basis is never refreshed, drop the option")

    def update(self, b: Bucket) -> None:
        """One step of Online Subspace Descent on a bucket of same-shape matrices."""
        refresh(b)  # P_1, once                       (b, r)
        low = project(b)  # R_t = A_t P_t             (k, a, r)
        step = inner(b, low)  # N_t = rule(R_t)       (k, a, r)
        project_back_(b, step)  # W <- (1 - lr wd) W - lr scale N P^T
        follow(b, low)  # P_{t+1} = P_t - e rule_P(grad L(P_t))
