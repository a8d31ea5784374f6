"""Every operation in plain torch: the specification that fast paths are compared with.

Moments are updated in place; the direction `N` is written to `out`, so that the weight moves by `-lr N`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import random
from .blockwise import Blocks, Format, dequantise, quantise_
from .random import Seed
from .rounding import Target

Count = int | Tensor
"""A step count t, from 1: a number, or a 0-d tensor on the device where the host must not read it."""

NO_CORRECTION = 1 << 30
"""A step count at which beta^t vanishes: Adam without bias correction."""


def adam(
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    counts: Sequence[Count],
    out: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    *,
    raw_eps: bool = False,
) -> None:
    """Adam: `M <- b1 M + (1-b1) R`, `V <- b2 V + (1-b2) R^2`, `N = (M/c1) / (sqrt(V/c2) + eps)`, `c_i = 1 - b_i^t`.

    Args:
        grads: The gradients R, any shapes.
        moments: First and second moments M and V, of the shapes of R; updated.
        counts: Step count t of each tensor, from 1.
        out: Directions N, of the shapes of R; written.
        betas: Decay rates b1, b2.
        eps: Added to the root of the second moment.
        raw_eps: Add eps before bias correction, as GaLore's and Hugging Face's code do: eps / sqrt(c2).
    """
    beta1, beta2 = betas
    for grad, first, second, t, direction in zip(grads, *moments, counts, out, strict=True):
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        c1, c2 = corrections(t, betas)
        root = (second / c2).sqrt_().add_(eps / c2**0.5 if raw_eps else eps)
        torch.div(first / c1, root, out=direction)


def corrections(t: Count, betas: tuple[float, float]) -> tuple[Any, Any]:
    """`1 - b_i^t`, numbers or 0-d tensors as the count; in fp64, as fp32 has four digits of 1 - 0.999^t at t = 1."""
    if isinstance(t, Tensor):
        t = t.double()
    return 1 - betas[0] ** t, 1 - betas[1] ** t


def adam_by_column(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    ages: Sequence[Tensor],
    out: Sequence[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam on matrices (a, r) whose columns have step counts of their own, `ages` (r,); otherwise as `adam`."""
    beta1, beta2 = betas
    for grad, first, second, age, direction in zip(grads, *moments, ages, out, strict=True):
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        t = age.to(grad.dtype)
        root = (second / (1 - beta2**t)).sqrt_().add_(eps)
        torch.div(first / (1 - beta1**t), root, out=direction)


def lion(grad: Tensor, moment: Tensor, out: Tensor, betas: tuple[float, float]) -> None:
    """Lion: `N = sign(b1 M + (1-b1) R)`, then `M <- b2 M + (1-b2) R`."""
    torch.lerp(moment, grad, 1 - betas[0], out=out).sign_()
    moment.lerp_(grad, 1 - betas[1])


def momentum(grad: Tensor, moment: Tensor, out: Tensor, beta: float) -> None:
    """Heavy ball: `M <- b M + R`, `N = M`."""
    out.copy_(moment.mul_(beta).add_(grad))


