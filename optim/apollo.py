"""APOLLO: learning rates of rows, approximated in a low-rank space (arXiv 2412.05270)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core import residual
from .core.bucket import Bucket
from .core.hyper import Hyper
from .core.optimizer import SubspaceOptimizer
from .core.residual import Scaling
from .core.spec import Spec
from .core.verbs import follow, inner, project, project_back_, refresh
from .core.view import MatrixView

NEIGHBOURS: dict[str, tuple[str, dict[Any, Any]]] = {
    "proj": ("projector", {"random": "gaussian", "svd": "svd"}),
    "scale_type": ("scale_mode", {"channel": "row", "tensor": "matrix"}),
    "disable_nl": ("gamma", {False: 1.01, True: None}),
}
"""The authors' options: our name, and our value for each of theirs."""


class Apollo(SubspaceOptimizer):
    """APOLLO: the gradient itself, every row scaled as Adam scales its image in a random low-rank space.

    For a weight W oriented so that its gradient A (a x b) is projected from the right:

        P_t    = entries N(0, 1/r) from the seed, new every T steps         (b, r)
        R_t    = A_t P_t                                                    (a, r)
        N_t    = rule(R_t)                                                  (a, r)
        phi_i  = |N_i| / |R_i|, a factor for every row i                    (a,)
        S_t    = phi o A_t                                                  (a, b)
        S_t    = S_t / L,  L = max(|S_t| / s, gamma) / gamma,  s = |S_t|    growth is limited to gamma
        W_t    = (1 - lr wd) W_{t-1} - lr sqrt(scale) S_t

    so that no SVD is needed, and a rank of 1 with one factor a matrix (`Apollo.mini`) still trains. State of a
    projected matrix: `min(m,n) r + 2 max(m,n) r + 1`, of which the first term, P in the weight's dtype, could be made
    again from the seed: it is kept so that checkpoints, options that change and gradients of zero need no special case.

        Apollo(param_groups(model, rank=256), lr=1e-2)  # the paper's learning rate
        Apollo.mini(param_groups(model, rank=1), lr=1e-2)

    Args:
        params: Parameters, groups or (name, parameter) pairs; see `GaLore`. A group may have the neighbours' keys:
            `proj` ("random", our "gaussian", or "svd"), `scale_type` ("channel", our "row", or "tensor", our "matrix").
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update.
        rank: Rank of the random space; the smaller it is, the smaller phi: `scale` makes up for it.
        update_proj_gap: Steps T between two new bases.
        scale: Factor of the update under a root, as the paper has it: 128 is 11.3 times the learning rate.
        scale_mode: "row" has a factor for every row of A (a column of W where it is projected from the left), "matrix"
            one for all. A `proj_type="full"` projection needs "matrix".
        gamma: Largest growth of the update's norm in a step; None does not limit it.
        projector: "gaussian" (entries N(0, 1/r), the paper), "svd", or another of `GaLore`'s.
        carry: Moments at a refresh: "keep" their numbers (the paper), "reset", or with orthonormal bases "rotate".
        options: Every further option of `GaLore`: `proj_type`, `rule`, `state_dtype`, `rounding`, ...

    Raises:
        ValueError: An option is out of range, unknown but close to a known one, or a Gaussian basis is asked to be
            rotated, compared (`lazy`) or kept in few bits (`basis_dtype`).

    Written from the paper. Differences from what is known of the authors' code: eps is added after bias correction and
    decay comes before the update, as in torch's AdamW (`compat="official"` has theirs: eps before it, decay after the
    update, moments in the gradient's dtype); the limiter's s is fp32 and a zero or non-finite s counts as none, so that
    a zero gradient does not lock it (`compat="official"` keeps the lock); seeds are a function of seed, parameter and
    refresh, so that resumed runs and other devices have the same bases.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float, float] = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | str | None = 256,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_mode: str = "row",
        gamma: float | None = 1.01,
        projector: str = "gaussian",
        carry: str | None = "keep",
        **options: Any,
    ) -> None:
        self._declare(scale_mode=scale_mode, gamma=gamma)
        options |= {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        options |= {"projector": projector, "carry": carry}
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    @classmethod
    def mini(cls, params: ParamsT, lr: float | Tensor = 1e-3, **options: Any) -> Apollo:
        """Construct APOLLO-Mini: rank 1, one factor a matrix, scale 128; state of a matrix is `min + 2 max + 1`.

        Args:
            params: As in `Apollo`; a group with a `rank` of its own keeps it, so name 1 there.
            lr: Learning rate; the paper's is 1e-2.
            options: Any option of `Apollo`.
        """
        return cls(params, lr, **{"rank": 1, "scale": 128.0, "scale_mode": "matrix", **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the neighbours' keys become ours."""
        if isinstance(param_group, dict):
            spell(param_group)
        super().add_param_group(param_group)

    def update(self, b: Bucket) -> None:
        """One step of APOLLO on a bucket of same-shape matrices."""
        how = Scaling.of(self.param_groups[b.plan.group], leak=0.0)  # E = A: nothing is taken out
        refresh(b)  # P_t, every T steps                                       (b, r)
        low = project(b)  # R_t = A_t P_t                                      (k, a, r)
        step = inner(b, low)  # N_t = rule(R_t)                                (k, a, r)
        phi = residual.factors(b, step, low, how)  # phi_t / L                 (k, a)
        project_back_(b, None, rows=phi)  # W <- (1 - lr wd) W - lr sqrt(scale) phi o A
        follow(b, low)  # P_{t+1}, by projectors that move after the step

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        hyper: Hyper = super()._hyper(group)
        return replace(hyper, scale=math.sqrt(hyper.scale))

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate({**group, "residual": "channel"})
        residual.check(group)

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (*super()._structure(group), *residual.structure(group))

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        described = super()._specs(param, view, group)
        return described if view is None else described | residual.limit_spec(param)


