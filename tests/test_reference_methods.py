"""The dense references of Fira, FRUGAL, Online Subspace Descent and Flora against their limits and invariants."""

import math

import pytest
import torch
from torch import Tensor

from tests.reference.adafactor import hf_adafactor_step, rms
from tests.reference.fira import fira_step, limiter
from tests.reference.flora import flora_step
from tests.reference.frugal import frugal_block_step, frugal_step, selection_size
from tests.reference.galore import galore_step, project, project_back, side_of
from tests.reference.online_subspace import osd_step, subspace_grad, subspace_loss

SHAPES = ((12, 7), (7, 12), (8, 8))
SELECTS = ("columns", "rows", "randk", "dense")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(step, shape: tuple[int, ...], steps: int, scale_grad: float = 1.0, **kwargs) -> tuple[Tensor, dict]:
    w, state = randn(*shape), {}
    for t in range(steps):
        step(w, scale_grad * randn(*shape, seed=1 + t), state, **kwargs)
    return w, state


def torch_adamw(shape: tuple[int, ...], steps: int, **kwargs) -> Tensor:
    p = torch.nn.Parameter(randn(*shape))
    opt = torch.optim.AdamW([p], foreach=False, **kwargs)
    for t in range(steps):
        p.grad = randn(*shape, seed=1 + t)
        opt.step()
    return p.detach()


def random_basis(seed: int):
    state = torch.Generator().manual_seed(seed)

    def basis_fn(A: Tensor, rank: int) -> Tensor:
        return torch.linalg.qr(torch.randn(A.shape[1], rank, generator=state, dtype=A.dtype)).Q

    return basis_fn


def random_select(select: str, seed: int = 5):
    state = torch.Generator().manual_seed(seed)

    def select_fn(G: Tensor, k: int) -> Tensor:
        full = {"columns": G.shape[1], "rows": G.shape[0], "randk": G.numel()}[select]
        return torch.randperm(full, generator=state)[:k]

    return select_fn


def gaussian(window: int, r: int, b: int) -> Tensor:
    return randn(r, b, seed=1000 + window) / math.sqrt(r)


def orthonormal(window: int, r: int, b: int) -> Tensor:
    return torch.linalg.qr(randn(b, r, seed=1000 + window)).Q.T * math.sqrt(b / r)


