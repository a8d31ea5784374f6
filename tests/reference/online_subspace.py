"""Dense Online Subspace Descent (arXiv 2408.12857) for one matrix, or with the released code's deviations."""

import torch
from torch import Tensor

from tests.reference.galore import (
    BasisFn,
    State,
    as_matrix,
    injected_bases,
    inner_rule,
    project,
    project_back,
    side_of,
    svd_bases,
)

PROJ_BETAS = {"adam": (0.9, 0.999), "sgd": (0.0, 0.0), "lion": (0.9, 0.99), "adafactor": (None, 0.0)}


def subspace_loss(P: Tensor, A: Tensor, lam: float) -> Tensor:
    """||An P P^T - An||_F^2 + lam ||P^T P - I||_F^2, An = A / ||A||_F; A (a, b), P (b, r)."""
    An = A / A.norm()
    return (An @ P @ P.T - An).square().sum() + lam * (P.T @ P - torch.eye(P.shape[1], dtype=P.dtype)).square().sum()


def subspace_grad(P: Tensor, A: Tensor, lam: float) -> Tensor:
    """2 (K S + P B - 2 K) + 4 lam P (S - I), with Y = An P, K = An^T Y, S = P^T P, B = Y^T Y."""
    An = A / A.norm()
    Y = An @ P  # (a, r)
    K, S, B = An.T @ Y, P.T @ P, Y.T @ Y  # (b, r), (r, r), (r, r)
    return 2 * (K @ S + P @ B - 2 * K) + 4 * lam * P @ (S - torch.eye(len(S), dtype=S.dtype))


def move_projector(
    A: Tensor, state: State, rule: str, lr: float, betas: tuple[float | None, float], decay: float, lam: float
) -> None:
    """P <- (1 - e_P lam_P) P - e_P D, D = rule(grad of the subspace loss)."""
    inner = state.setdefault("S_P", {})
    inner["t"] = inner.get("t", 0) + 1
    rule = "adamw" if rule == "adam" else rule
    D, step = inner_rule(rule, subspace_grad(state["P"], A, lam), inner, lr, betas, 1e-8, official=False)
    state["P"] = (1 - lr * decay) * state["P"] - step * D


def full_sign_lion(
    R: Tensor, P: Tensor, state: State, lr: float, betas: tuple[float, float], side: str
) -> tuple[Tensor, float]:
    """sign(back(b1 M + (1 - b1) R)), then M <- b2 M + (1 - b2) R."""
    (b1, b2), M = betas, state.get("M", torch.zeros_like(R))
    state["M"] = b2 * M + (1 - b2) * R
    return torch.sign(project_back(b1 * M + (1 - b1) * R, None, P, side)), lr


@torch.no_grad()
def osd_step(
    weight: Tensor,  # (m, n) or (m, ...), updated in place
    grad: Tensor,  # like weight
    state: State,  # {} at first; adds S_P: state of the projector's optimizer
    *,
    lr: float,
    betas: tuple[float | None, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rank: int,
    scale: float = 1.0,
    proj_type: str = "std",  # not "full"
    rule: str = "adamw",  # adamw, lion, adafactor, sgd
    proj_rule: str = "adam",  # adam, sgd, lion, adafactor
    proj_ratio: float = 5.0,  # alpha: e_P = alpha e_W
    proj_betas: tuple[float | None, float] | None = None,
    proj_weight_decay: float = 0.0,  # lam_P
    ortho: float = 0.1,  # lam
    skip_first: bool = True,
    basis_fn: BasisFn | None = None,
    official: bool = False,
    initial_lr: float | None = None,
    gap: int = 200,
) -> None:
    """R = A P, W <- (1 - lr wd) W - lr scale back(rule(R)), then P <- P - e_P (rule_P(grad L_A(P)) + lam_P P).

    A zero or non-finite gradient leaves P; so does the first step if ``skip_first``, where P is the minimiser.
    ``official``: lam = 0, e_P = lr / (initial_lr gap), lam_P = 0.01 for adam and 0 otherwise, no guard, first step
    skipped, the rule and the order of decay of GaLore's code, and lion signs after back(.) and ignores the scale.
    """
    W, G = as_matrix(weight), as_matrix(grad)
    side, first = side_of(proj_type, *G.shape), "P" not in state
    if first:
        _, state["P"] = injected_bases(G, rank, side, basis_fn) if basis_fn else svd_bases(G, rank, side, official)
    state["t"] = state.get("t", 0) + 1
    P, decay_last = state["P"], official and rule in ("adamw", "lion")
    R = project(G, None, P, side)
    if official and rule == "lion":
        U, step = full_sign_lion(R, P, state, lr, betas, side)
    else:
        N, step = inner_rule(rule, R, state, lr, betas, eps, official)
        U = project_back(N, None, P, side) * scale
    if decay_last:
        W = (1 - lr * weight_decay) * (W - step * U)
    else:
        W = (1 - lr * weight_decay) * W - step * U
    weight.copy_(W.reshape(weight.shape))
    if official:
        e_P = lr / (initial_lr or lr) / gap
        proj_weight_decay, ortho = 0.01 if proj_rule == "adam" else 0.0, 0.0
    else:
        e_P = proj_ratio * lr
    usable = official or (G.norm() > 0 and G.isfinite().all())
    if usable and not (first and (official or skip_first)):
        A = G.T if side == "left" else G  # (a, b)
        move_projector(A, state, proj_rule, e_P, proj_betas or PROJ_BETAS[proj_rule], proj_weight_decay, ortho)
