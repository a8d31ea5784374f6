"""Projectors: how the basis P of a matrix is found at a refresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .together import reduced, stacked
from .view import MatrixView

if TYPE_CHECKING:
    from .hyper import Hyper

POWER_ITERATIONS = 2
OVERSAMPLE = 8


@dataclass(frozen=True, slots=True)
class Request:
    """What a projector is told about a matrix.

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


Find = Callable[[Sequence[Request]], list[Bases]]


class Gaussian(Basis):
    """P itself with entries N(0, 1/r), not orthonormal: `E[P P^T] = I`, so that rows of R are as long as those of A.

    Kept and multiplied as a dense basis, but no subclass of it: its columns are not orthonormal, and their length
    depends on the rank, so that a checkpoint cannot be converted to another rank.
    """

    names = DENSE.names
    specs, changes, columns = DENSE.specs, DENSE.changes, DENSE.columns
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
        find: Finds bases of matrices of one shape from their gradients, before they are projected.
        basis: How the basis is kept and multiplied.
        side: The side that it projects whatever the group's `proj_type` says: "left", "right" or "flat" (the entries
            of the whole matrix); None leaves the choice to the group.
        follows: After the first search the basis moves at the end of a step, from A and R, and is never found anew.
        searches: Finding a basis takes so much work that replicas may share it; other bases follow from the seed.
    """

    find: Find
    basis: Basis = DENSE
    side: str | None = None
    follows: bool = False
    searches: bool = False


def sketch(requests: Sequence[Request]) -> list[Bases]:
    """Randomized subspace iteration (Halko et al., arXiv 0909.4061): the dominant subspace in a few thin GEMMs.

        Q_0 = [P_old, Omega]  or  qr(A^T Omega);   Q <- qr(A^T A Q) once or twice;   P = Q E

    with 8 columns more than the rank and E the leading eigenvectors of `(A Q)^T A Q`; once is enough where Q then
    holds 0.999 of all energy, as real gradients allow. It costs a fraction of an SVD and captures 0.99 or more of its
    energy from a cold start on spectra down to i^-1/2, or warm on a drifting gradient (0.985 from the basis of an
    unrelated one). Matrices that are searched together share factorisations and sums over shards.
    """
    view, layout = requests[0].view, requests[0].layout
    matrices, scales = [request.matrix for request in requests], [request.scale for request in requests]
    first = layout.projected(view).start
    columns, images = linalg.range_finder(matrices, _starts(requests), POWER_ITERATIONS, scales, layout, first)
    bases, lows = linalg.ritz(columns, images, view.rank, layout)
    _keep_signs(requests, bases, lows)
    return _bases(requests, bases, [low.mul_(scale) for low, scale in zip(lows, scales, strict=True)])


def _starts(requests: Sequence[Request]) -> list[Tensor]:
    """Columns (b, l) to start from: the basis in use and some random ones, or the range of a random mixture of rows."""
    layout, whole = requests[0].layout, requests[0].whole
    width, mine = min(whole.rank + OVERSAMPLE, whole.b), layout.projected(requests[0].view)
    cold = [request for request in requests if request.old is None]
    found = iter(_ranges(cold, width, mine) if cold else ())
    return [next(found) if request.old is None else _warm(request, request.old, width, mine) for request in requests]


def _ranges(requests: Sequence[Request], width: int, mine: range) -> Tensor:
    """`qr(A^T Omega)` (k, b, l)."""
    mixed, layout = [], requests[0].layout
    for request in requests:
        kept, matrix = request.layout.kept(request.view), request.matrix
        omega = random.normal(request.seed, kept, width, matrix.device).to(request.scale.dtype)
        mixed.append(linalg.product(matrix.T, omega / request.scale))
    return linalg.orthonormal(stacked(reduced(layout.sum_rows, mixed)), layout, mine.start)


def _warm(request: Request, old: Tensor, width: int, mine: range) -> Tensor:
    """`[P_old, Omega]`."""
    dtype, whole = request.scale.dtype, request.whole
    fresh = random.normal(request.seed, mine, width - whole.rank, request.matrix.device).to(dtype)
    return torch.cat([old.to(dtype), fresh / whole.b**0.5], dim=1)


def _keep_signs(requests: Sequence[Request], bases: Sequence[Tensor], images: Sequence[Tensor]) -> None:
    """Give columns the signs of the basis in use, in place: signs are free, and moments may keep their numbers."""
    warm = [(r.old, basis, image) for r, basis, image in zip(requests, bases, images, strict=True) if r.old is not None]
    along = reduced(requests[0].layout.sum_cols, [(old.to(basis.dtype) * basis).sum(0) for old, basis, _ in warm])
    for (_, basis, image), inner in zip(warm, along, strict=True):
        signs = torch.where(inner < 0, -1.0, 1.0).to(basis.dtype)
        basis.mul_(signs)
        image.mul_(signs)


def svd(requests: Sequence[Request]) -> list[Bases]:
    """The exact leading singular vectors, from the smaller Gram matrix in fp64; pieces of a matrix are gathered."""
    bases = []
    for request in requests:
        matrix = request.layout.gather_all(request.matrix, request.whole)
        basis = linalg.exact_basis(matrix, request.view.rank, request.scale.double()).to(request.scale.dtype)
        bases.append(own_piece(Bases(basis), request.view, request.layout).basis)
    parts = [request.matrix.to(basis.dtype) @ basis for request, basis in zip(requests, bases, strict=True)]
    return _bases(requests, bases, reduced(requests[0].layout.sum_cols, parts))


def each(find: Callable[[Request], Bases]) -> Find:
    """Search matrix by matrix, where they have nothing to share."""
    return lambda requests: [find(request) for request in requests]


def from_seed(basis: Basis) -> Find:
    """A basis that follows from the seed alone, new at every refresh; the gradient does not matter."""

    def find(request: Request) -> Bases:
        found = basis.arbitrary(request.whole, request.seed, request.matrix.device)
        if found.basis.is_floating_point():
            dtype = request.scale.dtype
            found = Bases(found.basis.to(dtype), None if found.left is None else found.left.to(dtype))
        return own_piece(found, request.view, request.layout)

    return each(find)


def first_of_descent(requests: Sequence[Request]) -> list[Bases]:
    """First bases for `projector="descend"`, by the projector that `proj_init` names."""
    hyper = requests[0].hyper
    return PROJECTORS["sketch" if hyper is None else hyper.proj_init].find(requests)


def cosines(requests: Sequence[Request]) -> list[Bases]:
    """The r columns of the fixed cosine matrix D that hold most of the gradient: the largest column norms of A D."""
    energies = reduced(requests[0].layout.sum_low, [_spectrum(request) for request in requests])
    return [Bases(energy.topk(requests[0].view.rank).indices.sort().values.int()) for energy in energies]


def _spectrum(request: Request) -> Tensor:
    """Squared column norms (b,) of this rank's rows of A D."""
    scale, layout = request.scale, request.layout
    mine = layout.projected(request.view)
    matrix = random.cosines(request.whole.b, request.matrix.dtype, request.matrix.device)[mine.start : mine.stop]
    image = linalg.product(request.matrix, matrix.to(scale.dtype) / scale)  # (a, b), reduced as R is
    return layout.reduce(image[None])[0].square().sum(0)


