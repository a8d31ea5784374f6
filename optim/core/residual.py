"""The residual of a projection, E = A - R P^T, and what is made of it without ever forming it.

Fira's update folds: `N P^T + s o (A - R P^T) = (N - s o R) P^T + s o A`, with s one factor a row of A. So a residual is
a correction of the low-rank direction and a row-scaled copy of the gradient that is added in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.statistics import row_squares
from .bucket import Bucket
from .codec import work_dtype
from .spec import Spec
from .validate import check_choices

TINY = 1e-8

LIMIT = "limit_norm"
"""State of the limiter: s, the limited norm of the step before."""

CHOICES: dict[str, tuple[Any, ...]] = {"scale_mode": ("row", "matrix")}


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the residual is scaled.

    Args:
        gamma: Largest growth of its norm in a step; None does not limit it.
        by_row: One factor a row, else one a matrix.
        leak: Share beta of R P^T that is taken out, `E = A - beta R P^T`: 1, or the authors' `scale`.
    """

    gamma: float | None
    by_row: bool
    leak: float = 1.0

    @classmethod
    def of(cls, group: Mapping[str, Any], leak: float = 1.0) -> Scaling:
        """Read it from the options of a group."""
        return cls(group["gamma"], group["scale_mode"] == "row", leak)


def check(group: Mapping[str, Any]) -> None:
    """Validate the options of a norm-scaled residual.

    Raises:
        ValueError: One is out of range, or the group's side, rule or projector cannot have such a residual.
    """
    check_choices(group, CHOICES)
    if group["gamma"] is not None and not group["gamma"] >= 1.0:
        raise ValueError(f"Invalid gamma: {group['gamma']}; need a number of at least 1, or None for no limit")
    if group["proj_type"] == "full" and group["scale_mode"] == "row":
        raise ValueError('proj_type="full" mixes the rows: pass scale_mode="matrix" with it')
    if group["rule"] == "adafactor":
        raise ValueError("rule='adafactor' has the learning rate in its direction: choose adamw, rmsprop, lion or sgd")
    if group["basis_dtype"] == "int4" and group["gamma"] is not None:
        raise ValueError(
            "basis_dtype='int4' keeps a basis only nearly orthonormal, the limit of growth needs it exact: pass "
            "gamma=None, or basis_dtype='int8'"
        )
    if group["projector"] == "descend" and group["gamma"] is not None:
        raise ValueError(
            "projector='descend' keeps its basis only nearly orthonormal, the limit of growth needs it exact: pass "
            "gamma=None, or projector='track'"
        )


def growth(b: Bucket, step: Tensor, low: Tensor, *, by_row: bool) -> Tensor:
    """How much the rule magnified the gradient: `phi_i = |N_i| / |R_i|` for rows of R, or one for the matrix.

    Args:
        b: The bucket.
        step: N (k, a, r).
        low: R (k, a, r).
        by_row: One factor a row (k, a), else one a matrix (k, 1).
    """
    ratio: Tensor
    if by_row:
        ratio = torch.linalg.vector_norm(step, dim=2) / (torch.linalg.vector_norm(low, dim=2) + TINY)
        return ratio
    norms = [torch.linalg.vector_norm(part, dim=(1, 2)) for part in (step, low)]
    if b.layout.low:
        norms = list(b.layout.sum_low(torch.stack(norms).square()).sqrt())
    ratio = norms[0] / (norms[1] + TINY)
    return ratio[:, None]


def residual_squares(b: Bucket, low: Tensor, share: float = 1.0) -> Tensor:
    """Squared row norms of `A - beta R P^T`, (k, a): by Pythagoras `|A_i|^2 - share |R_i|^2`.

    With `share = 2 beta - beta^2`. A two-sided projection has only the sum over all rows, (k, 1). Rounding below zero
    is cut off.
    """
    view = b.view
    whole = torch.stack([row_squares(b.matrix(index), b.dtype) for index in range(len(b.params))])  # (k, a)
    low_squares = low.square().sum(dim=2)
    if view.full:
        whole, low_squares = whole.sum(1, keepdim=True), low_squares.sum(1, keepdim=True)
    whole = b.layout.reduce(whole[..., None])[..., 0]  # (k, a), those of R's rows
    return whole.sub_(low_squares, alpha=share).clamp_(min=0.0)


def limit_growth(norm: Tensor, last: Tensor, gamma: float, unset: Tensor) -> Tensor:
    """Divisor that keeps a norm from growing faster than gamma: `L = max(|S| / s, gamma) / gamma`, then `s = |S| / L`.

    Args:
        norm: |S| of this step, 0-d.
        last: s, the limited norm of the step before, 0-d; updated unless the new one is not finite.
        gamma: Largest growth in a step.
        unset: Whether there is no s yet, 0-d bool; then nothing is limited.
    """
    divisor = torch.where(unset, 1.0, (norm / (last + TINY)).clamp(min=gamma) / gamma)
    limited = norm / divisor
    last.copy_(torch.where(limited.isfinite(), limited, last))
    return divisor


def limited(b: Bucket, phi: Tensor, low: Tensor, how: Scaling) -> Tensor:
    """Divide phi by the growth limiter's L, and silence it for gradients that are not finite.

    The authors' limiter sees N before bias correction.
    """
    squares = residual_squares(b, low, 2 * how.leak - how.leak**2)
    bad = ~squares.sum(1).isfinite()  # (k,): a bad gradient has no residual
    phi.masked_fill_(bad[:, None], 0.0)
    norms = (phi.square() * squares.nan_to_num_()).sum(1)  # |S|^2  (k,)
    if b.layout.dealt:  # every rank has some rows of R and a piece of every row of A: they share the verdict
        norms, verdicts = b.layout.sum_low(torch.stack([norms, bad.to(norms.dtype)]))
        phi.masked_fill_(verdicts[:, None] > 0, 0.0)
        norms = norms.masked_fill(verdicts > 0, 0.0)
    elif how.gamma is not None:
        norms = b.layout.sum_low(norms)
    if how.gamma is None:
        return phi
    norms = norms.sqrt()
    for index, held in enumerate(b.states):
        t, (beta1, beta2) = int(held["step"]) if b.hyper.official else 0, b.hyper.betas
        corrected = b.hyper.official and b.hyper.correct_bias and b.hyper.rule == "adamw"
        raw = (1 - beta1**t) / (1 - beta2**t) ** 0.5 if corrected else 1.0
        last = held[LIMIT]
        unset = torch.full_like(last, t == 1).bool() if b.hyper.official else ~((last > 0) & last.isfinite())
        phi[index] /= limit_growth(norms[index] * raw, last, how.gamma, unset)
    return phi


def limit_spec(param: Tensor) -> dict[str, Spec]:
    """Describe the state of the limiter: one number."""
    return {LIMIT: Spec((), work_dtype(param.dtype), param.device)}
