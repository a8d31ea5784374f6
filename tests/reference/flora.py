"""Dense Flora (arXiv 2402.03293) for one matrix: Adafactor with a randomly compressed momentum."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]  # t: int; row, col: factored second moment; C: (a, r) compressed momentum
WindowFn = Callable[[int, int, int], Tensor]  # (window, r, b) -> A (r, b) with E[A^T A] = I


def rms(x: Tensor) -> Tensor:
    """||x||_F / sqrt(numel)."""
    return x.square().mean().sqrt()


def precondition(G: Tensor, state: State, beta2_decay: float, eps: float) -> Tensor:
    """1 / sqrt(V) (m, n), V = row col^T / mean(row), row and col EMAs of the means of G*G + eps, b2_t = 1 - t^decay."""
    b2, Q = 1 - state["t"] ** beta2_decay, G * G + eps
    state["row"] = row = b2 * state.get("row", 0.0) + (1 - b2) * Q.mean(1)  # (m,)
    state["col"] = col = b2 * state.get("col", 0.0) + (1 - b2) * Q.mean(0)  # (n,)
    return (row / row.mean()).rsqrt()[:, None] * col.rsqrt()[None, :]


def average(X: Tensor, state: State, b1: float, rank: int, kappa: int, basis_fn: WindowFn, materialise: bool) -> Tensor:
    """Xbar = b1 C A + (1 - b1) X; at t % kappa == 0 C <- C A A'^T, A <- A'; then C <- b1 C + (1 - b1) X A^T. X (a, b).

    The window of A is (t - 1) // kappa before the switch and t // kappa after it.
    """
    t, (a, b) = state["t"], X.shape
    A, C = basis_fn((t - 1) // kappa, rank, b), state.get("C", X.new_zeros(a, rank))  # (r, b), (a, r)
    Xbar = b1 * (C @ A) + (1 - b1) * X
    if t % kappa == 0:
        A_new = basis_fn(t // kappa, rank, b)
        C = (C @ A) @ A_new.T if materialise else C @ (A @ A_new.T)
        A = A_new
    state["C"] = b1 * C + (1 - b1) * (X @ A.T)
    return Xbar


@torch.no_grad()
def flora_step(
    weight: Tensor,  # (m, n), updated in place
    grad: Tensor,
    state: State,  # {} at first
    *,
    basis_fn: WindowFn,
    lr: float,
    rank: int,
    kappa: int = 1000,
    beta1: float | None = 0.9,
    beta2_decay: float = -0.8,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip: float = 1.0,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = False,
    momentum_on: str = "update",
    materialise: bool = False,
) -> None:
    """U = G / sqrt(V), Ubar = average(U), W <- (1 - wd alpha) W - alpha Ubar / max(1, rms(Ubar) / clip).

    alpha = (min(1e-2, 1 / sqrt(t)) if relative_step else lr) [max(eps2, rms(W))]; the smaller dimension is compressed
    (square: right). momentum_on "gradient" is the first release: Ubar = average(G) / sqrt(V).
    """
    W, G = (x if x.dtype == torch.float64 else x.float() for x in (weight, grad))
    state["t"] = t = state.get("t", 0) + 1
    alpha = min(1e-2, 1 / math.sqrt(t)) if relative_step else lr
    if scale_parameter:
        alpha = alpha * rms(W).clamp(min=eps[1])
    D = precondition(G, state, beta2_decay, eps[0])
    X = G if momentum_on == "gradient" else G * D
    if beta1:
        left = G.shape[0] < G.shape[1]
        X = average(X.T if left else X, state, beta1, rank, kappa, basis_fn, materialise)
        X = X.T if left else X
    U = X * D if momentum_on == "gradient" else X
    W = (1 - weight_decay * alpha) * W - alpha * U / (rms(U) / clip).clamp(min=1.0)
    weight.copy_(W)
