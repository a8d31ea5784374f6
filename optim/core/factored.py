"""Adafactor's pieces (arXiv 1804.04235): factored second moments, update clipping, relative steps.

Shapes: a gradient `(..., m, n)` has row statistics `(..., m)` and column statistics `(..., n)`; leading dimensions are
a batch of matrices. Means stand in for the paper's sums, which gives the same V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import pick
from ...kernels.tiles import tiles
from .layout import ALONE, Layout


def beta2(t: int, decay: float) -> float:
    """`1 - t^decay`, 0 at t = 1, so that no bias correction is needed."""
    fresh: float = float(t) ** decay
    return 1.0 - fresh


def accumulate(
    grad: Tensor,
    stats: tuple[Tensor, Tensor],
    weight: float,
    floor: float,
    backend: str = "auto",
    layout: Layout = ALONE,
) -> None:
    """`R <- lerp(R, mean_cols(G^2) + floor, weight)` and likewise C with rows, without a G^2 temporary."""
    rows, cols = _whole(pick("square_means", grad, backend)(grad), grad.shape, layout)
    row, col = stats
    row.lerp_(rows.add_(floor), weight)
    col.lerp_(cols.add_(floor), weight)


def _whole(pair: tuple[Tensor, Tensor], local: Sequence[int], layout: Layout) -> tuple[Tensor, Tensor]:
    """Means of the rows and columns of a whole matrix, from those of this rank's piece of it."""
    if layout.alone:
        return pair
    (rows, cols), (m, n) = pair, layout.shape
    return layout.sum_cols(rows * local[-1]) / max(n, 1), layout.sum_rows(cols * local[-2]) / max(m, 1)


def mean(row: Tensor, layout: Layout = ALONE) -> Tensor:
    """Mean of row statistics (..., m) of which this rank has a piece, as (..., 1)."""
    if not layout.rows:
        return row.mean(-1, keepdim=True)
    return layout.sum_rows(row.sum(-1, keepdim=True)) / layout.shape[0]


@dataclass(frozen=True, slots=True)
class Whitened:
    """`U = G / sqrt(V)` of one matrix, made tile by tile: rows and columns of G times factors, `V = R C^T / mean(R)`.

    Args:
        grad: G (m, n), in its own dtype.
        left: `sqrt(mean(R) / R)` (m, 1).
        right: `1 / sqrt(C)` (1, n).
    """

    grad: Tensor
    left: Tensor
    right: Tensor

    def part(self, rows: slice, cols: slice) -> Tensor:
        """Some rows and columns, in the working dtype."""
        return (self.grad[rows, cols].to(self.left.dtype) * self.left[rows]).mul_(self.right[:, cols])

    def rms(self, layout: Layout = ALONE) -> Tensor:
        """Root mean square of the whole, a 0-d tensor."""
        squares = [torch.linalg.vector_norm(self.part(*tile)).square_() for tile in tiles(self.grad)]
        total = torch.stack(squares).sum() if squares else self.left.new_zeros(())
        return _mean_root(total, self.grad, layout)


def whitening(row: Tensor, col: Tensor, layout: Layout = ALONE) -> tuple[Tensor, Tensor]:
    """The factors (..., m, 1) and (..., 1, n) of `1 / sqrt(V)`, in the split form that does not overflow."""
    return (row / mean(row, layout)).rsqrt_().unsqueeze(-1), col.rsqrt().unsqueeze(-2)


def precondition(grad: Tensor, row: Tensor, col: Tensor, layout: Layout = ALONE) -> Tensor:
    """`U = G / sqrt(V)` with `V = R C^T / mean(R)`."""
    left, right = whitening(row, col, layout)
    return (grad * left).mul_(right)


def precondition_floored(grad: Tensor, row: Tensor, col: Tensor, eps: float, layout: Layout = ALONE) -> Tensor:
    """`U = G / sqrt(max(V, eps^2))` with `V = R C^T / max(mean(R), eps)`, torch.optim.Adafactor's form."""
    variance = row.unsqueeze(-1) * col.unsqueeze(-2)
    variance.div_(mean(row, layout).unsqueeze(-1).clamp(min=eps))
    return floor_variance(variance, eps).rsqrt_().mul_(grad)


def floor_variance(variance: Tensor, eps: float) -> Tensor:
    """`max(V, eps^2)` in place, kept from underflowing to a division of zero by zero."""
    return variance.clamp_(min=max(eps * eps, torch.finfo(variance.dtype).tiny))


def rms(tensor: Tensor, layout: Layout = ALONE, dtype: torch.dtype | None = None) -> Tensor:
    """Root mean square of a whole tensor, a 0-d tensor; 0 for an empty one."""
    return _mean_root(torch.linalg.vector_norm(tensor, dtype=dtype).square(), tensor, layout)


def _mean_root(total: Tensor, piece: Tensor, layout: Layout) -> Tensor:
    """`sqrt(sum / count)` of a whole, from the sum of this rank's piece."""
    if not layout.alone:
        total = layout.sum_all(total)
    count = piece.numel() if layout.sharding is None else math.prod(layout.sharding.shape)
    return total.sqrt() / math.sqrt(max(count, 1))


def clip_factor(found: Tensor, threshold: float) -> Tensor:
    """`max(1, rms(U) / d)`, what an update is divided by."""
    return (found / threshold).clamp_(min=1.0)


def clip_(update: Tensor, threshold: float | None, layout: Layout = ALONE) -> Tensor:
    """`U <- U / max(1, rms(U) / d)`, without a host synchronisation."""
    if threshold is None:
        return update
    return update.div_(clip_factor(rms(update, layout), threshold))


def relative_step(t: int, cap: float | Tensor, *, warmup_init: bool = False) -> float | Tensor:
    """`rho_t = min(cap, 1 / sqrt(t))`; with `warmup_init` the cap grows as 1e-6 t."""
    limit = 1e-6 * t if warmup_init else cap
    return limit.clamp(max=t**-0.5) if isinstance(limit, Tensor) else min(limit, t**-0.5)


def parameter_scale(weight: Tensor, floor: float, dtype: torch.dtype, layout: Layout = ALONE) -> Tensor:
    """`max(eps2, rms(X))`, a 0-d tensor in the working dtype."""
    return rms(weight.detach(), layout, dtype).clamp_(min=floor)
