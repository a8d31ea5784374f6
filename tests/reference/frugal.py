"""Dense FRUGAL (arXiv 2411.07837): a state-full rule on a subspace, a memoryless rule on the rest."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.galore import (
    BasisFn,
    State,
    as_matrix,
    injected_bases,
    lion,
    project,
    project_back,
    sgd,
    side_of,
    svd_bases,
)

SelectFn = Callable[[Tensor, int], Tensor]  # (G (m, n), k) -> k distinct columns, rows or flat entries


def selection_size(select: str, density: float, shape: tuple[int, ...], side: str) -> tuple[int, int]:
    """(size, full size): floor(rho n) columns, floor(rho m) rows, floor(rho m n) entries, round(rho d) directions."""
    m, n = shape
    full = {"columns": n, "rows": m, "randk": m * n, "dense": {"right": n, "left": m, "full": min(m, n)}[side]}[select]
    size = round(density * full) if select == "dense" else int(density * full)
    return max(0, min(size, full)), full


def positions(select: str, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat positions in (m, n) of the selection: columns (m, k), rows (k, n), randk (k,)."""
    grid = torch.arange(shape[0] * shape[1]).reshape(shape)
    if select == "columns":
        return grid[:, index]
    return grid[index] if select == "rows" else grid.flatten()[index]


def scatter(N: Tensor, pos: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(m, n): N at pos, 0 elsewhere."""
    out = N.new_zeros(shape[0] * shape[1])
    out[pos.flatten()] = N.flatten()
    return out.reshape(shape)


def adamw(R: Tensor, state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """Mhat / (sqrt(Vhat) + eps), with one age t per entry."""
    (b1, b2), t = betas, state["t"]
    state["M"] = b1 * state.get("M", torch.zeros_like(R)) + (1 - b1) * R
    state["V"] = b2 * state.get("V", torch.zeros_like(R)) + (1 - b2) * R * R
    return (state["M"] / (1 - b1**t)) / ((state["V"] / (1 - b2**t)).sqrt() + eps)


def full_rule(rule: str, R: Tensor, state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """Direction of the state-full rule on R."""
    state["t"] = state.get("t", torch.zeros_like(R)) + 1
    if rule == "adamw":
        return adamw(R, state, betas, eps)
    return {"sgd": sgd, "lion": lion}[rule](R, state, 1.0, betas)[0]


def free_rule(free: str, E: Tensor) -> Tensor:
    """sign(E), E or 0."""
    return {"signsgd": torch.sign, "sgd": torch.clone, "none": torch.zeros_like}[free](E)


def reset(state: State) -> None:
    """M = V = 0 and t = 0."""
    for key in ("M", "V", "t"):
        state.pop(key, None)


def rotate(state: State, C: Tensor, Cl: Tensor) -> None:
    """M <- Cl M C^T, V <- (Cl * Cl) V (C * C)^T."""
    state["M"] = Cl @ state["M"] @ C.T
    if "V" in state:
        state["V"] = (Cl * Cl) @ state["V"] @ (C * C).T


def refresh_index(G: Tensor, state: State, select: str, size: int, transfer: str, select_fn: SelectFn) -> None:
    """New positions; reproject: s <- P_k(P_{k-1}^{-1}(s)) for M, V and the ages, so new entries start at zero."""
    pos = positions(select, select_fn(G, size), tuple(G.shape))
    if transfer == "reset":
        reset(state)
    if transfer == "reproject":
        for key in {"M", "V", "t"} & state.keys():
            state[key] = scatter(state[key], state["pos"], tuple(G.shape)).flatten()[pos]
    state["pos"] = pos


def refresh_dense(
    G: Tensor, state: State, rank: int, side: str, transfer: str, align: bool, basis_fn: BasisFn | None
) -> None:
    """New bases (L, P); keep with ``align``: columns flipped to diag(P_new^T P_old) >= 0; reproject: ``rotate``."""
    L, P = injected_bases(G, rank, side, basis_fn) if basis_fn else svd_bases(G, rank, side, official=False)
    if transfer == "reset":
        reset(state)
    if "M" in state:
        if transfer == "keep" and align:
            P = torch.where((P * state["P"]).sum(0) < 0, -P, P)
            L = None if L is None else torch.where((L * state["L"]).sum(0) < 0, -L, L)
        if transfer == "reproject":
            Cl = torch.eye(len(state["M"]), dtype=P.dtype) if L is None else L.T @ state["L"]
            rotate(state, P.T @ state["P"], Cl)
    state["L"], state["P"] = L, P


@torch.no_grad()
def frugal_step(
    weight: Tensor,  # (m, n) or (m, ...), updated in place
    grad: Tensor,  # like weight
    state: State,  # {} at first; c: int; M, V, t (ages): like R; pos or L, P
    *,
    lr: float,
    density: float,  # rho
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gap: int = 200,
    select: str = "columns",  # columns, rows, randk, dense
    rule: str = "adamw",  # adamw, lion, sgd
    free: str = "signsgd",  # signsgd, sgd, none
    full_scale: float = 1.0,  # s_p
    free_scale: float = 1.0,  # s_f
    free_space: str = "ambient",
    state_transfer: str = "reset",
    align: bool = False,
    proj_type: str = "std",
    select_fn: SelectFn | None = None,
    basis_fn: BasisFn | None = None,
) -> None:
    """W <- (1 - lr wd) W - lr s_p (P^-1(rule(P(G))) + s_f free(G - P^-1(P(G)))).

    free_space "complement" removes the part of free(.) inside a dense subspace. Size 0: the free rule, no state; full
    size: the rule on G, never reset.
    """
    W, G, c = as_matrix(weight), as_matrix(grad), state.get("c", 0)
    shape, side = tuple(G.shape), side_of(proj_type, *G.shape)
    size, whole = selection_size(select, density, shape, side)
    if size == 0:
        U = free_scale * free_rule(free, G)
    elif size == whole:
        U = full_rule(rule, G, state, betas, eps)
    elif select == "dense":
        if c % gap == 0:
            refresh_dense(G, state, size, side, state_transfer, align, basis_fn)
        B = (state["L"], state["P"], side)
        R = project(G, *B)
        F = free_rule(free, G - project_back(R, *B))
        if free_space == "complement":
            F = F - project_back(project(F, *B), *B)
        U = project_back(full_rule(rule, R, state, betas, eps), *B) + free_scale * F
    else:
        if c % gap == 0:
            refresh_index(G, state, select, size, state_transfer, select_fn)
        R = G.flatten()[state["pos"]]
        N = scatter(full_rule(rule, R, state, betas, eps), state["pos"], shape)
        U = N + free_scale * free_rule(free, G - scatter(R, state["pos"], shape))
    if size:
        state["c"] = c + 1
    weight.copy_(((1 - lr * weight_decay) * W - lr * full_scale * U).reshape(weight.shape))


def frugal_block_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    active: Collection[int],
    restart: bool = False,
    **kwargs: Any,
) -> None:
    """Whole tensors: the rule on those in ``active``, the free rule on the others, whose states are dropped.

    ``restart`` drops the states of the active ones too, as the released code does at every refresh.
    """
    for i, (weight, grad, state) in enumerate(zip(weights, grads, states, strict=True)):
        if restart or i not in active:
            state.clear()
        frugal_step(weight, grad, state, density=float(i in active), **kwargs)
