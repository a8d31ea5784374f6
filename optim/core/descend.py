"""Online principal component analysis: the basis follows the gradient by descent instead of being recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import codec, counts, linalg, sides
from .basis import Dense
from .rules import RULES, Work
from .spec import Spec
from .together import batches, reduced
from .view import MatrixView

if TYPE_CHECKING:
    from .bucket import Bucket
    from .hyper import Hyper

PREFIX = "basis_"
"""State of the basis' own optimizer carries this prefix."""

BASIS_RULES = {"adam": "adamw", "sgd": "sgd", "lion": "lion", "adafactor": "adafactor"}
"""Optimizers of the basis, and the rules that they are."""

BETAS = {"adam": (0.9, 0.999), "sgd": (0.0, 0.0), "lion": (0.9, 0.99), "adafactor": (0.0, 0.999)}


def pca_gradient(basis: Tensor, adjoint: Tensor, grams: tuple[Tensor, Tensor], ortho: float) -> Tensor:
    """Gradient of `|A P P^T - A|^2 + lam |P^T P - I|^2` in P, for A of unit norm, without a matrix of A's size.

        Y = A P,  Z = A^T Y,  S = P^T P,  B = Y^T Y:    2 (Z S + P B - 2 Z) + 4 lam P (S - I)
                                                      = Z (2 S - 4 I) + P (2 B + 4 lam (S - I))

    Args:
        basis: P (b, r).
        adjoint: Z (b, r).
        grams: S and B (r, r), overwritten.
        ortho: lam.
    """
    gram, captured = grams
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


def descend_(b: Bucket, low: Tensor) -> None:
    """`P <- (1 - e wd) P - e D` for the matrices of a bucket, D the direction of the basis' rule on `pca_gradient`.

    A zero or non-finite gradient leaves P and its moments as they are (on a GPU, where asking would synchronise, the
    rule runs on a gradient of zeros instead). So does the step that found P: there the gradient of L is rounding noise,
    which rules that normalise would blow up.

    Args:
        b: The bucket.
        low: R (k, a, r), all rows of it.
    """
    moving = [index for index, ready in enumerate(b.ready) if ready is None and not b.fresh[index]]
    norms, how = _norms(b, moving), Descent.of(b.hyper)
    usable = {index: norm.isfinite() & (norm > 0) for index, norm in norms.items()}
    on_host = low.device.type == "cpu"
    if on_host:
        moving = [index for index in moving if usable[index]]
    norms = {index: torch.where(usable[index], norms[index], 1.0) for index in moving}
    for batch in batches(b.layout, moving):
        for index, adjoint, grams in _products(b, low, norms, batch):
            grad = pca_gradient(b.states[index]["basis"], adjoint, grams, how.ortho)
            _move_(b, index, grad if on_host else torch.where(usable[index], grad, 0.0), how)


def _norms(b: Bucket, chosen: list[int]) -> dict[int, Tensor]:
    """Norms |A| of some gradients, over all of their pieces."""
    if not chosen:
        return {}
    norms = torch.stack([torch.linalg.vector_norm(b.grads[index], dtype=b.dtype) for index in chosen])
    norms = norms if b.layout.alone else b.layout.sum_all(norms.square()).sqrt()
    return dict(zip(chosen, norms.unbind(), strict=True))


def _products(
    b: Bucket, low: Tensor, norms: dict[int, Tensor], batch: list[int]
) -> Iterator[tuple[int, Tensor, tuple[Tensor, Tensor]]]:
    """Z (b, r), S and B (r, r) of some matrices, for A of unit norm: two collectives for all, where there are any."""
    adjoint, captured = [], []
    for index in batch:
        image = (-low[index] if b.hyper.maximize else low[index]) / norms[index]  # Y = A P; `project` negated R
        adjoint.append(linalg.product(b.matrix(index).T, image) / norms[index])
        captured.append(image.T @ image)
    rows = reduced(b.layout.sum_rows, [*adjoint, *captured])
    bases = [b.states[index]["basis"] for index in batch]
    grams = reduced(b.layout.sum_cols, [basis.T @ basis for basis in bases])
    for index, z, s, y in zip(batch, rows, grams, rows[len(batch) :], strict=False):
        yield index, z, (s, y)


def _move_(b: Bucket, index: int, grad: Tensor, how: Descent) -> None:
    """One step of the basis' own optimizer."""
    held = b.states[index]
    basis, rule, lr = held["basis"], RULES[how.hyper.rule], how.hyper.lr
    moments = {name: held[PREFIX + name] for name in rule.buffers(tuple(basis.shape), how.hyper)}
    direction = torch.empty_like(grad)
    lies = sides.basis(b.layout, b.whole)
    count = counts.advance([held], how.hyper, f"{PREFIX}step")
    work = Work([grad], [moments], count, [basis], [direction], layout=lies, weighs=lies)
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
        return {
            "basis": Spec(shape, work, param.device, axis="projected"),
            f"{PREFIX}step": counts.spec(param, hyper),
            **moments,
        }


DESCENDING = Descending()
