"""Dense APOLLO (arXiv 2412.05270) for one matrix, in torch's order of AdamW or in that described for the authors'."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.fira import growth, limiter
from tests.reference.galore import State, adamw, as_matrix, project, refresh, side_of

SeededFn = Callable[[int, int, int, int], Tensor]  # (refresh, 0 for P or 1 for L, size, rank) -> (size, rank)


def random_bases(G: Tensor, state: State, rank: int, side: str, at: int, basis_fn: SeededFn) -> None:
    """P ~ N(0, 1/r) on the projected side, new at every refresh; full: L on the other side too."""
    m, n = G.shape
    state["P"] = basis_fn(at, 0, m if side == "left" else n, rank)
    state["L"] = basis_fn(at, 1, m, rank) if side == "full" else None


@torch.no_grad()
def apollo_step(
    weight: Tensor,  # (m, n) or (m, ...), updated in place
    grad: Tensor,  # like weight
    state: State,  # {} at first; P, L, M, V, c, t, and s: 0-d, the last limited norm
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rank: int,
    gap: int,
    scale: float = 1.0,
    gamma: float | None = 1.01,  # None: no limiter
    scale_mode: str = "column",
    official: bool = False,
    proj_type: str = "std",
    carry: str = "keep",
    basis_fn: SeededFn | None = None,  # None: singular vectors
) -> None:
    """R = project(G), N = adamw(R), S = limiter(phi G), W <- (1 - lr wd) W - lr sqrt(scale) S.

    ``official`` takes phi and S from N = M / (sqrt(V) + eps), moves the bias corrections to the step size and decays
    last; s = 0 then locks the limiter.
    """
    W, G, c = as_matrix(weight), as_matrix(grad), state.get("c", 0)
    side = side_of(proj_type, *G.shape)
    if c % gap == 0 and basis_fn is None:
        refresh(G, state, rank, side, carry, official, None)
    elif c % gap == 0:
        random_bases(G, state, rank, side, c // gap, basis_fn)
        if carry == "reset":
            state["t"] = 0
            for key in state.keys() & {"M", "V"}:
                del state[key]
    state["c"], state["t"] = c + 1, state.get("t", 0) + 1
    R = project(G, state["L"], state["P"], side)
    N, step = adamw(R, state, lr, betas, eps, official)
    S = limiter(growth(N, R, scale_mode, side) * G, state, gamma, official)
    U = scale**0.5 * S
    if not official:
        W = torch.add(W, W, alpha=-lr * weight_decay)
    W = torch.add(W, U, alpha=-step)
    if official:
        W = torch.add(W, W, alpha=-lr * weight_decay)
    weight.copy_(W.reshape(weight.shape))
