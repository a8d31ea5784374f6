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
"""Added to norms that divide, as in the authors' code."""

LIMIT = "limit_norm"
"""State of the limiter: s, the limited norm of the step before."""

CHOICES: dict[str, tuple[Any, ...]] = {"scale_mode": ("row", "matrix")}


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the residual is scaled.

    Args:
        gamma: Largest growth of its norm in a step; None does not limit it.
        by_row: One factor a row, else one a matrix.
        leak: beta, how much of R P^T is taken out, `E = A - beta R P^T`: 1, for Fira's authors `scale`, for APOLLO 0.
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
    if group["gamma"] is not None and not 1.0 <= group["gamma"] < float("inf"):
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


def structure(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The options of which `check` depends on others, for one that is changed between two steps."""
    return (group["scale_mode"], group["gamma"] is None)


def factors(b: Bucket, step: Tensor, low: Tensor, how: Scaling) -> Tensor:
    """How much the rule magnified the gradient, its growth limited: factors of the rows of A, (k, a), or (k, 1).

    Args:
        b: The bucket.
        step: N (k, a, r).
        low: R (k, a, r).
        how: The scaling.
    """
    rows = torch.linalg.vector_norm(low, dim=2)  # |R_i|  (k, a)
    return _limited(b, _growth(b, step, rows, by_row=how.by_row), rows, how)


def _growth(b: Bucket, step: Tensor, rows: Tensor, *, by_row: bool) -> Tensor:
    """`phi_i = |N_i| / |R_i|` for rows of R (k, a), or one for the matrix (k, 1)."""
    norms = [torch.linalg.vector_norm(step, dim=2), rows]
    if not by_row:
        norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in norms]
        if b.layout.low:
            norms = list(b.layout.sum_low(torch.stack(norms).square()).sqrt())
    ratio: Tensor = norms[0] / (norms[1] + TINY)
    return ratio


def _squares(b: Bucket, rows: Tensor, share: float) -> Tensor:
    """Squared row norms of `A - beta R P^T`, (k, a): by Pythagoras `|A_i|^2 - share |R_i|^2`.

    With `share = 2 beta - beta^2`. A two-sided projection has only the sum over all rows, (k, 1). Rounding below zero
    is cut off.
    """
    whole = torch.stack([row_squares(b.matrix(index), b.dtype) for index in range(len(b.params))])  # (k, a)
    low = rows.square()
    if b.view.full:
        whole, low = whole.sum(1, keepdim=True), low.sum(1, keepdim=True)
    whole = b.layout.reduce(whole[..., None])[..., 0]  # (k, a), those of R's rows
    return whole.sub_(low, alpha=share).clamp_(min=0.0)


def _limited(b: Bucket, phi: Tensor, rows: Tensor, how: Scaling) -> Tensor:
    """Divide phi by the growth limiter's L, and silence it for gradients that are not finite."""
    squares = _squares(b, rows, 2 * how.leak - how.leak**2)
    bad = ~squares.sum(1).isfinite()  # (k,): a bad gradient has no residual
    phi.masked_fill_(bad[:, None], 0.0)
    norms = (phi.square() * squares.nan_to_num_()).sum(1)  # |S|^2  (k,)
    if b.layout.dealt:  # every rank has some rows of R and a piece of every row of A: they share the verdict
        norms, verdicts = b.layout.sum_low(torch.stack([norms, bad.to(norms.dtype)]))
        phi.masked_fill_(verdicts[:, None] > 0, 0.0)
        norms = norms.masked_fill(verdicts > 0, 0.0)
    elif how.gamma is not None:
        norms = b.layout.sum_low(norms)
    return phi if how.gamma is None else phi.div_(_divisors(b, norms.sqrt(), how.gamma)[:, None])


def _divisors(b: Bucket, norms: Tensor, gamma: float) -> Tensor:
    """Divisors L (k,) that keep norms |S| from growing faster than gamma, and the new s into the state.

    The authors' limiter sees N before bias correction, and takes s for unset in the first step alone.
    """
    held = [state[LIMIT] for state in b.states]
    last = torch.stack(held)
    if b.hyper.official:
        counts = [int(state["step"]) for state in b.states]
        norms = torch.stack([norm * _uncorrected(b, t) for norm, t in zip(norms, counts, strict=True)])
        unset = torch.stack([torch.full_like(one, t == 1) for one, t in zip(held, counts, strict=True)]) > 0
    else:
        unset = ~((last > 0) & last.isfinite())
    divisors, limited = limit_growth(norms, last, gamma, unset)
    torch._foreach_copy_(held, list(limited.unbind()))
    return divisors


def _uncorrected(b: Bucket, t: int) -> float:
    """What bias correction divided N by in step t."""
    beta1, beta2 = b.hyper.betas
    corrected = b.hyper.correct_bias and b.hyper.rule == "adamw"
    return (1 - beta1**t) / (1 - beta2**t) ** 0.5 if corrected else 1.0


def limit_growth(norms: Tensor, last: Tensor, gamma: float, unset: Tensor) -> tuple[Tensor, Tensor]:
    """Fira's limiter, `L = max(|S| / s, gamma) / gamma` and `s <- |S| / L`.

    Args:
        norms: |S| of this step (k,).
        last: s, the limited norms of the step before (k,).
        gamma: Largest growth in a step.
        unset: Whether there is no s yet (k,); then nothing is limited.

    Returns:
        L, and the new s; the old one where it would not be finite.
    """
    divisors = torch.where(unset, 1.0, (norms / (last + TINY)).clamp(min=gamma) / gamma)
    limited = norms / divisors
    return divisors, torch.where(limited.isfinite(), limited, last)


def limit_spec(param: Tensor) -> dict[str, Spec]:
    """Describe the state of the limiter: one number."""
    return {LIMIT: Spec((), work_dtype(param.dtype), param.device)}
