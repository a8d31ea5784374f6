"""Dense Adafactor (arXiv 1804.04235, Algorithms 4-6) and its torch.optim and fairseq / transformers variants."""

import math
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]  # t: int; R, C (factored) or V: second moment; M: momentum


def rms(x: Tensor) -> Tensor:
    """||x||_F / sqrt(numel)."""
    return x.square().mean().sqrt()


def factored_dims(shape: torch.Size | tuple[int, ...], rule: str = "last2") -> tuple[int, int] | None:
    """Dims (i, j) of the row and column factor: the last two, or the two largest (ties: the later ones)."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda d: shape[d] if rule == "largest2" else d)
    i, j = sorted(order[-2:])
    return i, j


def factored_variance(R: Tensor, C: Tensor, i: int) -> Tensor:
    """V = R C^T / sum(R), with R (.., m, 1), C (.., 1, n) the row and column sums."""
    return R * C / R.sum(i, keepdim=True)


@torch.no_grad()
def adafactor_step(
    param: Tensor,  # any shape, updated in place
    grad: Tensor,
    state: State,
    *,
    rho: float | None = None,  # None: min(1e-2, 1 / sqrt(t))
    beta2_decay: float = 0.8,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip: float = 1.0,
    factor_dims: str = "last2",
) -> None:
    """One step of the paper, in fp64.

    alpha = max(eps2, rms(X)) rho_t, b2_t = 1 - t^-0.8, Q = G*G + eps1,
    R <- b2 R + (1-b2) Q 1, C <- b2 C + (1-b2) 1^T Q, V = R C^T / 1^T R,
    U = G / sqrt(V), X <- X - alpha U / max(1, rms(U) / clip).
    """
    X, G = param.double(), grad.double()
    state["t"] = t = state.get("t", 0) + 1
    rho = min(1e-2, 1 / math.sqrt(t)) if rho is None else rho
    alpha, b2, Q = rms(X).clamp(min=eps[1]) * rho, 1 - t**-beta2_decay, G * G + eps[0]
    dims = factored_dims(G.shape, factor_dims)
    if dims is None:
        state["V"] = V = b2 * state.get("V", 0.0) + (1 - b2) * Q
    else:
        i, j = dims
        state["R"] = b2 * state.get("R", 0.0) + (1 - b2) * Q.sum(j, keepdim=True)
        state["C"] = b2 * state.get("C", 0.0) + (1 - b2) * Q.sum(i, keepdim=True)
        V = factored_variance(state["R"], state["C"], i)
    U = G / V.sqrt()
    param.copy_(X - alpha * U / (rms(U) / clip).clamp(min=1.0))


@torch.no_grad()
def torch_adafactor_step(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
) -> None:
    """torch.optim.Adafactor, in the param dtype: lr caps rho, V = R C / max(mean R, eps1), U = G / max(sqrt V, eps1).

    R and C are EMAs of the means of G*G without eps; decay X <- (1 - lr wd) X precedes the update.
    """
    eps1 = torch.finfo(param.dtype).eps if eps[0] is None else eps[0]
    state["t"] = t = state.get("t", 0) + 1
    w = t**beta2_decay  # 1 - b2_t
    alpha = max(eps[1], float(param.norm()) / math.sqrt(param.numel())) * min(lr, t**-0.5)
    if grad.dim() > 1:
        row = grad.norm(dim=-1, keepdim=True) ** 2 / grad.shape[-1]  # (.., m, 1)
        col = grad.norm(dim=-2, keepdim=True) ** 2 / grad.shape[-2]  # (.., 1, n)
        state["R"] = R = torch.lerp(state.get("R", torch.zeros_like(row)), row, w)
        state["C"] = C = torch.lerp(state.get("C", torch.zeros_like(col)), col, w)
        V = R * C / R.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        state["V"] = V = torch.lerp(state.get("V", torch.zeros_like(grad)), grad * grad, w)
    U = grad * V.clamp(min=eps1 * eps1).rsqrt()
    clip = max(1.0, float(U.norm()) / (math.sqrt(U.numel()) * d))
    param.copy_(torch.add((1 - lr * weight_decay) * param, U, alpha=-alpha / clip))


@torch.no_grad()
def hf_adafactor_step(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
) -> None:
    """Fairseq / transformers: means instead of sums, M = EMA of alpha U, decay X <- (1 - wd alpha) X before the update.

    rho_t = min(1e-2 or 1e-6 t, 1 / sqrt(t)) if relative_step else lr; alpha = rho_t [max(eps2, rms(X))].
    """
    half = param.dtype in (torch.float16, torch.bfloat16)
    X, G = (x.float() if half else x for x in (param, grad))
    state["t"] = t = state.get("t", 0) + 1
    alpha = min(1e-6 * t if warmup_init else 1e-2, t**-0.5) if relative_step else lr
    if scale_parameter:
        alpha = alpha * max(eps[1], float(rms(X)))
    b2, Q = 1 - t**decay_rate, G * G + eps[0]
    if G.dim() > 1:
        state["R"] = R = b2 * state.get("R", 0.0) + (1 - b2) * Q.mean(-1, keepdim=True)  # (.., m, 1)
        state["C"] = C = b2 * state.get("C", 0.0) + (1 - b2) * Q.mean(-2, keepdim=True)  # (.., 1, n)
        U = G * (R / R.mean(-2, keepdim=True)).rsqrt() * C.rsqrt()
    else:
        state["V"] = b2 * state.get("V", 0.0) + (1 - b2) * Q
        U = G * state["V"].rsqrt()
    M = alpha * U / (rms(U) / clip_threshold).clamp(min=1.0)
    if beta1 is not None:
        state["M"] = M = beta1 * state.get("M", torch.zeros_like(G)) + (1 - beta1) * M
    param.copy_(X - weight_decay * alpha * X - M)
