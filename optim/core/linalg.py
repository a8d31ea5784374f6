"""Bases of dominant subspaces: pure functions that take their sums as arguments.

All matrices are oriented (`A` is a x b, bases are b x r). None of these functions fails on finite input, whatever
its rank; callers keep non-finite matrices out. Several matrices are a list, as their gradients are; what is factored
is stacked for it, so that all share a factorisation, and a sum over shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import random
from .layout import ALONE, Layout
from .together import Sum, reduced, stacked

NOISE = 200
"""Roundings by which columns are perturbed where they are orthonormalised without pivots."""

ENOUGH = 0.999
"""Share of the energy of a matrix at which the search for its dominant subspace ends."""


def orthonormal(columns: Tensor, layout: Layout = ALONE, first: int = 0) -> Tensor:
    """Orthonormalise tall columns; deficient directions become arbitrary orthonormal ones.

    By Householder QR on a CPU, where it is the fastest way; elsewhere by Cholesky factors, which are products for the
    most part and never wait for the host, and where rows are sharded, whose Gram matrices are sums.

    Args:
        columns: This rank's rows (b, l) of them, or those of several matrices (k, b, l).
        layout: Sums over shards of the rows.
        first: Number of the first of these rows in the whole.
    """
    if columns.device.type != "cpu" or layout.cols:
        return cholesky_qr(columns, layout, first)
    factor, upper = torch.linalg.qr(columns)
    # Signs as of Cholesky factors, whose diagonal is positive: all devices find the same columns.
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(factor.dtype)
    found: Tensor = (factor * signs[..., None, :]).contiguous()
    return found


def cholesky_qr(columns: Tensor, layout: Layout = ALONE, first: int = 0) -> Tensor:
    """Orthonormalise tall columns by a perturbed, shifted Cholesky-QR in four passes.

    Columns are scaled to unit length and get relative noise of `NOISE` roundings, so that zero and dependent ones
    have a direction; the first two Gram matrices are shifted so that their factors exist whatever the condition; two
    more passes restore orthonormality (Fukaya et al., arXiv 1809.11085).
    """
    rows, count = columns.shape[-2:]
    eps = torch.finfo(columns.dtype).eps
    scaled = columns / largest(columns, layout)
    scaled = scaled / lengths(scaled, layout).clamp_(min=1.0)
    whole = layout.shape[0 if layout.transposed else 1] if layout.cols else rows
    noise = random.normal(count, range(first, first + rows), count, columns.device).to(columns.dtype)
    scaled = scaled.add_(noise, alpha=NOISE * eps / max(whole, 1) ** 0.5)
    scaled = scaled / lengths(scaled, layout)
    for shift in (count * eps, count * eps, 0.0, 0.0):
        gram = layout.sum_cols(scaled.mT @ scaled)
        gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor = torch.linalg.cholesky_ex(gram)[0]
        scaled = torch.linalg.solve_triangular(factor.mT, scaled, upper=True, left=False)
    result: Tensor = scaled.contiguous()
    return result


def largest(columns: Tensor, layout: Layout = ALONE) -> Tensor:
    """Largest magnitudes of columns (..., 1, l), positive."""
    size = (*columns.shape[:-2], 1, columns.shape[-1])
    found = columns.abs().amax(-2, keepdim=True) if columns.shape[-2] else columns.new_zeros(size)  # of an empty piece
    return layout.max_cols(found).clamp_(min=torch.finfo(columns.dtype).tiny)


def lengths(columns: Tensor, layout: Layout = ALONE) -> Tensor:
    """Lengths of columns (..., 1, l)."""
    found: Tensor = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    return layout.sum_cols(found.square()).sqrt() if layout.cols else found


def product(matrix: Tensor, thin: Tensor) -> Tensor:
    """Multiply in the dtype of the large matrix, return in the dtype of the thin one."""
    return (matrix @ thin.to(matrix.dtype)).to(thin.dtype)


def product_in(gemm: torch.dtype, one: Tensor, other: Tensor) -> Tensor:
    """Multiply in the dtype `gemm`, return in the dtype of the first factor."""
    return (one.to(gemm) @ other.to(gemm)).to(one.dtype)


def range_finder(
    matrices: Sequence[Tensor],
    start: Sequence[Tensor],
    iterations: int,
    scales: Sequence[Tensor],
    layout: Layout = ALONE,
    first: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Randomized subspace iteration: `Q <- qr(A^T A Q)`, at most `iterations` times.

    It ends early once Q holds `ENOUGH` of the whole energy, `|A Q|^2 >= ENOUGH |A|^2`, which no basis can exceed by
    more. The tall product A Q is not orthonormalised in between: squaring the spectrum within one iteration costs
    digits only in directions that carry no energy, and saves the larger of the two QRs.

    Args:
        matrices: A (a x b) each.
        start: Well-conditioned start columns (b x l) each.
        iterations: Largest number of power iterations.
        scales: max|A|, divided out so that squares neither overflow nor vanish.
        layout: Sums over shards of A.
        first: Number of the first of this rank's rows of Q.

    Returns:
        Orthonormal columns Q (b x l), and `A Q / scale` (a x l).
    """
    energies = _energies(layout.sum_all, matrices, scales)
    columns, images = list(start), _images(matrices, start, scales, layout)
    for done in range(iterations):
        chosen = unfinished(energies, images, layout) if done else range(len(columns))
        if not chosen:
            break
        adjoints = [product(matrices[i].T, images[i] / scales[i]) for i in chosen]
        found = orthonormal(stacked(reduced(layout.sum_rows, adjoints)), layout, first)
        again = _images([matrices[i] for i in chosen], found, [scales[i] for i in chosen], layout)
        for i, q, image in zip(chosen, found, again, strict=True):
            columns[i], images[i] = q, image
    return columns, images


