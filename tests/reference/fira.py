"""Dense Fira (arXiv 2410.01623) for one matrix, in the paper's order or in that of the released code."""

import torch
from torch import Tensor

from tests.reference.galore import BasisFn, State, adamw, as_matrix, project, project_back, refresh, side_of


def rmsprop(R: Tensor, state: State, lr: float, betas: tuple[float, float], eps: float) -> tuple[Tensor, float]:
    """V <- b2 V + (1 - b2) R*R, N = R / (sqrt(V) + eps); b1 > 0: M <- b1 M + N, direction M. No bias correction."""
    b1, b2 = betas
    state["V"] = V = torch.addcmul(b2 * state.get("V", torch.zeros_like(R)), R, R, value=1 - b2)
    N = R / (V.sqrt() + eps)
    if b1:
        state["M"] = N = b1 * state.get("M", torch.zeros_like(R)) + N
    return N, lr


def growth(N: Tensor, R: Tensor, scale_mode: str, side: str) -> Tensor:
    """Phi_j = ||N_j|| / (||R_j|| + 1e-8), j the rows of (a, r), shaped to broadcast over (m, n); matrix: one scalar."""
    if scale_mode == "matrix":
        return N.norm() / (R.norm() + 1e-8)
    phi = N.norm(dim=1) / (R.norm(dim=1) + 1e-8)  # (a,)
    return {"right": phi[:, None], "left": phi[None, :]}[side]


def limiter(S: Tensor, state: State, gamma: float | None, official: bool) -> Tensor:
    """L = max(||S|| / (s + 1e-8), gamma) / gamma, S <- S / L, s <- ||S|| / L.

    Without s, S passes and s = ||S||. Unless ``official``, s = 0 or non-finite counts as none, and s is at least fp32.
    """
    norm = S.norm() if official or S.dtype == torch.float64 else S.float().norm()
    s = state.get("s")
    unset = s is None or not (official or (s > 0 and s.isfinite()))
    if unset or gamma is None:
        state["s"] = norm
        return S
    L = max(norm / (s + 1e-8), gamma) / gamma  # gamma stays unrounded in bf16
    state["s"] = norm / L
    return (S / L).to(S.dtype)


@torch.no_grad()
def fira_step(
    weight: Tensor,  # (m, n) or (m, ...), updated in place
    grad: Tensor,  # like weight
    state: State,  # {} at first; adds s: 0-d, the last limited norm
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rank: int,
    gap: int,
    scale: float = 1.0,  # alpha
    gamma: float | None = 1.01,  # None: no limiter
    scale_mode: str = "column",
    residual: str = "exact",
    official: bool = False,
    proj_type: str = "std",
    carry: str = "keep",
    rule: str = "adamw",
    basis_fn: BasisFn | None = None,
) -> None:
    """R = project(G), N = rule(R), E = G - back(R), S = limiter(phi E), W <- (1 - lr wd) W - lr alpha (back(N) + S).

    residual "official": E = G - alpha back(R), W <- W - lr (alpha back(N) + S). ``official`` implies it, takes phi and
    S from N = M / (sqrt(V) + eps), moves the bias corrections to the step size and decays last (rmsprop: not at all).
    """
    W, G, c = as_matrix(weight), as_matrix(grad), state.get("c", 0)
    side, leak = side_of(proj_type, *G.shape), official or residual == "official"
    if c % gap == 0:
        refresh(G, state, rank, side, carry, official, basis_fn)
    state["c"], state["t"] = c + 1, state.get("t", 0) + 1
    L, P = state["L"], state["P"]
    R = project(G, L, P, side)
    N, step = adamw(R, state, lr, betas, eps, official) if rule == "adamw" else rmsprop(R, state, lr, betas, eps)
    E = G - project_back(R, L, P, side) * (scale if leak else 1.0)
    S = limiter(growth(N, R, scale_mode, side) * E, state, gamma, official)
    U = project_back(N, L, P, side) * scale + (S if leak else scale * S)
    decay = 0.0 if official and rule == "rmsprop" else lr * weight_decay
    if not official:
        W = torch.add(W, W, alpha=-decay)
    W = torch.add(W, U, alpha=-step)
    if official:
        W = torch.add(W, W, alpha=-decay)
    weight.copy_(W.reshape(weight.shape))
