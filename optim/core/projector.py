"""Projectors: how the basis P of a matrix is found at a refresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...kernels import random
from . import linalg
from .basis import DENSE, Bases, Basis
from .coordinates import COSINE, INDEX
from .cross_head import cross_head
from .descend import DESCENDING
from .flat import SINGLE
from .layout import Layout
from .seeded import SeededBasis
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper

POWER_ITERATIONS = 2
OVERSAMPLE = 8


@dataclass(frozen=True, slots=True)
class Request:
    """What a projector gets to know.

    Args:
        matrix: The oriented gradient A (a x b), finite and not zero.
        scale: max|A|, a 0-d tensor.
        view: Orientation and rank, of this rank's piece.
        whole: The same of the whole matrix.
        layout: Sums over shards.
        seed: A seed of this matrix and this refresh.
        old: The basis in use (b x r), or None before the first refresh.
        hyper: Options of the group, for projectors that have some of their own.
        done: Refreshes done before this one.
    """

    matrix: Tensor
    scale: Tensor
    view: MatrixView
    whole: MatrixView
    layout: Layout
    seed: int
    old: Tensor | None
    hyper: Hyper | None = None
    done: int = 0


class Gaussian(Basis):
    """P itself with entries N(0, 1/r), not orthonormal: `E[P P^T] = I`, so that rows of R are as long as those of A.

    Kept and multiplied as a dense basis; its length depends on the rank, so that it cannot be cut to another one.
    """

    names = DENSE.names
    specs, change, columns = DENSE.specs, DENSE.change, DENSE.columns
    project, project_back_ = DENSE.project, DENSE.project_back_

    def arbitrary(self, view: MatrixView, seed: int, device: torch.device) -> Bases:
        """Entries from the seed."""
        sides = enumerate(view.basis_shapes.values())
        return Bases(
            *(SeededBasis("gaussian", random.mix(seed, side), *size).matrix(device=device) for side, size in sides)
        )


GAUSSIAN = Gaussian()


class Projector(NamedTuple):
    """One way to choose the subspace.

    Args:
        find: Finds a basis from the gradient, before it is projected.
        basis: How the basis is kept and multiplied.
        side: The side that it projects whatever the group's `proj_type` says: "left", "right" or "flat" (the entries
            of the whole matrix); None leaves the choice to the group.
        follows: After its first basis it moves at the end of a step, from A and R, instead of being found anew.
        searches: Finding a basis is work that replicas may share; others follow from the seed.
    """

    find: Callable[[Request], Bases]
    basis: Basis = DENSE
    side: str | None = None
    follows: bool = False
    searches: bool = False


def sketch(request: Request) -> Bases:
    """Randomized subspace iteration (Halko et al., arXiv 0909.4061): the dominant subspace in a few thin GEMMs.

        Q_0 = [P_old, Omega]  or  qr(A^T Omega);   Q <- qr(A^T A Q) once or twice;   P = Q E

    with 8 columns more than the rank and E the leading eigenvectors of `(A Q)^T A Q`; once is enough where Q then
    holds 0.999 of all energy, as real gradients allow. It costs a fraction of an SVD and captures 0.99 or more of its
    energy from a cold start on spectra down to i^-1/2, or warm on a drifting gradient (0.985 from the basis of an
    unrelated one).
    """
    matrix, view, scale, layout = request.matrix, request.view, request.scale, request.layout
    width, mine = min(view.rank + OVERSAMPLE, request.whole.b), layout.projected(view)
    if request.old is None:
        omega = random.normal(request.seed, layout.kept(view), width, matrix.device).to(scale.dtype)
        start = linalg.orthonormal(layout.sum_rows(linalg.product(matrix.T, omega / scale)), layout, mine.start)
    else:
        fresh = random.normal(request.seed, mine, width - view.rank, matrix.device).to(scale.dtype)
        start = torch.cat([request.old.to(scale.dtype), fresh / request.whole.b**0.5], dim=1)
    columns, image = linalg.range_finder(matrix, start, POWER_ITERATIONS, scale, layout, mine.start)
    basis, low = linalg.ritz(columns, image, view.rank, layout)
    if request.old is not None:  # signs are free: moments that keep their numbers need those of the basis in use
        along = layout.sum_cols((request.old.to(basis.dtype) * basis).sum(0))
        signs = torch.where(along < 0, -1.0, 1.0).to(basis.dtype)
        basis.mul_(signs)
        low.mul_(signs)
    return _bases(request, basis, low.mul_(scale))


def svd(request: Request) -> Bases:
    """The exact leading singular vectors, from the smaller Gram matrix in fp64; pieces of a matrix are gathered."""
    matrix = request.layout.gather_all(request.matrix, request.whole)
    basis = linalg.exact_basis(matrix, request.view.rank, request.scale.double()).to(request.scale.dtype)
    basis = own_piece(Bases(basis), request.view, request.layout).basis
    return _bases(request, basis, request.layout.sum_cols(request.matrix.to(basis.dtype) @ basis))


def anything(basis: Basis) -> Callable[[Request], Bases]:
    """From the seed alone, new at every refresh, without a look at the gradient."""

    def find(request: Request) -> Bases:
        found = basis.arbitrary(request.whole, request.seed, request.matrix.device)
        if found.basis.is_floating_point():
            dtype = request.scale.dtype
            found = Bases(found.basis.to(dtype), None if found.left is None else found.left.to(dtype))
        return own_piece(found, request.view, request.layout)

    return find


def first_of_descent(request: Request) -> Bases:
    """The first basis of one that descends: `proj_init`, another projector."""
    return PROJECTORS["sketch" if request.hyper is None else request.hyper.proj_init].find(request)


def cosines(request: Request) -> Bases:
    """The r columns of the fixed cosine matrix D that hold most of the gradient: the largest column norms of A D."""
    scale, view, layout = request.scale, request.view, request.layout
    mine = layout.projected(view)
    matrix = random.cosines(request.whole.b, request.matrix.dtype, request.matrix.device)[mine.start : mine.stop]
    image = linalg.product(request.matrix, matrix.to(scale.dtype) / scale)  # (a, b), summed as R is
    energy = layout.sum_low(layout.reduce(image[None])[0].square().sum(0))
    return Bases(energy.topk(view.rank).indices.sort().values.int())


def official_svd(request: Request) -> Bases:
    """The authors' own SVD call: fp32, in the weight's orientation, rounded to the gradient's dtype."""
    matrix = request.layout.gather_all(request.matrix, request.whole)
    left, right = linalg.lapack_bases(matrix.T if request.view.transposed else matrix, request.view.rank)
    if request.view.full:
        return own_piece(Bases(right, left), request.view, request.layout)
    return own_piece(Bases(left if request.view.transposed else right), request.view, request.layout)


