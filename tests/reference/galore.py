"""Dense GaLore (arXiv 2403.03507) for one matrix, in the authors' order or with torch.optim.AdamW semantics."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BasisFn = Callable[[Tensor, int], Tensor]  # (A (a, b), rank) -> P (b, r)
State = dict[str, Any]  # c, t: int; P, L: bases; M, V (or row, col): moments in the low-rank space


def as_matrix(x: Tensor) -> Tensor:
    """View (d0, d1, ...) as (d0, d1 * ...)."""
    return x.reshape(x.shape[0], -1)


def side_of(proj_type: str, m: int, n: int) -> str:
    """Resolve ``std`` (project the smaller side, square: right) and ``reverse_std`` to left / right."""
    if proj_type in ("left", "right", "full"):
        return proj_type
    return "right" if (m >= n) == {"std": True, "reverse_std": False}[proj_type] else "left"


def svd_bases(G: Tensor, rank: int, side: str, official: bool) -> tuple[Tensor | None, Tensor]:
    """Thin SVD G = U S V^T -> (L, P): right (-, V_r), left (-, U_r), full (U_r, V_r); r = min(rank, m, n).

    ``official`` factors in fp32 whatever the dtype; otherwise fp64 stays fp64. Bases return in the dtype of G.
    """
    U, _, Vh = torch.linalg.svd(G.float() if official or G.dtype != torch.float64 else G, full_matrices=False)
    U, V = U[:, :rank].to(G.dtype), Vh[:rank].T.to(G.dtype)  # (m, r), (n, r)
    return {"right": (None, V), "left": (None, U), "full": (U, V)}[side]


def injected_bases(G: Tensor, rank: int, side: str, basis_fn: BasisFn) -> tuple[Tensor | None, Tensor]:
    """(L, P) from ``basis_fn`` applied to the oriented gradient(s)."""
    rank = min(rank, *G.shape)
    if side == "left":
        return None, basis_fn(G.T, rank)
    return (basis_fn(G.T, rank) if side == "full" else None), basis_fn(G, rank)


def carry_moments(state: State, L: Tensor | None, P: Tensor, carry: str) -> None:
    """Move the moments from the old bases to (L, P), with C = P_new^T P_old and C_l = L_new^T L_old.

    keep: verbatim. reset: zero, t = 0. rotate: M <- C_l M C^T, V <- (C_l * C_l) V (C * C)^T; a factored V is
    rebuilt as row col^T / mean(row), rotated, and reduced to its new row and column means.
    """
    if carry == "reset":
        state["t"] = 0
        for key in ("M", "V", "row", "col"):
            state.pop(key, None)
    if carry != "rotate" or "M" not in state:
        return
    C = P.T @ state["P"]  # (r, r)
    Cl = torch.eye(len(state["M"]), dtype=P.dtype) if L is None else L.T @ state["L"]
    state["M"] = Cl @ state["M"] @ C.T
    if "V" in state:
        state["V"] = (Cl * Cl) @ state["V"] @ (C * C).T
    if "row" in state:
        V = (Cl * Cl) @ torch.outer(state["row"], state["col"]) / state["row"].mean() @ (C * C).T
        state["row"], state["col"] = V.mean(1), V.mean(0)


def adamw(
    R: Tensor, state: State, lr: float, betas: tuple[float, float], eps: float, official: bool
) -> tuple[Tensor, float]:
    """M, V: EMAs of R, R*R. torch: Mhat / (sqrt(Vhat) + eps); official: M / (sqrt(V) + eps), lr sqrt(bc2) / bc1."""
    b1, b2, t = *betas, state["t"]
    state["M"] = M = torch.add(b1 * state.get("M", torch.zeros_like(R)), R, alpha=1 - b1)
    state["V"] = V = torch.addcmul(b2 * state.get("V", torch.zeros_like(R)), R, R, value=1 - b2)
    if official:
        return M / (V.sqrt() + eps), lr * math.sqrt(1 - b2**t) / (1 - b1**t)
    return (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + eps), lr


def sgd(R: Tensor, state: State, lr: float, betas: tuple[float, float]) -> tuple[Tensor, float]:
    """M <- b1 M + R; direction M."""
    state["M"] = betas[0] * state.get("M", torch.zeros_like(R)) + R
    return state["M"], lr


def lion(R: Tensor, state: State, lr: float, betas: tuple[float, float]) -> tuple[Tensor, float]:
    """Direction sign(b1 M + (1 - b1) R), then M <- b2 M + (1 - b2) R."""
    (b1, b2), M = betas, state.get("M", torch.zeros_like(R))
    state["M"] = b2 * M + (1 - b2) * R
    return torch.sign(b1 * M + (1 - b1) * R), lr


def adafactor(R: Tensor, state: State, lr: float, b1: float) -> tuple[Tensor, float]:
    """Factored second moment of R (a, r), b2_t = 1 - t^-0.8, clip at rms 1, M = EMA of lr U (b1 = 0: none)."""
    b2, Q = 1 - state["t"] ** -0.8, R * R + 1e-30
    state["row"] = row = b2 * state.get("row", 0.0) + (1 - b2) * Q.mean(1)  # (a,)
    state["col"] = col = b2 * state.get("col", 0.0) + (1 - b2) * Q.mean(0)  # (r,)
    U = R * (row / row.mean()).rsqrt()[:, None] * col.rsqrt()[None, :]
    U = U / U.square().mean().sqrt().clamp(min=1.0)
    state["M"] = b1 * state.get("M", torch.zeros_like(R)) + (1 - b1) * lr * U
    return state["M"], 1.0


def refresh(
    G: Tensor, state: State, rank: int, side: str, carry: str, official: bool, basis_fn: BasisFn | None
) -> None:
    """Replace the bases by those of the current gradient G (m, n) and carry the moments over."""
    L, P = injected_bases(G, rank, side, basis_fn) if basis_fn else svd_bases(G, rank, side, official)
    carry_moments(state, L, P, carry)
    state["L"], state["P"] = L, P


def project(G: Tensor, L: Tensor | None, P: Tensor, side: str) -> Tensor:
    """R (a, r) = A P: right G P; left G^T P, as (P^T G)^T so that it rounds like the authors'; full L^T G P (r, r)."""
    if side == "full":
        return L.T @ G @ P
    return G @ P if side == "right" else (P.T @ G).T


