"""Online principal component analysis: the basis follows the gradient by descent instead of being recomputed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import codec, linalg, sides
from .basis import Dense
from .layout import Layout
from .rules import RULES, Work
from .spec import Spec, counter
from .view import MatrixView

if TYPE_CHECKING:
    from .bucket import Bucket
    from .hyper import Hyper

PREFIX = "basis_"
"""State of the basis' own optimizer carries this prefix."""

BASIS_RULES = {"adam": "adamw", "sgd": "sgd", "lion": "lion", "adafactor": "adafactor"}
"""Optimizers of the basis, and the rules that they are."""

BETAS = {"adam": (0.9, 0.999), "sgd": (0.0, 0.0), "lion": (0.9, 0.99), "adafactor": (0.0, 0.999)}


def pca_gradient(basis: Tensor, image: Tensor, adjoint: Tensor, ortho: float, layout: Layout) -> Tensor:
    """Gradient of `|A P P^T - A|^2 + lam |P^T P - I|^2` in P, for A of unit norm, without a matrix of A's size.

        Y = A P,  Z = A^T Y,  S = P^T P,  B = Y^T Y:    2 (Z S + P B - 2 Z) + 4 lam P (S - I)
                                                      = Z (2 S - 4 I) + P (2 B + 4 lam (S - I))

    Args:
        basis: P (b, r).
        image: Y (a, r).
        adjoint: Z (b, r).
        ortho: lam.
        layout: Sums over shards.
    """
    gram = layout.sum_cols(basis.T @ basis)  # (r, r)
    captured = layout.sum_rows(image.T @ image)  # (r, r)
    factor = captured.mul_(2).add_(gram, alpha=4 * ortho)
    factor.diagonal().sub_(4 * ortho)
    gram.mul_(2).diagonal().sub_(4)
    return (adjoint @ gram).addmm_(basis, factor)


@dataclass(frozen=True, slots=True)
class Descent:
    """How the basis moves.

    Args:
        hyper: Hyper-parameters of the basis' own rule, its learning rate e among them.
        decay: Its decoupled decay.
        ortho: Weight of the orthogonality term.
    """

    hyper: Hyper
    decay: float
    ortho: float

    @classmethod
    def of(cls, h: Hyper) -> Descent:
        """Read it from the options of a group; e follows the group's learning rate."""
        betas = h.proj_betas or BETAS[h.proj_rule]
        lr = h.proj_ratio * h.lr
        hyper = replace(h, rule=BASIS_RULES[h.proj_rule], lr=lr, betas=betas, eps=1e-8, carry="keep", compat=None)
        return cls(hyper, h.proj_weight_decay, h.ortho)


def descend_(b: Bucket, index: int, low: Tensor) -> None:
    """`P <- (1 - e wd) P - e D` for one matrix, D the direction of the basis' rule on `pca_gradient`.

    A zero or non-finite gradient leaves P and its moments as they are (on a GPU, where asking would synchronise, it
    counts as one without direction). So does the step that found P: there the gradient is rounding noise, which the
    rules would blow up.
    """
    held, matrix, how = b.states[index], b.matrix(index), Descent.of(b.hyper)
    norm = torch.linalg.vector_norm(matrix, dtype=b.dtype)
    if not b.layout.alone:
        norm = b.layout.sum_all(norm.square()).sqrt()
    usable = norm.isfinite() & (norm > 0)
    if b.fresh[index] or (norm.device.type == "cpu" and not usable):
        return
    norm = torch.where(usable, norm, 1.0)
    basis, rule, lr = held["basis"], RULES[how.hyper.rule], how.hyper.lr
    image = (-low if b.hyper.maximize else low) / norm  # Y, whatever sign the weights follow
    adjoint = b.layout.sum_rows(linalg.product(matrix.T, image) / norm)
    grad = pca_gradient(basis, image, adjoint, how.ortho, b.layout)
    if grad.device.type != "cpu":
        grad = torch.where(usable, grad, 0.0)
    held[f"{PREFIX}step"] += 1
    moments = {name: held[PREFIX + name] for name in rule.buffers(tuple(basis.shape), how.hyper)}
    direction = torch.empty_like(grad)
    lies = sides.basis(b.layout, b.whole)
    work = Work([grad], [moments], [int(held[f"{PREFIX}step"])], [basis], [direction], layout=lies, weighs=lies)
    rule.direction(work, how.hyper)
    basis.mul_(1 - lr * how.decay).sub_(direction if rule.absolute else direction.mul_(lr))


class Descending(Dense):
    """P with an optimizer of its own, in fp32 so that small steps move it."""

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper) -> dict[str, Spec]:
        """`b r` elements of P, and the state of its rule."""
        work, shape, own = codec.work_dtype(param.dtype), view.basis_shapes["basis"], Descent.of(hyper).hyper
        moments = {
            PREFIX + name: Spec(size, work, param.device, axis="" if name.endswith("_col") else "projected")
            for name, size in RULES[own.rule].buffers(shape, own).items()
        }
        return {"basis": Spec(shape, work, param.device, axis="projected"), f"{PREFIX}step": counter(), **moments}


DESCENDING = Descending()
