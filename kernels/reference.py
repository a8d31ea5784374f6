"""Every operation in plain torch: the specification that fast paths are compared with.

Moments are updated in place; the direction `N` is written to `out`, so that the weight moves by `-lr N`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_CORRECTION = 1 << 30
"""A step count at which beta^t vanishes: Adam without bias correction."""


def adam(
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    counts: list[int],
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
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        root = (second / c2).sqrt_().add_(eps / c2**0.5 if raw_eps else eps)
        torch.div(first / c1, root, out=direction)


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
