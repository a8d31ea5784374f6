"""Dense GaLore+ (arXiv 2412.19820) for one matrix: shared heads, and residuals kept by a dense mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.galore import as_matrix, side_of

Ranges = list[tuple[int, int | None]]  # (rows, heads) of a weight's ranges of rows


def adam(M: Tensor, V: Tensor, t: int, betas: tuple[float, float], eps: float) -> Tensor:
    """Mhat / (sqrt(Vhat) + eps)."""
    return M / (1 - betas[0] ** t) / ((V / (1 - betas[1] ** t)).sqrt() + eps)


def ema(M: Tensor, V: Tensor, X: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Moments of X."""
    return betas[0] * M + (1 - betas[0]) * X, betas[1] * V + (1 - betas[1]) * X * X


def basis_of(A: Tensor, rank: int, heads: int | None, pick: Callable[[int], list[int]]) -> Tensor:
    """P (b, r): leading right singular vectors of A (a, b), or of the heads ``pick`` names."""
    if heads:
        A = torch.cat([A.chunk(heads)[i] for i in pick(heads)])
    return torch.linalg.svd(A, full_matrices=False)[2][:rank].T


def each(f: Callable[..., Tensor], X: Tensor, sizes: tuple[int, ...], *others: Any) -> Tensor:
    """Apply ``f`` to every range of rows."""
    return torch.cat([f(x, *other) for x, *other in zip(X.split(sizes), *others, strict=True)])


def back(N: Tensor, sizes: tuple[int, ...], P: list[Tensor]) -> Tensor:
    """N P^T by ranges, (a, b)."""
    return each(lambda n, p: n @ p.T, N, sizes, P)


def refresh(state: dict[str, Any], new: list[Tensor], sizes: tuple[int, ...], carry: str, additive: bool) -> None:
    """Replace the bases and carry the moments: M, V of R, and the m, v of an additive residual."""
    M, V, old = state["M"], state["V"], state.get("P", new)
    turns = [P.T @ Q for P, Q in zip(new, old, strict=True)]
    if carry == "rotate":
        state["M"] = each(lambda m, C: m @ C.T, M, sizes, turns)
        state["V"] = each(lambda v, C: v @ (C * C).T, V, sizes, turns)
        if additive:
            state["m"] = state["m"] + back(M, sizes, old) - back(state["M"], sizes, new)
    if carry == "reset":
        state.update(M=torch.zeros_like(M), V=torch.zeros_like(V), t=0)
        if additive:
            state.update(m=torch.zeros_like(state["m"]), v=torch.zeros_like(state["v"]), s=0)
    state["P"] = new


def residual_step(state: dict[str, Any], X: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Dense Adam of G or E, from the first step of S."""
    state["s"], state["m"], state["v"] = state["s"] + 1, *ema(state["m"], state["v"], X, betas)
    return adam(state["m"], state["v"], state["s"], betas, eps)


@torch.no_grad()
def galore_plus_step(
    weight: Tensor,  # (m, n) or (m, ...), updated in place
    grad: Tensor,  # like weight
    state: dict[str, Any],  # {} at first
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float,
    rank: int,
    gap: int,
    scale: float,
    proj_type: str = "std",
    carry: str = "rotate",
    residual: str | None = None,
    density: float = 0.0,
    warmup: int = 20,
    ranges: Ranges | None = None,  # projected from the right, with heads
    pick: Callable[[int, int], list[int]] = lambda refresh, heads: [0],  # heads that lend their basis
) -> None:
    """GaLore-AdamW by ranges of rows; then U_S = Adam(G) (exact) or U_S += Adam(G - back(R)) (additive)."""
    left = ranges is None and side_of(proj_type, *as_matrix(grad).shape) == "left"
    W, G = (as_matrix(x).T.clone() if left else as_matrix(x).clone() for x in (weight, grad))  # (a, b)
    c, k, exact = state.get("c", 0), round(density * G.numel()), residual == "exact"
    sizes, heads = zip(*(ranges or [(len(G), None)]), strict=True)
    for name in "MVEmv":
        state.setdefault(name, torch.zeros(len(G), rank).to(G) if name in "MV" else torch.zeros_like(G))
    if c % gap == 0:
        new = [basis_of(A, rank, h, lambda h: pick(c // gap, h)) for A, h in zip(G.split(sizes), heads, strict=True)]
        refresh(state, new, sizes, carry, residual == "additive")
    R = each(lambda A, P: A @ P, G, sizes, state["P"])  # (a, r)
    E = G - back(R, sizes, state["P"])
    state.update(c=c + 1, t=state.get("t", 0) + 1, s=state.get("s", 0))
    state["M"], state["V"] = ema(state["M"], state["V"], R, betas)
    U = back(adam(state["M"], state["V"], state["t"], betas, eps), sizes, state["P"])
    if k == G.numel():
        state["S"] = torch.ones_like(G, dtype=torch.bool)
    if residual and "S" in state:
        D = residual_step(state, G if exact else E, betas, eps)
        U = torch.where(state["S"], D if exact else U + D, U)
    elif residual:
        state["E"] = betas[0] * state["E"] + (1 - betas[0]) * E  # dM
        if c + 1 >= min(warmup, gap):
            chosen = state["E"].abs().flatten().topk(k).indices
            state["S"] = torch.zeros(G.numel(), dtype=torch.bool).index_fill(0, chosen, True).view_as(G)
    W = W * (1 - lr * weight_decay) - lr * scale * U
    weight.copy_((W.T if left else W).reshape(weight.shape))