def unfinished(energies: Tensor, images: Sequence[Tensor], layout: Layout) -> list[int]:
    """Indices of the matrices whose image `A Q / scale` does not hold `ENOUGH` of their energy (k,) yet."""
    held = _energies(layout.sum_rows, images, [energies.new_ones(())] * len(images))
    enough = (energies > 0) & (held >= ENOUGH * energies)
    return [index for index, ends in enumerate(enough.cpu().tolist()) if not ends]


def _images(
    matrices: Sequence[Tensor], columns: Sequence[Tensor] | Tensor, scales: Sequence[Tensor], layout: Layout
) -> list[Tensor]:
    """`A Q / scale` (a, l) of every matrix."""
    each = zip(matrices, columns, scales, strict=True)
    return reduced(layout.sum_cols, [product(matrix, thin / scale) for matrix, thin, scale in each])


def _energies(add: Sum, matrices: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """`|A / scale|^2` of every matrix (k,)."""
    pairs = zip(matrices, scales, strict=True)
    shares = [torch.linalg.vector_norm(matrix, dtype=scale.dtype) / scale for matrix, scale in pairs]
    return add(torch.stack(shares).square())


def ritz(
    columns: Sequence[Tensor], images: Sequence[Tensor], rank: int, layout: Layout = ALONE
) -> tuple[list[Tensor], list[Tensor]]:
    """Rotate columns Q (b x l) to the r best directions of A within their span, largest first (Rayleigh-Ritz).

    Args:
        columns: Orthonormal Q (b x l) of every matrix.
        images: A Q (a x l).
        rank: r.
        layout: Sums over shards of the rows of A.

    Returns:
        The bases P (b x r), and `A P` (a x r).
    """
    grams = stacked(reduced(layout.sum_rows, [image.T @ image for image in images]))  # (k, l, l)
    turned = list(zip(columns, images, eigenvectors(grams)[..., :rank], strict=True))
    return [q @ turn for q, _, turn in turned], [image @ turn for _, image, turn in turned]


def eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of symmetric positive matrices, largest eigenvalue first, surviving a failed convergence."""
    vectors: Tensor
    try:
        vectors = torch.linalg.eigh(gram)[1].flip(-1)
    except RuntimeError:  # such as torch.linalg.LinAlgError: no convergence
        vectors = torch.linalg.svd(gram.double())[0].to(gram.dtype)
    return vectors


def exact_basis(matrix: Tensor, rank: int, scale: Tensor) -> Tensor:
    """The r leading right singular vectors of A (b x r), by the eigenvectors of the smaller fp64 Gram matrix.

    The Gram matrix squares the condition number, which in fp64 costs digits only below 1e-8 of the largest singular
    value; it is several times cheaper than an SVD and always converges.
    """
    wide = matrix.double() / scale
    if wide.shape[1] <= wide.shape[0]:
        return eigenvectors(wide.T @ wide)[:, :rank]
    return orthonormal(wide.T @ eigenvectors(wide @ wide.T)[:, :rank])


def lapack_bases(grad: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left (m x r) and right (n x r) singular vectors by the very SVD call of the authors' code, signs included."""
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    return left[:, :rank].to(grad.dtype), right[:rank].T.to(grad.dtype)
