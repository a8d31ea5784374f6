"""Adafactor's pieces (arXiv 1804.04235): factored second moments, update clipping, relative steps.

Shapes: a gradient `(..., m, n)` has row statistics `(..., m)` and column statistics `(..., n)`; leading dimensions are
a batch of matrices. Means stand in for the paper's sums, which gives the same V.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...kernels import pick
from ...kernels.tiles import tiles
from .layout import ALONE, Layout
from .together import Make, reduced


def beta2(t: int, decay: float) -> float:
    """`1 - t^decay`, 0 at t = 1, so that no bias correction is needed."""
    fresh: float = float(t) ** decay
    return 1.0 - fresh


def accumulate(
    grads: Sequence[Tensor],
    stats: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    floor: float,
    backend: str = "auto",
    layout: Layout = ALONE,
) -> None:
    """`R <- lerp(R, mean_cols(G^2) + floor, weight)` and likewise C with rows, without a G^2 temporary.

    Here as in all of the following, lists are matrices of one shape, whose sums over pieces share a collective.
    """
    found = (pick("square_means", grad, backend)(grad) for grad in grads)
    for (row, col), (rows, cols), weight in zip(stats, _whole(found, grads[0].shape, layout), weights, strict=True):
        row.lerp_(rows.add_(floor), weight)
        col.lerp_(cols.add_(floor), weight)


def _whole(
    pairs: Iterable[tuple[Tensor, Tensor]], local: Sequence[int], layout: Layout
) -> Iterable[tuple[Tensor, Tensor]]:
    """Means of the rows and columns of whole matrices, from those of this rank's pieces of them."""
    if layout.alone:
        return pairs
    (m, n), sums = layout.shape, [(rows * local[-1], cols * local[-2]) for rows, cols in pairs]
    of_rows = reduced(layout.sum_cols, [rows for rows, _ in sums])
    of_cols = reduced(layout.sum_rows, [cols for _, cols in sums])
    return [(rows / max(n, 1), cols / max(m, 1)) for rows, cols in zip(of_rows, of_cols, strict=True)]


def means(rows: Sequence[Tensor], layout: Layout = ALONE) -> list[Tensor]:
    """Means of row statistics (..., m), of which this rank has pieces, as (..., 1); of some matrices."""
    if not layout.rows:
        return [row.mean(-1, keepdim=True) for row in rows]
    sums = reduced(layout.sum_rows, [row.sum(-1, keepdim=True) for row in rows])
    return [total / layout.shape[0] for total in sums]


@dataclass(frozen=True, slots=True)
class Whitened:
    """`U = G / sqrt(V)` of a matrix, not made yet: G times a factor a row and one a column, `V = R C^T / mean(R)`.

    Args:
        grad: G (..., m, n), in its own dtype.
        left: `sqrt(mean(R) / R)` (..., m, 1).
        right: `1 / sqrt(C)` (..., 1, n).
    """

    grad: Tensor
    left: Tensor
    right: Tensor

    def __call__(self) -> Tensor:
        """Make it, in the working dtype."""
        return self.into(None)

    def into(self, out: Tensor | None) -> Tensor:
        """Make it in memory that is there."""
        return torch.mul(self.grad, self.left, out=out).mul_(self.right)

    def part(self, rows: slice, cols: slice) -> Tensor:
        """Some rows and columns of a matrix (m, n), in the working dtype."""
        return (self.grad[rows, cols].to(self.left.dtype) * self.left[rows]).mul_(self.right[:, cols])

    def square_sum(self) -> Tensor:
        """The sum of squares of a matrix (m, n), made tile by tile."""
        squares = [torch.linalg.vector_norm(self.part(*tile)).square_() for tile in tiles(self.grad)]
        return torch.stack(squares).sum() if squares else self.left.new_zeros(())


def whitened(grads: Sequence[Tensor], stats: Sequence[tuple[Tensor, Tensor]], layout: Layout = ALONE) -> list[Whitened]:
    """`U = G / sqrt(V)` of some matrices, in the split form that does not overflow."""
    averages = means([row for row, _ in stats], layout)
    return [
        Whitened(grad, (row / average).rsqrt_().unsqueeze(-1), col.rsqrt().unsqueeze(-2))
        for grad, (row, col), average in zip(grads, stats, averages, strict=True)
    ]


