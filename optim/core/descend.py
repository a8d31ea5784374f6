"""Online principal component analysis: the basis follows the gradient by descent instead of being recomputed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import codec, linalg, state
from .bucket import Bucket
from .hyper import Hyper
from .layout import Layout
from .rules import RULES, Work
from .view import MatrixView

PREFIX = "basis_"
"""State of the basis' own optimizer carries this prefix."""


def pca_gradient(basis: Tensor, image: Tensor, adjoint: Tensor, ortho: float, layout: Layout) -> Tensor:
    """Gradient of `|A P P^T - A|^2 + lam |P^T P - I|^2` in P, for A of unit norm, without a matrix of A's size.

        Y = A P,  Z = A^T Y,  S = P^T P,  B = Y^T Y:    2 (Z S + P B - 2 Z) + 4 lam P (S - I)

    Args:
        basis: P (b, r).
        image: Y (a, r).
        adjoint: Z (b, r).
        ortho: lam.
        layout: Sums over shards.
    """
    gram = layout.sum_cols(basis.T @ basis)  # (r, r)
    captured = layout.sum_rows(image.T @ image)  # (r, r)
    grad = 2 * (adjoint @ gram + basis @ captured - 2 * adjoint)
    if ortho:
        gram.diagonal().sub_(1)
        grad += 4 * ortho * (basis @ gram)
    return grad


@dataclass(frozen=True, slots=True)
class Descent:
    """How the basis moves.

    Args:
        rule: Name of the basis' own rule.
        lr: Its learning rate e.
        betas: Its decay rates.
        decay: Its decoupled decay.
        ortho: Weight of the orthogonality term.
    """

    rule: str
    lr: float | Tensor
    betas: tuple[float, float]
    decay: float
    ortho: float

    def hyper(self, hyper: Hyper) -> Hyper:
        """The hyper-parameters of the basis' rule, as those of any other rule."""
        return replace(hyper, rule=self.rule, lr=self.lr, betas=self.betas, eps=1e-8, compat=None)


def descend_(b: Bucket, index: int, low: Tensor, how: Descent) -> None:
    """`P <- (1 - e wd) P - e D` for one matrix, D the direction of the basis' rule on `pca_gradient`.

    A zero or non-finite gradient leaves P and its moments as they are (on a GPU, where asking would synchronise, it
    counts as one without direction).
    """
    held, matrix, rule = b.states[index], b.matrix(index), RULES[how.rule]
    norm = torch.linalg.vector_norm(matrix, dtype=b.dtype)
    usable = norm.isfinite() & (norm > 0)
    if norm.device.type == "cpu" and not usable:
        return
    norm = torch.where(usable, norm, 1.0)
    basis = held["basis"]
    image = (-low if b.hyper.maximize else low) / norm  # Y, whatever sign the weights follow
    adjoint = b.layout.sum_rows(linalg.product(matrix.T, image) / norm)
    grad = torch.where(usable, pca_gradient(basis, image, adjoint, how.ortho, b.layout), 0.0)
    held[f"{PREFIX}step"] += 1
    hyper = how.hyper(b.hyper)
    moments = {name: held[PREFIX + name] for name in rule.buffers(tuple(basis.shape), hyper)}
    direction = torch.empty_like(grad)
    rule.direction(Work([grad], [moments], [int(held[f"{PREFIX}step"])], [basis], [direction]), hyper)
    basis.mul_(1 - how.lr * how.decay).sub_(direction if rule.absolute else direction.mul_(how.lr))


def basis_specs(param: Tensor, view: MatrixView, hyper: Hyper, how: Descent) -> dict[str, state.Spec]:
    """Describe the basis, in fp32 so that small steps move it, and the state of its rule."""
    work, shape = codec.work_dtype(param.dtype), view.basis_shapes["basis"]
    sizes = RULES[how.rule].buffers(shape, how.hyper(hyper))
    moments = {PREFIX + name: state.Spec(size, work, param.device) for name, size in sizes.items()}
    return {"basis": state.Spec(shape, work, param.device), f"{PREFIX}step": state.counter(), **moments}