def project_back(N: Tensor, L: Tensor | None, P: Tensor, side: str) -> Tensor:
    """(m, n): right N P^T; left P N^T; full L N P^T."""
    if side == "full":
        return L @ N @ P.T
    return N @ P.T if side == "right" else P @ N.T


def inner_rule(
    rule: str, R: Tensor, state: State, lr: float, betas: tuple[float | None, float], eps: float, official: bool
) -> tuple[Tensor, float]:
    """(N, step) of the inner rule, for the update W <- W - step scale back(N); b1 = None is 0."""
    b1, b2 = betas[0] or 0.0, betas[1]
    if rule == "adamw":
        return adamw(R, state, lr, (b1, b2), eps, official)
    if rule == "adafactor":
        return adafactor(R, state, lr, b1)
    return {"sgd": sgd, "lion": lion}[rule](R, state, lr, (b1, b2))


@torch.no_grad()
def galore_step(
    weight: Tensor,  # (m, n) or (m, ...), updated in place
    grad: Tensor,  # like weight
    state: State,  # {} at first
    *,
    lr: float,
    betas: tuple[float | None, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rank: int,
    gap: int,
    scale: float = 1.0,
    proj_type: str = "std",
    carry: str = "keep",
    official: bool = False,
    rule: str = "adamw",
    basis_fn: BasisFn | None = None,
) -> None:
    """Bases from G if c % gap == 0 (c finished steps); R = project(G); (N, step) = rule(R); W -= step scale back(N).

    Decay W <- (1 - lr wd) W comes first, except in the official AdamW order, where it follows the update.
    """
    wide = rule == "adafactor" and grad.dtype in (torch.float16, torch.bfloat16)
    W, G = (as_matrix(x.float() if wide else x) for x in (weight, grad))
    side, c, decay_last = side_of(proj_type, *G.shape), state.get("c", 0), official and rule != "adafactor"
    if c % gap == 0:
        refresh(G, state, rank, side, carry, official, basis_fn)
    state["c"], state["t"] = c + 1, state.get("t", 0) + 1
    R = project(G, state["L"], state["P"], side)
    N, step = inner_rule(rule, R, state, lr, betas, eps, official)
    if not decay_last:
        W = torch.add(W, W, alpha=-lr * weight_decay)
    W = torch.add(W, project_back(N, state["L"], state["P"], side) * scale, alpha=-step)
    if decay_last:
        W = torch.add(W, W, alpha=-lr * weight_decay)
    weight.copy_(W.reshape(weight.shape))