def gap_between(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# Fira

FIRA = {"lr": 1e-2, "weight_decay": 0.1, "rank": 3, "gap": 4}


def identity_basis(A: Tensor, rank: int) -> Tensor:
    return torch.eye(A.shape[1], dtype=A.dtype)[:, :rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("carry", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("official", [False, True])
def test_fira_without_phi_is_galore(shape, carry, official, monkeypatch) -> None:
    monkeypatch.setattr("tests.reference.fira.growth", lambda N, R, *_: R.new_zeros(()))
    kwargs = {**FIRA, "scale": 0.25, "carry": carry, "official": official}
    assert gap_between(run(fira_step, shape, 12, **kwargs)[0], run(galore_step, shape, 12, **kwargs)[0]) <= 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_at_full_rank_has_no_residual(shape) -> None:
    kwargs = {**FIRA, "rank": min(shape)}
    fira, state = run(fira_step, shape, 20, **kwargs)
    assert gap_between(fira, run(galore_step, shape, 20, **kwargs)[0]) <= 1e-12
    assert state["s"] <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_in_the_full_identity_basis_is_torch(shape) -> None:
    kwargs = {"lr": 1e-2, "rank": min(shape), "gap": 4, "basis_fn": identity_basis}
    fira, _ = run(fira_step, shape, 20, **kwargs, weight_decay=0.1)
    assert gap_between(fira, torch_adamw(shape, 20, lr=1e-2, weight_decay=0.1)) <= 1e-12
    p, w, state = torch.nn.Parameter(randn(*shape)), randn(*shape), {}
    opt = torch.optim.RMSprop([p], lr=1e-2, alpha=0.9, momentum=0.5, foreach=False)
    for t in range(20):
        p.grad = randn(*shape, seed=1 + t)
        opt.step()
        fira_step(w, p.grad, state, **kwargs, betas=(0.5, 0.9), rule="rmsprop")
    assert gap_between(w, p.detach()) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_mode", ["column", "matrix"])
def test_fira_residual_modes_agree_at_alpha_one(shape, scale_mode) -> None:
    ends = {
        (alpha, residual): run(fira_step, shape, 12, **FIRA, scale=alpha, residual=residual, scale_mode=scale_mode)[0]
        for alpha in (1.0, 0.25)
        for residual in ("exact", "official")
    }
    assert gap_between(ends[1.0, "exact"], ends[1.0, "official"]) <= 1e-14
    assert gap_between(ends[0.25, "exact"], ends[0.25, "official"]) >= 1e-3


def test_fira_exact_alpha_multiplies_the_lr() -> None:
    kwargs = {"rank": 3, "gap": 4}
    a, _ = run(fira_step, (12, 7), 12, lr=1e-2, scale=0.25, **kwargs)
    b, _ = run(fira_step, (12, 7), 12, lr=0.25e-2, **kwargs)
    decayed, _ = run(fira_step, (12, 7), 12, lr=1e-2, scale=0.0, weight_decay=0.1, **kwargs)
    assert gap_between(a, b) <= 1e-14
    assert gap_between(decayed, randn(12, 7) * (1 - 1e-3) ** 12) <= 1e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_mode", ["column", "matrix"])
def test_fira_first_step(shape, scale_mode) -> None:
    """At t = 1 N = sign(R) up to eps, so phi_j = sqrt(r) / ||R_j|| and the residual part is orthogonal to P."""
    W, G, state = torch.zeros(shape, dtype=torch.float64), randn(*shape, seed=1), {}
    fira_step(W, G, state, lr=1.0, rank=3, gap=4, eps=0.0, scale_mode=scale_mode)
    side, P = side_of("std", *shape), state["P"]
    R = project(G, None, P, side)
    E, S = G - project_back(R, None, P, side), -W - project_back(torch.sign(R), None, P, side)
    phi = R.numel() ** 0.5 / R.norm() if scale_mode == "matrix" else 3**0.5 / R.norm(dim=1)
    phi = phi if phi.dim() == 0 else phi[:, None] if side == "right" else phi[None, :]
    assert gap_between(S, phi * E) <= 1e-6  # 1e-8 in the denominator of phi
    assert project(S, None, P, side).abs().max() <= 1e-12
    assert state["s"].item() == pytest.approx(S.norm().item(), rel=1e-12)


@pytest.mark.parametrize("official", [False, True])
def test_fira_limiter_bounds_growth_only(official) -> None:
    state, scales = {}, 10 ** (6 * torch.rand(200, generator=torch.Generator().manual_seed(0)) - 3)
    for t, c in enumerate(scales.double()):
        S, before = c * randn(5, 4, seed=t), state.get("s")
        out = limiter(S, state, 1.01, official)
        assert torch.cosine_similarity(out.flatten(), S.flatten(), dim=0).item() == pytest.approx(1.0, abs=1e-12)
        assert out.norm().item() == pytest.approx(state["s"].item(), rel=1e-12)
        if before is not None and S.norm() > 1.01 * (before + 1e-8):
            assert state["s"].item() == pytest.approx(1.01 * (before.item() + 1e-8), rel=1e-12)
        else:
            assert torch.equal(out, S)


def test_fira_limiter_keeps_an_fp32_norm_for_bf16() -> None:
    state: dict = {}
    for _ in range(100):
        limiter(torch.full((8, 8), 1e3 if state else 1.0, dtype=torch.bfloat16), state, 1.01, official=False)
    assert state["s"].dtype == torch.float32
    assert state["s"].item() == pytest.approx(8 * 1.01**99, rel=1e-4)


@pytest.mark.parametrize("when", [0, 50])
def test_fira_zero_gradient_locks_only_the_official_limiter(when) -> None:
    norms = {}
    for official, gamma in ((False, 1.01), (True, 1.01), (False, None)):
        w, state = randn(12, 7), {}
        for t in range(when + 2):
            G = randn(12, 7, seed=1 + t) * (t != when)
            fira_step(w, G, state, lr=1e-2, rank=3, gap=200, gamma=gamma, official=official, basis_fn=random_basis(3))
        norms[official, gamma] = state["s"].item()
    assert norms[False, 1.01] == pytest.approx(norms[False, None], rel=1e-12)
    assert norms[True, 1.01] <= 1.02e-8


@pytest.mark.parametrize(("target", "steps"), [(1e-3, 694), (0.1, 1157), (1.0, 1388), (10.0, 1619)])
def test_fira_official_zero_lock_grows_by_one_percent(target, steps) -> None:
    state, S = {"s": torch.zeros((), dtype=torch.float64)}, torch.full((2, 2), 1e6, dtype=torch.float64)
    count = 0
    while state["s"] < target:
        limiter(S, state, 1.01, official=True)
        count += 1
    assert abs(count - steps) <= 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_fira_limiter_recovers_from_a_non_finite_norm(bad) -> None:
    for official in (False, True):
        state: dict = {}
        for value in (1.0, bad, 2.0):
            limiter(torch.full((2, 2), value, dtype=torch.float64), state, 1.01, official)
        assert state["s"].isnan() if official else state["s"] == 4.0


@pytest.mark.parametrize("official", [False, True])
def test_fira_transposes_and_ignores_the_gradient_scale(official) -> None:
    kwargs = {**FIRA, "official": official, "carry": "rotate"}
    w, _ = run(fira_step, (12, 7), 9, **kwargs)
    wt, state = randn(12, 7).T.clone(), {}
    for t in range(9):
        fira_step(wt, randn(12, 7, seed=1 + t).T, state, **kwargs)
    assert gap_between(w, wt.T) <= (1e-6 if official else 1e-12)  # the official SVD is fp32
    assert gap_between(w, run(fira_step, (12, 7), 9, scale_grad=100.0, **kwargs)[0]) <= 1e-6


def test_fira_official_rmsprop_does_not_decay() -> None:
    kwargs = {"lr": 1e-2, "rank": 3, "gap": 4, "rule": "rmsprop", "betas": (0.0, 0.9), "official": True}
    plain, _ = run(fira_step, (12, 7), 9, **kwargs)
    assert torch.equal(plain, run(fira_step, (12, 7), 9, weight_decay=0.1, **kwargs)[0])


# FRUGAL


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("transfer", ["reset", "keep", "reproject"])
def test_frugal_at_density_one_is_adamw(select, transfer) -> None:
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "gap": 3, "select": select, "state_transfer": transfer}
    w, _ = run(frugal_step, (12, 7), 20, density=1.0, **kwargs)
    assert gap_between(w, torch_adamw((12, 7), 20, lr=1e-2, weight_decay=0.1)) <= 1e-12


@pytest.mark.parametrize("select", SELECTS)
def test_frugal_at_density_zero_is_the_free_rule(select) -> None:
    for free, rule in (("signsgd", torch.sign), ("sgd", lambda g: g), ("none", torch.zeros_like)):
        w, state = run(frugal_step, (12, 7), 5, lr=1e-2, weight_decay=0.1, density=0.0, select=select, free=free)
        expected = randn(12, 7)
        for t in range(5):
            expected = (1 - 1e-2 * 0.1) * expected - 1e-2 * rule(randn(12, 7, seed=1 + t))
        assert torch.equal(w, expected)
        assert state == {}


@pytest.mark.parametrize("select", SELECTS[:3])
def test_frugal_reset_at_every_step_is_signsgd(select) -> None:
    kwargs = {"lr": 1e-2, "gap": 1, "density": 0.4, "select": select, "select_fn": random_select(select)}
    w, state = run(frugal_step, (12, 7), 10, **kwargs)
    expected = randn(12, 7) - 1e-2 * sum(torch.sign(randn(12, 7, seed=1 + t)) for t in range(10))
    smallest = min(randn(12, 7, seed=1 + t).abs().min() for t in range(10))
    assert gap_between(w, expected) <= 10 * 1e-2 * 1e-8 / smallest
    assert state["M"].numel() == {"columns": 12 * 2, "rows": 4 * 7, "randk": 33}[select]


@pytest.mark.parametrize("select", SELECTS)
def test_frugal_memoryless_rules_split_the_gradient(select) -> None:
    """SGD without momentum on both parts is SGD, whatever the selection."""
    chosen = {"basis_fn": random_basis(3)} if select == "dense" else {"select_fn": random_select(select)}
    kwargs = {"lr": 1e-2, "gap": 2, "density": 0.4, "rule": "sgd", "betas": (0.0, 0.0), "free": "sgd"}
    w, _ = run(frugal_step, (12, 7), 6, select=select, **kwargs, **chosen)
    assert gap_between(w, randn(12, 7) - 1e-2 * sum(randn(12, 7, seed=1 + t) for t in range(6))) <= 1e-12


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize(("transfer", "carry"), [("reset", "reset"), ("keep", "keep")])
def test_frugal_dense_without_free_rule_is_galore(proj_type, transfer, carry) -> None:
    common = {"lr": 1e-2, "weight_decay": 0.1, "gap": 3, "proj_type": proj_type}
    density = 3 / {"left": 12, "right": 7, "full": 7}[proj_type]
    w, _ = run(
        frugal_step, (12, 7), 10, density=density, select="dense", free="none", state_transfer=transfer, **common
    )
    assert gap_between(w, run(galore_step, (12, 7), 10, rank=3, carry=carry, **common)[0]) <= 1e-12


def test_frugal_scales() -> None:
    kwargs = {"lr": 1e-2, "density": 0.3, "select": "columns", "select_fn": lambda G, k: torch.arange(k)}
    full, free = torch.arange(7) < 2, torch.arange(7) >= 2
    start = randn(12, 7)
    w, _ = run(frugal_step, (12, 7), 1, **kwargs)
    scaled, _ = run(frugal_step, (12, 7), 1, full_scale=0.3, free_scale=0.1, **kwargs)
    assert gap_between((scaled - start)[:, full], 0.3 * (w - start)[:, full]) <= 1e-15
    assert gap_between((scaled - start)[:, free], 0.03 * (w - start)[:, free]) <= 1e-15


def test_frugal_lion_signs_every_entry() -> None:
    kwargs = {"lr": 1e-2, "density": 0.4, "rule": "lion", "betas": (0.9, 0.99), "select_fn": random_select("columns")}
    w, state = run(frugal_step, (12, 7), 1, **kwargs)
    assert gap_between(w, randn(12, 7) - 1e-2 * torch.sign(randn(12, 7, seed=1))) <= 1e-15
    assert gap_between(state["M"], 0.01 * randn(12, 7, seed=1).flatten()[state["pos"]]) <= 1e-15


def test_frugal_rows_are_the_columns_of_the_transpose() -> None:
    picks = random_select("columns"), random_select("columns")
    w, state, wt, state_t = randn(12, 7), {}, randn(12, 7).T.clone(), {}
    for t in range(9):
        G, kwargs = randn(12, 7, seed=1 + t), {"lr": 1e-2, "density": 0.4, "gap": 2, "state_transfer": "reproject"}
        frugal_step(w, G, state, select="columns", select_fn=picks[0], **kwargs)
        frugal_step(wt, G.T, state_t, select="rows", select_fn=lambda G, k: picks[1](G.T, k), **kwargs)
    assert torch.equal(w, wt.T)


@pytest.mark.parametrize("select", SELECTS[:3])
def test_frugal_reproject_keeps_survivors_and_starts_newcomers_at_age_zero(select) -> None:
    """The state-full entries follow AdamW restarted, entry by entry, whenever they enter."""
    chosen = random_select(select)
    kwargs = {"lr": 1e-2, "density": 0.6, "gap": 2, "select": select, "state_transfer": "reproject", "free": "none"}
    w, state, expected = randn(12, 7), {}, randn(12, 7).flatten()
    m, v, age = (torch.zeros(84, dtype=torch.float64) for _ in range(3))
    for t in range(12):
        G = randn(12, 7, seed=1 + t)
        frugal_step(w, G, state, select_fn=chosen, **kwargs)
        active = torch.zeros(84, dtype=torch.float64)
        active[state["pos"].flatten()] = 1.0
        g, age = G.flatten(), (age + 1) * active
        m, v = (0.9 * m + 0.1 * g) * active, (0.999 * v + 0.001 * g * g) * active
        bc1, bc2 = 1 - 0.9 ** age.clamp(min=1), 1 - 0.999 ** age.clamp(min=1)
        expected -= 1e-2 * (m / bc1) / ((v / bc2).sqrt() + 1e-8)
    assert gap_between(w.flatten(), expected) <= 1e-12


@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("transfer", ["reproject", "keep"])
def test_frugal_absorbs_equivalent_bases(proj_type, rule, transfer) -> None:
    """Reproject undoes signed permutations of the basis, keep with sign alignment undoes flips; plain keep does not."""
    turn = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    turn = turn if transfer == "reproject" else torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    count = iter(range(100))

    def fixed(A: Tensor, rank: int) -> Tensor:
        return torch.linalg.qr(randn(A.shape[1], rank, seed=77)).Q

    def turned(A: Tensor, rank: int) -> Tensor:
        return fixed(A, rank) @ torch.linalg.matrix_power(turn, next(count) // (2 if proj_type == "full" else 1))

    kwargs = {"lr": 1e-2, "density": 3 / 7, "gap": 2, "select": "dense", "rule": rule, "proj_type": proj_type}
    kwargs["betas"] = (0.9, 0.7)  # lets Lion's momentum outweigh the gradient
    a, _ = run(frugal_step, (12, 7), 9, state_transfer=transfer, align=True, basis_fn=fixed, **kwargs)
    b, _ = run(frugal_step, (12, 7), 9, state_transfer=transfer, align=True, basis_fn=turned, **kwargs)
    c, _ = run(frugal_step, (12, 7), 9, state_transfer="keep", basis_fn=turned, **kwargs)
    assert gap_between(a, b) <= 1e-12
    assert gap_between(a, c) >= 1e-4


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
def test_frugal_complement_removes_the_sign_leak(shape) -> None:
    leaks = {}
    for space in ("ambient", "complement"):
        w, state = torch.zeros(shape, dtype=torch.float64), {}
        kwargs = {"lr": 1.0, "density": 0.25, "select": "dense", "free_space": space, "basis_fn": random_basis(3)}
        frugal_step(w, randn(*shape, seed=1), state, **kwargs)
        side, P = side_of("std", *shape), state["P"]
        G = randn(*shape, seed=1)
        N = state["M"] / 0.1 / ((state["V"] / 0.001).sqrt() + 1e-8)
        free = -w - project_back(N, None, P, side)
        leaks[space] = float(project(free, None, P, side).norm() / free.norm())
        E = torch.sign(G - project_back(project(G, None, P, side), None, P, side))
        assert gap_between(free - E, project_back(project(free - E, None, P, side), None, P, side)) <= 1e-12
    assert leaks["complement"] <= 1e-12
    assert 0.25 <= leaks["ambient"] <= 0.35


def test_frugal_sizes() -> None:
    assert [selection_size(s, 0.25, (10, 7), "right")[0] for s in SELECTS] == [1, 2, 17, 2]
    assert [selection_size("dense", rho, (10, 10), "left")[0] for rho in (0.05, 0.15, 0.25, 0.35)] == [0, 2, 2, 4]
    assert selection_size("columns", 0.99, (3, 1), "right") == (0, 1)
    assert selection_size("dense", 0.96, (10, 10), "full") == (10, 10)


@pytest.mark.parametrize("restart", [False, True])
def test_frugal_blocks(restart) -> None:
    """Active tensors follow AdamW (re-created at every restart), the others signSGD; deactivation drops the state."""
    shapes = ((4, 3), (5,), (3, 6))
    ws, states = [randn(*s, seed=i) for i, s in enumerate(shapes)], [{}, {}, {}]
    ps = [torch.nn.Parameter(w.clone()) for w in ws]
    kwargs = {"lr": 1e-2, "weight_decay": 0.1}
    opts = [torch.optim.AdamW([p], foreach=False, **kwargs) for p in ps]
    for t in range(12):
        active, fresh = {1, 2 * (t // 6)}, restart and t % 6 == 0
        grads = [randn(*s, seed=10 * t + i) for i, s in enumerate(shapes)]
        frugal_block_step(ws, grads, states, active=active, restart=fresh, **kwargs)
        for i, (p, g) in enumerate(zip(ps, grads, strict=True)):
            if fresh or i not in active:
                opts[i] = torch.optim.AdamW([p], foreach=False, **kwargs)
            p.grad = g
            if i in active:
                opts[i].step()
            else:
                p.data = (1 - 1e-3) * p.data - 1e-2 * torch.sign(g)
    assert max(gap_between(w, p.detach()) for w, p in zip(ws, ps, strict=True)) <= 1e-12
    assert [bool(s) for s in states] == [False, True, True]


# Online Subspace Descent


@pytest.mark.parametrize("lam", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_osd_gradient_is_that_of_the_loss(shape, lam) -> None:
    for r in (1, 3, 7):
        A, P = randn(*shape, seed=1), randn(shape[1], r, seed=2).requires_grad_()
        (auto,) = torch.autograd.grad(subspace_loss(P, A, lam), P)
        grad = subspace_grad(P.detach(), A, lam)
        assert gap_between(grad, auto) / auto.abs().max() <= 1e-12
        P = P.detach()
        assert subspace_loss(P - 1e-4 * grad, A, lam) < subspace_loss(P, A, lam)


@pytest.mark.parametrize("shape", SHAPES)
def test_osd_gradient_at_orthonormal_bases(shape) -> None:
    A = randn(*shape, seed=1)
    An = A / A.norm()
    top = torch.linalg.svd(A).Vh[:3].T
    assert subspace_grad(top, A, 0.1).abs().max() <= 1e-14
    Q = torch.linalg.qr(randn(shape[1], 3, seed=2)).Q
    K = An.T @ (An @ Q)
    assert gap_between(subspace_grad(Q, A, 0.1), -2 * (K - Q @ Q.T @ K)) <= 1e-14
    assert subspace_loss(Q, A, 0.1).item() == pytest.approx(1 - (An @ Q).square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("rule", ["adamw", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_osd_with_a_fixed_projector_is_galore(rule, shape) -> None:
    common = {"lr": 1e-2, "weight_decay": 0.1, "rank": 3, "scale": 0.5, "rule": rule}
    w, _ = run(osd_step, shape, 12, proj_ratio=0.0, **common)
    assert gap_between(w, run(galore_step, shape, 12, gap=100, **common)[0]) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_osd_at_full_rank_is_sgd(shape) -> None:
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "rank": 7 if 7 in shape else 8, "rule": "sgd", "betas": (0.9, 0.0)}
    w, state = run(osd_step, shape, 12, proj_rule="sgd", **kwargs)
    expected, M = randn(*shape), 0.0
    for t in range(12):
        M = 0.9 * M + randn(*shape, seed=1 + t)
        expected = (1 - 1e-3) * expected - 1e-2 * M
    assert gap_between(w, expected) <= 1e-12
    assert gap_between(state["P"].T @ state["P"], torch.eye(len(state["P"]), dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("proj_rule", ["adam", "sgd", "lion", "adafactor"])
def test_osd_finds_a_fixed_subspace(proj_rule) -> None:
    """Gradients of one rank-3 row space: the captured share of ||G||^2 goes to 1 and P^T P to I."""
    rows, w, state = torch.linalg.qr(randn(8, 3, seed=5)).Q.T, randn(12, 8), {}
    for t in range(600):
        ratio = {"sgd": 5.0}.get(proj_rule, 2.0 * (1 - t / 600))
        kwargs = {"lr": 1e-2, "rank": 3, "proj_rule": proj_rule, "proj_ratio": ratio, "ortho": 1.0}
        osd_step(w, randn(12, 3, seed=t) @ rows, state, basis_fn=lambda A, r: 1.2 * random_basis(9)(A, r), **kwargs)
    P = state["P"]
    assert (rows @ P).square().sum().item() == pytest.approx(3.0, abs=0.05)
    assert gap_between(P.T @ P, torch.eye(3, dtype=torch.float64)) <= 0.05


@pytest.mark.parametrize("proj_rule", ["adam", "sgd", "lion", "adafactor"])
def test_osd_transposes_and_normalises_the_gradient(proj_rule) -> None:
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "rank": 3, "proj_rule": proj_rule, "rule": "sgd", "betas": (0.0, 0.0)}
    w, state = run(osd_step, (12, 7), 9, **kwargs)
    wt, state_t = randn(12, 7).T.clone(), {}
    for t in range(9):
        osd_step(wt, randn(12, 7, seed=1 + t).T, state_t, **kwargs)
    assert gap_between(w, wt.T) <= 1e-12
    assert gap_between(state["P"], run(osd_step, (12, 7), 9, scale_grad=64.0, **kwargs)[1]["P"]) <= 1e-12


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_osd_guards_the_projector(bad) -> None:
    for official in (False, True):
        w, state = run(osd_step, (12, 7), 3, lr=1e-2, rank=3, official=official)
        before = state["P"]
        osd_step(w, torch.full((12, 7), bad, dtype=torch.float64), state, lr=1e-2, rank=3, official=official)
        assert state["P"].isnan().all() if official else torch.equal(state["P"], before)
        assert state["S_P"]["t"] == (3 if official else 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_osd_official_projector_is_torch_adamw_on_the_loss(shape) -> None:
    w, state, p, opt = randn(*shape), {}, None, None
    for t in range(10):
        G, lr = randn(*shape, seed=1 + t), 1e-2 * (1 - t / 20)
        osd_step(w, G, state, lr=lr, rank=3, official=True, initial_lr=1e-2, gap=20)
        if t == 0:
            p = torch.nn.Parameter(state["P"].clone())
            opt = torch.optim.AdamW([p], foreach=False)
            continue
        opt.param_groups[0]["lr"] = lr / 1e-2 / 20
        opt.zero_grad()
        subspace_loss(p, G.T if shape[0] < shape[1] else G, 0.0).backward()
        opt.step()
        assert gap_between(p.detach(), state["P"]) <= 1e-12


def test_osd_official_lion_signs_the_full_update() -> None:
    kwargs = {"lr": 1e-2, "rank": 3, "rule": "lion", "betas": (0.9, 0.99), "official": True}
    w, _ = run(osd_step, (12, 7), 5, scale=0.25, **kwargs)
    assert torch.equal(w, run(osd_step, (12, 7), 5, scale=4.0, **kwargs)[0])
    one, _ = run(osd_step, (12, 7), 1, **kwargs)
    assert gap_between((one - randn(12, 7)).abs(), torch.full((12, 7), 1e-2, dtype=torch.float64)) <= 1e-12


# Flora

FLORA = {"lr": 1e-2, "weight_decay": 0.1, "kappa": 3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum_on", ["update", "gradient"])
def test_flora_transfers_agree(shape, momentum_on) -> None:
    kwargs = {**FLORA, "rank": 5, "momentum_on": momentum_on, "basis_fn": gaussian}
    a, b = (run(flora_step, shape, 10, materialise=flag, **kwargs) for flag in (False, True))
    assert gap_between(a[0], b[0]) <= 1e-12
    assert gap_between(a[1]["C"], b[1]["C"]) <= 1e-12 * a[1]["C"].abs().max()
    assert a[1]["C"].shape == (max(shape), 5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta1", [None, 0.0])
@pytest.mark.parametrize("flags", [{}, {"relative_step": True}, {"scale_parameter": False}])
def test_flora_without_momentum_is_adafactor(shape, beta1, flags) -> None:
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "beta1": beta1, **flags}
    w, state = run(flora_step, shape, 10, rank=3, basis_fn=gaussian, **kwargs)
    flags = {"relative_step": False, **flags}
    expected, _ = run(hf_adafactor_step, shape, 10, lr=1e-2, weight_decay=0.1, **flags)
    assert gap_between(w, expected) <= 1e-14
    assert "C" not in state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum_on", ["update", "gradient"])
def test_flora_first_step_is_a_tenth_of_unclipped_adafactor(shape, momentum_on) -> None:
    start, kwargs = randn(*shape), {"lr": 1e-2, "rank": 3, "basis_fn": gaussian, "momentum_on": momentum_on}
    w, _ = run(flora_step, shape, 1, **kwargs)
    adafactor, _ = run(hf_adafactor_step, shape, 1, lr=1e-2, relative_step=False, clip_threshold=math.inf)
    assert gap_between(w - start, (1 - 0.9) * (adafactor - start)) <= 1e-15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum_on", ["update", "gradient"])
def test_flora_with_orthonormal_full_rank_is_full_momentum(shape, momentum_on) -> None:
    kwargs = {**FLORA, "rank": min(shape), "basis_fn": orthonormal, "momentum_on": momentum_on}
    w, _ = run(flora_step, shape, 10, **kwargs)
    expected, row, col, M = randn(*shape), 0.0, 0.0, 0.0
    for t in range(1, 11):
        G, b2 = randn(*shape, seed=t), 1 - t**-0.8
        row, col = b2 * row + (1 - b2) * (G * G).mean(1), b2 * col + (1 - b2) * (G * G).mean(0)
        D = (torch.outer(row, col) / row.mean()).rsqrt()
        M = 0.9 * M + 0.1 * (G * D if momentum_on == "update" else G)
        U = M if momentum_on == "update" else M * D
        alpha = 1e-2 * max(1e-3, float(rms(expected)))
        expected = (1 - 0.1 * alpha) * expected - alpha * U / max(1.0, float(rms(U)))
    assert gap_between(w, expected) <= 1e-12


def test_flora_windows_and_transposition() -> None:
    calls: list[int] = []

    def recorded(window: int, r: int, b: int) -> Tensor:
        assert (r, b) == (3, 7)
        calls.append(window)
        return gaussian(window, r, b)

    w, _ = run(flora_step, (12, 7), 7, rank=3, basis_fn=recorded, **FLORA)
    assert calls == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    wt, state = randn(12, 7).T.clone(), {}
    for t in range(7):
        flora_step(wt, randn(12, 7, seed=1 + t).T, state, rank=3, basis_fn=gaussian, **FLORA)
    assert gap_between(w, wt.T) <= 1e-12
