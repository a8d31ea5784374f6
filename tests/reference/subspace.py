"""Energy and overlap of subspaces, and dense randomized subspace iteration (arXiv 0909.4061, Algorithm 4.4)."""

import torch
from torch import Tensor


def best_rank_energy(A: Tensor, r: int) -> float:
    """sum_{i <= r} s_i(A)^2, the most that r orthonormal directions can capture (Eckart-Young)."""
    return float(torch.linalg.svdvals(A.double())[:r].square().sum())


def captured_energy(A: Tensor, P: Tensor) -> float:
    """||A P P^+||_F^2 for A (a, b), P (b, r): the energy of the rows of A in span(P); ||A P||_F^2 if P^T P = I."""
    A, P = A.double(), P.double()
    return float((A @ P @ torch.linalg.pinv(P)).square().sum())


def orthonormality_error(P: Tensor) -> float:
    """Max |P^T P - I|."""
    P = P.double()
    return float((P.T @ P - torch.eye(P.shape[1], dtype=P.dtype)).abs().max())


def overlap(P1: Tensor, P2: Tensor) -> float:
    """||P1^T P2||_F^2 / r, the mean squared cosine of the principal angles; free of column signs and order."""
    return float((P1.double().T @ P2.double()).square().sum()) / P1.shape[1]


def gaussian_start(A: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """A^T Omega (b, k) with Omega (a, k) iid N(0, 1)."""
    return A.T @ torch.randn(A.shape[0], k, generator=generator, dtype=A.dtype)


def warm_start(P: Tensor, oversample: int, generator: torch.Generator | None = None) -> Tensor:
    """[P, noise] (b, r + oversample) with iid N(0, 1) noise."""
    return torch.cat([P, torch.randn(P.shape[0], oversample, generator=generator, dtype=P.dtype)], dim=1)


def randomized_subspace_iteration(A: Tensor, r: int, start: Tensor, n_iter: int = 2) -> Tensor:
    """Top-r right singular directions of A (a, b), as P (b, r), from ``start`` (b, k >= r).

    Q = qr(start); n_iter times: Y = qr(A Q), Q = qr(A^T Y); P = Q E_r, E_r the top eigenvectors of (A Q)^T A Q.
    """
    Q = torch.linalg.qr(start).Q  # (b, k)
    for _ in range(n_iter):
        Y = torch.linalg.qr(A @ Q).Q  # (a, min(a, k))
        Q = torch.linalg.qr(A.T @ Y).Q
    B = A @ Q
    _, E = torch.linalg.eigh(B.T @ B)  # ascending
    return Q @ E.flip(1)[:, :r]