class APOLLOAdamW(Apollo):
    """`Apollo` under the name by which frameworks ask for it, with the authors' group keys and order of operations.

    Groups with `rank, proj, scale_type, update_proj_gap, scale, proj_type` are projected, groups without `rank` are
    plain AdamW; eps is added before bias correction, decay comes after the update, the limiter locks at zero.

    Args:
        params: Parameters or the official parameter groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment, before bias correction.
        weight_decay: Decoupled decay, after the update.
        correct_bias: Correct the bias of the moments.
        proj: Basis of groups that do not say it: "random" (the default) or "svd".
        scale_type: Factors of groups that do not say it: "channel" (the default) or "tensor".
        options: Any further option of `Apollo`, as `compat=None` for torch's AdamW inside.

    Raises:
        ValueError: As `Apollo`, or `scale_front=True`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        proj: str | None = None,
        scale_type: str | None = None,
        **options: Any,
    ) -> None:
        named = {"proj": proj, "scale_type": scale_type}
        options |= {name: value for name, value in named.items() if value is not None}
        self._declare(correct_bias=correct_bias)
        super().__init__(params, lr, betas, eps, weight_decay, **{"rank": None, "compat": "official", **spell(options)})


def spell(options: dict[str, Any]) -> dict[str, Any]:
    """Replace the authors' options by ours, in place.

    Raises:
        ValueError: One has a value that the authors' code has not, is given beside ours, or is `scale_front=True`.
    """
    for key, (name, values) in NEIGHBOURS.items():
        if key not in options:
            continue
        if name in options:
            raise ValueError(f"{key!r} and {name!r} are two names of one option: keep one of them")
        if options[key] not in values:
            raise ValueError(f"Invalid {key}: {options[key]!r}; choose one of {', '.join(map(repr, values))}")
        options[name] = values[options.pop(key)]
    if options.pop("scale_front", False):
        raise ValueError(
            "scale_front=True is not offered: the limiter sees ratios of norms, before and after the scale they are "
            "the same; drop it"
        )
    return options
