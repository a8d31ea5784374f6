"""The residual of a projection, E = A - R P^T, and what is made of it without ever forming it.

Fira's update folds: `N P^T + s o (A - R P^T) = (N - s o R) P^T + s o A`, with s one factor a row of A. So a residual is
a correction of the low-rank direction and a row-scaled copy of the gradient that is added in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bucket import Bucket

TINY = 1e-8


def growth(step: Tensor, low: Tensor, *, by_row: bool) -> Tensor:
    """How much the rule magnified the gradient: `phi_i = |N_i| / |R_i|` for rows of R, or one for the matrix.

    Args:
        step: N (k, a, r).
        low: R (k, a, r).
        by_row: One factor a row (k, a), else one a matrix (k, 1).
    """
    dims = (2,) if by_row else (1, 2)
    ratio: Tensor = torch.linalg.vector_norm(step, dim=dims) / (torch.linalg.vector_norm(low, dim=dims) + TINY)
    return ratio if by_row else ratio[:, None]


def residual_squares(b: Bucket, low: Tensor, share: float = 1.0) -> Tensor:
    """Squared row norms of `A - beta R P^T`, (k, a): by Pythagoras `|A_i|^2 - share |R_i|^2`.

    With `share = 2 beta - beta^2`. A two-sided projection has only the sum over all rows, (k, 1). Rounding below zero
    is cut off.
    """
    view = b.view
    whole = torch.stack([_row_squares(b.matrix(index), b.dtype) for index in range(len(b.params))])  # (k, a)
    whole = b.layout.sum_cols(whole)
    low_squares = low.square().sum(dim=2)
    if view.full:
        whole, low_squares = whole.sum(1, keepdim=True), low_squares.sum(1, keepdim=True)
    return whole.sub_(low_squares, alpha=share).clamp_(min=0.0)


def _row_squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)
    return norms.square_()


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
