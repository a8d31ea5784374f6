"""Projectors: how the basis P of a matrix is found at a refresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import random
from . import linalg
from .layout import Layout
from .view import MatrixView

POWER_ITERATIONS = 2
OVERSAMPLE = 8


@dataclass(frozen=True, slots=True)
class Request:
    """What a projector gets to know.

    Args:
        matrix: The oriented gradient A (a x b), finite and not zero.
        scale: max|A|, a 0-d tensor.
        view: Orientation and rank.
        layout: Sums over shards.
        seed: A seed of this matrix and this refresh.
        old: The basis in use (b x r), or None before the first refresh.
    """

    matrix: Tensor
    scale: Tensor
    view: MatrixView
    layout: Layout
    seed: int
    old: Tensor | None


class Bases(NamedTuple):
    """What a refresh finds.

    Args:
        basis: P (b x r).
        left: For a full projection the left basis Q (a x r).
        image: `A P` (a x r) where the projector has it at hand: the projection of this step's gradient.
    """

    basis: Tensor
    left: Tensor | None = None
    image: Tensor | None = None


def sketch(request: Request) -> Bases:
    """Randomized subspace iteration (Halko et al., arXiv 0909.4061): the dominant subspace in a few thin GEMMs.

        Q_0 = [P_old, Omega]  or  qr(A^T Omega);   Q <- qr(A^T A Q) once or twice;   P = Q E

    with 8 columns more than the rank and E the leading eigenvectors of `(A Q)^T A Q`; once is enough where Q then
    holds 0.999 of all energy, as real gradients allow. It costs a fraction of an SVD and captures 0.99 or more of its
    energy from a cold start on spectra down to i^-1/2, or warm on a drifting gradient (0.985 from the basis of an
    unrelated one).
    """
    matrix, view, scale, sum_rows = request.matrix, request.view, request.scale, request.layout.sum_rows
    width = min(view.rank + OVERSAMPLE, view.b)
    if request.old is None:
        omega = random.normal(request.seed, view.a, width, matrix.device).to(scale.dtype)
        start = linalg.orthonormal(sum_rows(linalg.product(matrix.T, omega / scale)))
    else:
        fresh = random.normal(request.seed, view.b, width - view.rank, matrix.device).to(scale.dtype)
        start = torch.cat([request.old.to(scale.dtype), fresh / view.b**0.5], dim=1)
    columns, image = linalg.range_finder(matrix, start, POWER_ITERATIONS, scale, sum_rows)
    basis, low = linalg.ritz(columns, image, view.rank, sum_rows)
    return _bases(request, basis, low.mul_(scale))


def svd(request: Request) -> Bases:
    """The exact leading singular vectors, from the smaller Gram matrix in fp64."""
    basis = linalg.exact_basis(request.matrix, request.view.rank, request.scale.double()).to(request.scale.dtype)
    return _bases(request, basis, request.matrix.to(basis.dtype) @ basis)


def track(request: Request) -> Bases:
    """One power step from the old basis, `P = qr(A^T (A P_old))`: follows a drifting subspace for two thin GEMMs.

    Meant for short intervals (`update_proj_gap=10`), where a cheap step often keeps more of the gradient's energy than
    an exact basis now and then (arXiv 2410.16103 refreshes so in every step). The first basis is a sketch.
    """
    if request.old is None:
        return sketch(request)
    matrix, scale = request.matrix, request.scale
    columns, image = linalg.range_finder(matrix, request.old.to(scale.dtype), 1, scale, request.layout.sum_rows)
    return _bases(request, columns, image.mul_(scale))


def random_basis(request: Request) -> Bases:
    """Random orthonormal columns, new ones at every refresh, from the seed alone: no look at the gradient."""
    view, matrix, dtype = request.view, request.matrix, request.scale.dtype
    basis = linalg.orthonormal(random.normal(request.seed, view.b, view.rank, matrix.device).to(dtype))
    if not view.full:
        return Bases(basis)
    return Bases(basis, linalg.orthonormal(random.normal(request.seed + 1, view.a, view.rank, matrix.device).to(dtype)))


def official_svd(request: Request) -> Bases:
    """The authors' own SVD call: fp32, in the weight's orientation, rounded to the gradient's dtype."""
    grad = request.matrix.T if request.view.transposed else request.matrix
    left, right = linalg.lapack_bases(grad, request.view.rank)
    if request.view.full:
        return Bases(right, left)
    return Bases(left if request.view.transposed else right)


def _bases(request: Request, basis: Tensor, image: Tensor) -> Bases:
    """Add the left basis of a full projection: an orthonormal basis of the range of A P."""
    if request.view.full:
        return Bases(basis, linalg.orthonormal(image / request.scale))
    return Bases(basis, image=image)


PROJECTORS: dict[str, Callable[[Request], Bases]] = {
    "sketch": sketch,
    "svd": svd,
    "track": track,
    "random": random_basis,
}