def own_piece(found: Bases, view: MatrixView, layout: Layout) -> Bases:
    """This rank's rows of a whole basis, `view` being of its piece; indices, and stacks of bases, it has all of."""
    if found.basis.ndim != 2:
        return found
    mine, kept = layout.projected(view), layout.kept(view)
    left = None if found.left is None else found.left[kept.start : kept.stop]
    return Bases(found.basis[mine.start : mine.stop], left)


def _bases(request: Request, basis: Tensor, image: Tensor) -> Bases:
    """Add the left basis of a full projection: an orthonormal basis of the range of A P."""
    if request.view.full:
        layout = request.layout.flipped
        return Bases(basis, linalg.orthonormal(image / request.scale, layout, request.layout.kept(request.view).start))
    return Bases(basis, image=image)


PROJECTORS: dict[str, Projector] = {
    "sketch": Projector(sketch, searches=True),
    "svd": Projector(svd, searches=True),
    "track": Projector(sketch, follows=True, searches=True),
    "descend": Projector(first_of_descent, DESCENDING, follows=True, searches=True),
    "random": Projector(anything(DENSE)),
    "gaussian": Projector(anything(GAUSSIAN), GAUSSIAN),
    "cross_head": Projector(partial(cross_head, sketch), DENSE, "right"),
    "dct": Projector(cosines, COSINE),
    "columns": Projector(anything(INDEX), INDEX, "right"),
    "rows": Projector(anything(INDEX), INDEX, "left"),
    "randk": Projector(anything(SINGLE), SINGLE, "flat"),
    "randperm": Projector(anything(INDEX), INDEX),
}