def precondition_floored(grad: Tensor, row: Tensor, col: Tensor, average: Tensor, eps: float) -> Tensor:
    """`U = G / sqrt(max(V, eps^2))` with `V = R C^T / max(mean(R), eps)`, torch.optim.Adafactor's form."""
    variance = row.unsqueeze(-1) * col.unsqueeze(-2)
    variance.div_(average.unsqueeze(-1).clamp(min=eps))
    return floor_variance(variance, eps).rsqrt_().mul_(grad)


def floor_variance(variance: Tensor, eps: float) -> Tensor:
    """`max(V, eps^2)` in place, kept from underflowing to a division of zero by zero."""
    return variance.clamp_(min=max(eps * eps, torch.finfo(variance.dtype).tiny))


def rms(tensors: Sequence[Tensor | Make], layout: Layout = ALONE, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Root mean squares of whole tensors, or of what is yet to be made, 0-d each; 0 for empty ones."""
    found = [_square_sum(tensor, dtype) for tensor in tensors]
    squares, sizes = [square for square, _ in found], [size for _, size in found]
    if not layout.alone:
        squares = reduced(layout.sum_all, squares)
    if layout.sharding is not None:
        sizes = [math.prod(layout.sharding.shape)] * len(sizes)
    return [square.sqrt() / math.sqrt(max(size, 1)) for square, size in zip(squares, sizes, strict=True)]


def _square_sum(tensor: Tensor | Make, dtype: torch.dtype | None) -> tuple[Tensor, int]:
    """The sum of squares of this rank's piece, and its size."""
    if isinstance(tensor, Whitened):
        return tensor.square_sum(), tensor.grad.numel()
    made = tensor if isinstance(tensor, Tensor) else tensor()
    return torch.linalg.vector_norm(made, dtype=dtype).square(), made.numel()


def clip_factors(
    updates: Sequence[Tensor | Make], threshold: float | None, layout: Layout = ALONE
) -> list[Tensor | None]:
    """`max(1, rms(U) / d)`, what updates are divided by, without a host synchronisation; None where d is."""
    if threshold is None:
        return [None] * len(updates)
    return [(root / threshold).clamp_(min=1.0) for root in rms(updates, layout)]


def relative_step(t: int, cap: float | Tensor, *, warmup_init: bool = False) -> float | Tensor:
    """`rho_t = min(cap, 1 / sqrt(t))`; with `warmup_init` the cap grows as 1e-6 t."""
    limit = 1e-6 * t if warmup_init else cap
    return limit.clamp(max=t**-0.5) if isinstance(limit, Tensor) else min(limit, t**-0.5)


def parameter_scales(
    weights: Sequence[Tensor], floor: float, dtype: torch.dtype, layout: Layout = ALONE
) -> list[Tensor]:
    """`max(eps2, rms(X))` of some weights, 0-d each in the working dtype."""
    return [root.clamp_(min=floor) for root in rms([weight.detach() for weight in weights], layout, dtype)]


class Rated(Protocol):
    """Options of a group from which learning rates follow."""

    @property
    def lr(self) -> float | Tensor:
        """The rate, or the cap of a relative one."""

    @property
    def relative_step(self) -> bool:
        """Whether it falls with the step."""

    @property
    def warmup_init(self) -> bool:
        """Whether it then begins near zero."""

    @property
    def scale_parameter(self) -> bool:
        """Whether it is multiplied by the size of the weight."""


def learning_rates(
    o: Rated,
    counts: Sequence[int],
    weights: Sequence[Tensor],
    floor: float,
    dtype: torch.dtype,
    layout: Layout = ALONE,
) -> list[float | Tensor]:
    """`alpha_t` of weights of one shape, device scalars where the parameter scale, at least `floor`, is in it."""
    rates = [relative_step(t, o.lr, warmup_init=o.warmup_init) if o.relative_step else o.lr for t in counts]
    if not o.scale_parameter:
        return rates
    scales = parameter_scales(weights, floor, dtype, layout)
    return [rate * scale for rate, scale in zip(rates, scales, strict=True)]