class Blockwise(NamedTuple):
    """How moments are coded in 8 bits, and the numbers of the rule that updates them.

    Args:
        form: How they are coded.
        seeds: Seed of the rounding of each tensor.
        betas: Decay rates b1, b2.
        eps: Added to the root of the second moment.
        raw_eps: As in `adam`.
    """

    form: Format
    seeds: Sequence[Seed]
    betas: tuple[float, float]
    eps: float = 0.0
    raw_eps: bool = False


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[Count],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Adam on matrices (rows, cols) whose moments are coded: decoded, `adam`, coded again.

    Directions follow from the moments before they are coded. An entry whose square is not finite counts as zero.
    """
    for grad, first, second, t, direction, seed in zip(grads, *moments, counts, out, how.seeds, strict=True):
        m, v = dequantise(first, how.form, signed=True), dequantise(second, how.form, signed=False)
        seen = torch.where(grad.square().isfinite(), grad, 0.0)
        adam([seen], ([m], [v]), [t], [direction], how.betas, how.eps, raw_eps=how.raw_eps)
        quantise_(first, m, how.form, signed=True)
        quantise_(second, v, how.form, signed=False, seed=seed)


def lion_blockwise(grads: Sequence[Tensor], moments: Sequence[Blocks], out: Sequence[Tensor], how: Blockwise) -> None:
    """Lion on matrices whose moment is coded, otherwise as `adam_blockwise`."""
    for grad, moment, direction in zip(grads, moments, out, strict=True):
        m = dequantise(moment, how.form, signed=True)
        lion(torch.where(grad.square().isfinite(), grad, 0.0), m, direction, how.betas)
        quantise_(moment, m, how.form, signed=True)


class Scaled(NamedTuple):
    """A residual `s o G`: rows or columns of the gradient times a factor; a factor of 0 gives 0, for NaN too.

    Args:
        grad: G (m, n).
        factors: s, (m, 1) or (1, n).
    """

    grad: Tensor
    factors: Tensor


class Signed(NamedTuple):
    """A residual `c sign(G - E F^T)`, zero where the difference is not above the floor; without factors `c sign(G)`.

    Args:
        grad: G (m, n).
        sound: Whether G is finite, 0-d; it counts as zero if not.
        scale: c; negative with `maximize=True`, where E F^T stays the projection of G itself.
        left: E (m, r).
        right: F (n, r).
        floor: What the difference must exceed, a bound of its rounding errors by row or column, (m, 1) or (1, n).
    """

    grad: Tensor
    sound: Tensor
    scale: float
    left: Tensor | None = None
    right: Tensor | None = None
    floor: Tensor | None = None


class Move(NamedTuple):
    """How a low-rank direction and a residual move a weight: `W <- decay W + alpha (L R^T + residual)`.

    Args:
        decay: The factor of the weight.
        alpha: The factor of the step, minus the learning rate.
        gemm: Dtype of the operands of products.
        residual: What is added to the low-rank direction.
    """

    decay: float | Tensor
    alpha: float | Tensor
    gemm: torch.dtype
    residual: Scaled | Signed | None = None


def project_back_(target: Target, left: Tensor | None, right: Tensor | None, move: Move) -> None:
    """Move a weight (m, n) by `left right^T`, left (m, r) and right (n, r), and a residual, rounded once."""
    step = residual(move.residual, target.work, move.gemm)
    if left is not None and right is not None:
        step = step + (left.to(move.gemm) @ right.to(move.gemm).T).to(target.work)
    target.write(target.read() * move.decay + step * move.alpha)


def residual(kind: Scaled | Signed | None, work: torch.dtype, gemm: torch.dtype) -> Tensor | float:
    """The residual (m, n) in the working dtype."""
    if kind is None:
        return 0.0
    if isinstance(kind, Scaled):
        return scaled(kind, work)
    rest = torch.where(kind.sound, kind.grad.to(work), 0.0)
    if kind.left is None or kind.right is None or kind.floor is None:
        return rest.sign() * kind.scale
    rest = rest - (kind.left.to(gemm) @ kind.right.to(gemm).T).to(work)
    return torch.where(rest.abs() > kind.floor, rest.sign(), 0.0) * kind.scale


def scaled(kind: Scaled, work: torch.dtype) -> Tensor:
    """`s o G` in the working dtype."""
    return torch.where(kind.factors == 0, 0.0, kind.grad.to(work) * kind.factors)


def sketch(out: Tensor, matrix: Tensor, seed: int, first: int = 0) -> None:
    """Write `R = A P` (m, r), P the rows `first, first + 1, ...` of a rademacher basis of `lowmem.kernels.random`."""
    basis = torch.empty(matrix.shape[1], out.shape[1], dtype=torch.float32, device=matrix.device)
    random.basis(basis, "rademacher", seed, first, first + len(basis))
    torch.mm(matrix.to(out.dtype), basis.to(out.dtype), out=out)


def square_means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the squares of the rows (m,) and of the columns (n,) of a matrix, in fp32; 0 for those without entries.

    Adafactor's statistics, and by `n mean` Fira's squared row norms.
    """
    squares = matrix.float().square()
    m, n = max(matrix.shape[0], 1), max(matrix.shape[1], 1)
    return squares.sum(1) / n, squares.sum(0) / m


def adamw_blockwise_(
    target: Target,
    grad: Tensor,
    moments: tuple[Blocks, Blocks],
    t: Count,
    lr: float | Tensor,
    decay: float | Tensor,
    how: Blockwise,
) -> None:
    """AdamW on one weight (rows, cols) whose moments are coded: `W <- decay W - lr N`, N of `adam_blockwise`."""
    step = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    adam_blockwise([grad.float()], ([moments[0]], [moments[1]]), [t], [step], how)
    target.write(target.read() * decay - step * lr)