def official_svd(request: Request) -> Bases:
    """The authors' own SVD call: fp32, in the weight's orientation, rounded to the gradient's dtype."""
    matrix = request.layout.gather_all(request.matrix, request.whole)
    left, right = linalg.lapack_bases(matrix.T if request.view.transposed else matrix, request.view.rank)
    if request.view.full:
        return own_piece(Bases(right, left), request.view, request.layout)
    return own_piece(Bases(left if request.view.transposed else right), request.view, request.layout)


def own_piece(found: Bases, view: MatrixView, layout: Layout) -> Bases:
    """Cut a whole basis to this rank's rows, `view` being of its piece; of indices and stacks of bases it keeps all."""
    if found.basis.ndim != 2:
        return found
    mine, kept = layout.projected(view), layout.kept(view)
    left = None if found.left is None else found.left[kept.start : kept.stop]
    return Bases(found.basis[mine.start : mine.stop], left)


def _bases(requests: Sequence[Request], bases: Sequence[Tensor], images: Sequence[Tensor]) -> list[Bases]:
    """Add the left bases of full projections: orthonormal bases of the ranges of A P."""
    view, layout = requests[0].view, requests[0].layout
    if not view.full:
        return [Bases(basis, image=image) for basis, image in zip(bases, images, strict=True)]
    scaled = [image / request.scale for image, request in zip(images, requests, strict=True)]
    left = linalg.orthonormal(stacked(scaled), layout.flipped, layout.kept(view).start)
    return [Bases(*both) for both in zip(bases, left, strict=True)]


PROJECTORS: dict[str, Projector] = {
    "sketch": Projector(sketch, searches=True),
    "svd": Projector(svd, searches=True),
    "track": Projector(sketch, follows=True, searches=True),
    "descend": Projector(first_of_descent, DESCENDING, follows=True, searches=True),
    "random": Projector(from_seed(DENSE)),
    "gaussian": Projector(from_seed(GAUSSIAN), GAUSSIAN),
    "cross_head": Projector(partial(cross_head, sketch), DENSE, "right"),
    "dct": Projector(cosines, COSINE),
    "columns": Projector(from_seed(INDEX), INDEX, "right"),
    "rows": Projector(from_seed(INDEX), INDEX, "left"),
    "randk": Projector(from_seed(SINGLE), SINGLE, "flat"),
    "randperm": Projector(from_seed(INDEX), INDEX),
}
