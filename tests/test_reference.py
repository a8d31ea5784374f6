"""The dense references against torch, transformers, the authors' GaLore, and closed forms."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.reference import adafactor as af
from tests.reference import subspace
from tests.reference.galore import galore_step, side_of

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
SHAPES = ((12, 7), (7, 12), (8, 8))
ADAFACTOR_SHAPES = ((), (5,), (7, 5), (3, 7, 5), (4, 3, 3, 3))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64).to(dtype)


def identity_basis(A: Tensor, rank: int) -> Tensor:
    return torch.eye(A.shape[1], dtype=A.dtype)[:, :rank]


def random_basis(seed: int):
    state = gen(seed)

    def basis_fn(A: Tensor, rank: int) -> Tensor:
        return torch.linalg.qr(torch.randn(A.shape[1], rank, generator=state, dtype=A.dtype)).Q

    return basis_fn


def run_galore(shape: tuple[int, ...], steps: int, **kwargs) -> tuple[Tensor, dict]:
    w, state = randn(*shape), {}
    for t in range(steps):
        galore_step(w, randn(*shape, seed=1 + t), state, **kwargs)
    return w, state


@pytest.fixture
def official() -> Iterator[types.SimpleNamespace]:
    """The authors' classes, loaded without the package's ``__init__`` (which needs bitsandbytes)."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("galore_torch is not installed")
    pytest.importorskip("transformers")
    alias = "_galore_official"
    package = types.ModuleType(alias)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[alias] = package
    modules = {name: importlib.import_module(f"{alias}.{name}") for name in ("adamw", "adafactor")}
    yield types.SimpleNamespace(AdamW=modules["adamw"].AdamW, Adafactor=modules["adafactor"].Adafactor)
    for name in [name for name in sys.modules if name.split(".")[0] == alias]:
        del sys.modules[name]


def official_gap(opt_class, rule: str, shape, proj_type: str, rank: int, dtype: torch.dtype, beta1) -> float:
    """Max |W_ref - W_official| / max |W_official - W_0| after 30 steps over 3 refreshes with weight decay."""
    p = torch.nn.Parameter(randn(*shape, dtype=dtype))
    w, w0, state = p.detach().clone(), p.detach().clone(), {}
    galore = {"rank": rank, "update_proj_gap": 10, "scale": 0.25, "proj_type": proj_type}
    common = {"lr": 1e-2, "weight_decay": 0.1}
    if rule == "adamw":
        opt = opt_class([{"params": [p], **galore}], eps=1e-6, no_deprecation_warning=True, **common)
    else:
        flags = {"scale_parameter": False, "relative_step": False}
        opt = opt_class([{"params": [p], **galore}], beta1=beta1, **flags, **common)
    for t in range(30):
        p.grad = randn(*shape, seed=1 + t, dtype=dtype)
        opt.step()
        kwargs = {"rank": rank, "gap": 10, "scale": 0.25, "proj_type": proj_type}
        ref = {"betas": (beta1, 0.999), "eps": 1e-6, "official": True, "rule": rule}
        galore_step(w, p.grad, state, **kwargs, **ref, **common)
    return float((w - p.detach()).abs().max() / (p.detach() - w0).abs().max())


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, 100])
@pytest.mark.parametrize(
    ("dtype", "tol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["f64", "f32", "bf16"],
)
def test_official_adamw(official, proj_type, shape, rank, dtype, tol) -> None:
    if proj_type == "reverse_std" and shape == (7, 12) and rank == 100:
        pytest.skip("the authors' back-projection raises when R is square")
    assert official_gap(official.AdamW, "adamw", shape, proj_type, rank, dtype, 0.9) <= tol


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize(
    ("dtype", "tol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["f64", "f32", "bf16"],
)
def test_official_adafactor(official, proj_type, shape, beta1, dtype, tol) -> None:
    assert official_gap(official.Adafactor, "adafactor", shape, proj_type, 3, dtype, beta1) <= tol


def test_official_reverse_std_square_r_raises_upstream(official) -> None:
    with pytest.raises(RuntimeError):
        official_gap(official.AdamW, "adamw", (7, 12), "reverse_std", 100, torch.float32, 0.9)


def test_sides() -> None:
    table = {"std": "right left right", "reverse_std": "left right left"}
    for proj_type, sides in table.items():
        assert [side_of(proj_type, m, n) for m, n in SHAPES] == sides.split()
    with pytest.raises(KeyError):
        side_of("random", 2, 2)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 2, 5)])
def test_bases_and_moments_have_the_table_shapes(proj_type, shape) -> None:
    _, state = run_galore(shape, 2, lr=1e-2, rank=3, gap=1, proj_type=proj_type)
    m, n = shape[0], randn(*shape)[0].numel()
    side = side_of(proj_type, m, n)
    assert state["P"].shape == (m if side == "left" else n, 3)
    assert state["M"].shape == {"right": (m, 3), "left": (n, 3), "full": (3, 3)}[side]


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("carry", ["keep", "rotate"])
def test_identity_basis_is_torch_adamw(proj_type, carry) -> None:
    p = torch.nn.Parameter(randn(6, 6))
    w, state = p.detach().clone(), {}
    opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, foreach=False)
    for t in range(50):
        p.grad = randn(6, 6, seed=1 + t)
        opt.step()
        kwargs = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
        galore = {"rank": 6, "gap": 7, "proj_type": proj_type, "carry": carry, "basis_fn": identity_basis}
        galore_step(w, p.grad, state, **kwargs, **galore)
    assert (w - p).abs().max() <= 1e-12


def test_sgd_full_rank_is_torch_sgd() -> None:
    p = torch.nn.Parameter(randn(6, 9))
    w, state, basis_fn = p.detach().clone(), {}, random_basis(5)
    opt = torch.optim.SGD([p], lr=1e-2, momentum=0.9, foreach=False)
    for t in range(30):
        p.grad = randn(6, 9, seed=1 + t)
        opt.step()
        kwargs = {"lr": 1e-2, "betas": (0.9, 0.0), "rule": "sgd", "carry": "rotate"}
        galore_step(w, p.grad, state, rank=6, gap=4, basis_fn=basis_fn, **kwargs)
    assert (w - p).abs().max() <= 1e-12


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_full_rank_linear_rule_needs_rotation(proj_type) -> None:
    common = {"lr": 1e-2, "betas": (0.9, 0.0), "rule": "sgd", "rank": 8, "gap": 4, "proj_type": proj_type}
    plain, _ = run_galore((8, 8), 20, **common, basis_fn=identity_basis)
    rotated, _ = run_galore((8, 8), 20, **common, carry="rotate", basis_fn=random_basis(5))
    kept, _ = run_galore((8, 8), 20, **common, carry="keep", basis_fn=random_basis(5))
    assert (rotated - plain).abs().max() <= 1e-12
    assert (kept - plain).abs().max() >= 1e-3


def test_full_rank_adamw_is_adamw_in_rotated_coordinates() -> None:
    Q = torch.linalg.qr(randn(7, 7, seed=99)).Q
    p, w, state = torch.nn.Parameter(randn(9, 7) @ Q), randn(9, 7), {}
    opt = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1, foreach=False)
    for t in range(20):
        G = randn(9, 7, seed=1 + t)
        p.grad = G @ Q
        opt.step()
        galore_step(w, G, state, lr=1e-2, weight_decay=0.1, rank=7, gap=5, basis_fn=lambda A, r: Q)
    assert (w - p.detach() @ Q.T).abs().max() <= 1e-12


@pytest.mark.parametrize("rule", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_transpose_equivariance(rule, shape) -> None:
    w, wt, a, b = randn(*shape), randn(*shape).T.clone(), {}, {}
    for t in range(9):
        G = randn(*shape, seed=1 + t)
        kwargs = {"lr": 1e-2, "weight_decay": 0.1, "rank": 3, "gap": 4, "carry": "rotate", "rule": rule}
        galore_step(w, G, a, **kwargs)
        galore_step(wt, G.T, b, **kwargs)
    assert (w - wt.T).abs().max() <= 1e-12


@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion", "adafactor"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_rotate_undoes_signed_permutations(rule, proj_type) -> None:
    """P -> P S with S a signed permutation at every refresh is absorbed by the rotation, V included."""
    S = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    turns = iter(range(100))

    def fixed(A: Tensor, rank: int) -> Tensor:
        return torch.linalg.qr(randn(A.shape[1], rank, seed=77)).Q

    def turned(A: Tensor, rank: int) -> Tensor:
        return fixed(A, rank) @ torch.linalg.matrix_power(S, next(turns))

    kwargs = {"lr": 1e-2, "rank": 3, "gap": 2, "carry": "rotate", "rule": rule, "proj_type": proj_type}
    a, _ = run_galore((9, 7), 12, **kwargs, basis_fn=fixed)
    b, _ = run_galore((9, 7), 12, **kwargs, basis_fn=turned)
    assert (a - b).abs().max() <= 1e-12


def test_rotation_to_a_disjoint_span_empties_the_moments() -> None:
    halves = iter([(0, 3), (3, 6)])

    def basis_fn(A: Tensor, rank: int) -> Tensor:
        lo, hi = next(halves)
        return torch.eye(A.shape[1], dtype=A.dtype)[:, lo:hi]

    kwargs = {"lr": 1e-2, "rank": 3, "gap": 2, "carry": "rotate", "basis_fn": basis_fn}
    _, state = run_galore((9, 7), 3, **kwargs)
    G = randn(9, 7, seed=3)[:, 3:6]
    assert torch.equal(state["M"], (1 - 0.9) * G)
    assert (state["V"] - (1 - 0.999) * G * G).abs().max() <= 1e-18


def test_reset_restarts_the_run() -> None:
    kwargs = {"lr": 1e-2, "rank": 3, "gap": 4, "carry": "reset"}
    w, state = run_galore((9, 7), 4, **kwargs)
    before, fresh = w.clone(), {}
    G = randn(9, 7, seed=50)
    galore_step(w, G, state, **kwargs)
    galore_step(before, G, fresh, **kwargs)
    assert torch.equal(w, before)
    assert (state["t"], state["c"]) == (1, 5)


def test_update_is_the_best_rank_r_approximation() -> None:
    G = randn(12, 7, seed=1)
    w = torch.zeros_like(G)
    galore_step(w, G, {}, lr=1.0, betas=(0.0, 0.0), rule="sgd", rank=3, gap=1)
    tail = torch.linalg.svdvals(G)[3:].square().sum()
    assert (w + G).square().sum().item() == pytest.approx(tail.item(), rel=1e-12)


def test_lion_signs() -> None:
    w, state = torch.zeros(4, 4, dtype=torch.float64), {}
    G = randn(4, 4, seed=1)
    kwargs = {"lr": 0.5, "betas": (0.9, 0.99), "rule": "lion", "rank": 4, "gap": 10, "basis_fn": identity_basis}
    galore_step(w, G, state, **kwargs)
    assert torch.equal(w, -0.5 * G.sign())
    galore_step(w, -G, state, **kwargs)
    assert torch.equal(w, torch.zeros_like(w))  # sign(0.9 * 0.01 G - 0.1 G) = -sign(G)
    assert (state["M"] - (0.99 * 0.01 - 0.01) * G).abs().max() <= 1e-16


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_identity_basis_adafactor_is_the_unprojected_rule(beta1) -> None:
    w, v, a, b = randn(6, 6), randn(6, 6), {}, {}
    for t in range(20):
        G = randn(6, 6, seed=1 + t)
        galore = {"rank": 6, "gap": 5, "carry": "rotate", "rule": "adafactor", "basis_fn": identity_basis}
        galore_step(w, G, a, lr=1e-2, betas=(beta1, 0.0), weight_decay=0.1, **galore)
        flags = {"relative_step": False, "scale_parameter": False}
        af.hf_adafactor_step(v, G, b, lr=1e-2, beta1=beta1, weight_decay=0.1, **flags)
    assert (w - v).abs().max() <= 1e-12


def test_factored_variance_is_exact_for_rank_one() -> None:
    r, c = randn(7, 1).square() + 0.1, randn(1, 5, seed=1).square() + 0.1
    G = (r * c).sqrt() * randn(7, 5, seed=2).sign()
    state: dict = {}
    af.adafactor_step(randn(7, 5), G, state)
    V = af.factored_variance(state["R"], state["C"], 0)
    assert ((V - G * G) / (G * G)).abs().max() <= 1e-14
    w = torch.ones(7, 5, dtype=torch.float64)
    af.adafactor_step(w, G, {}, rho=1.0)
    assert (w - (1 - G.sign())).abs().max() <= 1e-14


def test_factored_variance_two_by_two() -> None:
    Q = randn(2, 2).square()
    V = af.factored_variance(Q.sum(1, keepdim=True), Q.sum(0, keepdim=True), 0)
    law = torch.linalg.det(Q) / Q.sum() * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert (V - Q - law).abs().max() <= 1e-15


def test_factored_dims() -> None:
    assert af.factored_dims((5,)) is None
    assert af.factored_dims((64, 32, 3, 3)) == (2, 3)
    assert af.factored_dims((64, 32, 3, 3), "largest2") == (0, 1)
    assert af.factored_dims((4, 4, 4), "largest2") == (1, 2)


def test_two_largest_dims_is_a_batch_of_transposed_matrices() -> None:
    w, G, steps = randn(6, 5, 2), [randn(6, 5, 2, seed=1 + t) for t in range(5)], ({}, {})
    v = w.permute(2, 0, 1).clone()
    for g in G:
        af.adafactor_step(w, g, steps[0], factor_dims="largest2")
        af.adafactor_step(v, g.permute(2, 0, 1), steps[1])
    assert (w.permute(2, 0, 1) - v).abs().max() <= 1e-14


def adafactor_gap(opt, p: Tensor, step, growth: float = 1.0, size: float = 1.0, **kwargs) -> float:
    """Max |W_ref - W| / max |W| after 50 steps of ``opt`` and of ``step``; gradients have rms size * growth^t."""
    w, state = p.detach().clone(), {}
    for t in range(50):
        p.grad = randn(*p.shape, seed=1 + t, dtype=p.dtype) * size * growth**t
        opt.step()
        step(w, p.grad, state, **kwargs)
    return float((w - p.detach()).abs().max() / p.detach().abs().max())


@pytest.mark.parametrize("shape", ADAFACTOR_SHAPES)
@pytest.mark.parametrize("eps1", [None, 1e-16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_adafactor(shape, eps1, dtype) -> None:
    p = torch.nn.Parameter(randn(*shape, dtype=dtype))
    kwargs = {"lr": 0.3, "eps": (eps1, 1e-3), "weight_decay": 0.1}
    opt = torch.optim.Adafactor([p], **kwargs)
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    assert adafactor_gap(opt, p, af.torch_adafactor_step, **kwargs) <= tol


@pytest.mark.parametrize("shape", ADAFACTOR_SHAPES)
@pytest.mark.parametrize("size", [3e-6, 1e-7, 1e-9])
def test_torch_adafactor_small_gradients_and_zero_parameter(shape, size) -> None:
    p = torch.nn.Parameter(torch.zeros(shape))
    opt = torch.optim.Adafactor([p])
    assert adafactor_gap(opt, p, af.torch_adafactor_step, size=size) <= 1e-6


@pytest.mark.parametrize("shape", ADAFACTOR_SHAPES)
@pytest.mark.parametrize("clip", [1.0, 1.5])
@pytest.mark.parametrize(
    ("step", "option"),
    [(af.adafactor_step, "clip"), (af.hf_adafactor_step, "clip_threshold"), (af.torch_adafactor_step, "d")],
)
def test_clip(shape, clip, step, option) -> None:
    """Growing gradients make rms(U) exceed the threshold."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = torch.optim.Adafactor([p], d=clip, eps=(1e-16, 1e-2))
    assert adafactor_gap(opt, p, step, growth=1.5, eps=(1e-16, 1e-2), **{option: clip}) <= 1e-12


@pytest.mark.parametrize("step", [af.adafactor_step, af.hf_adafactor_step, af.torch_adafactor_step])
def test_zero_parameter_starts_at_eps2_rho(step) -> None:
    w = torch.zeros(3, 4, dtype=torch.float64)
    step(w, torch.ones_like(w), {}, eps=(1e-30, 1e-2))
    assert (w + 1e-4).abs().max() <= 1e-18


@pytest.mark.parametrize("shape", ADAFACTOR_SHAPES)
def test_paper_equals_hf_and_torch_forms(shape) -> None:
    p, q = torch.nn.Parameter(randn(*shape)), randn(*shape)
    opt = torch.optim.Adafactor([p], eps=(1e-16, 1e-3))
    assert adafactor_gap(opt, p, af.adafactor_step) <= 1e-12
    w, a, b = q.clone(), {}, {}
    for t in range(50):
        g = randn(*shape, seed=1 + t)
        af.adafactor_step(q, g, a)
        af.hf_adafactor_step(w, g, b)
    assert (w - q).abs().max() <= 1e-12


HF_CASES = {
    "default": {},
    "warmup": {"warmup_init": True},
    "manual": {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
    "momentum": {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
}


@pytest.mark.parametrize("shape", ADAFACTOR_SHAPES)
@pytest.mark.parametrize("case", HF_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hf_adafactor(shape, case, dtype) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    if not hasattr(optimization, "Adafactor"):
        pytest.skip("transformers no longer ships Adafactor")
    p = torch.nn.Parameter(randn(*shape, dtype=dtype))
    opt = optimization.Adafactor([p], **HF_CASES[case])
    tol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert adafactor_gap(opt, p, af.hf_adafactor_step, **HF_CASES[case]) <= tol


def test_energies() -> None:
    A = randn(30, 20)
    V = torch.linalg.svd(A).Vh.T
    best = subspace.best_rank_energy(A, 4)
    assert subspace.captured_energy(A, V[:, :4]) == pytest.approx(best, rel=1e-12)
    assert subspace.captured_energy(A, 3.0 * V[:, :4]) == pytest.approx(best, rel=1e-12)
    assert subspace.captured_energy(A, randn(20, 4, seed=1)) < best
    assert subspace.best_rank_energy(A, 20) == pytest.approx(A.square().sum().item(), rel=1e-12)


def test_overlap() -> None:
    Q = torch.linalg.qr(randn(20, 8)).Q
    turn = torch.linalg.qr(randn(4, 4, seed=1)).Q
    assert subspace.overlap(Q[:, :4], Q[:, :4] @ turn) == pytest.approx(1.0, abs=1e-14)
    assert subspace.overlap(Q[:, :4], Q[:, 4:]) == pytest.approx(0.0, abs=1e-14)
    assert subspace.overlap(Q[:, :4], Q[:, 2:6]) == pytest.approx(0.5, abs=1e-14)


def spectrum_matrix(a: int, b: int, power: float) -> Tensor:
    k = min(a, b)
    U, V = (torch.linalg.qr(randn(d, k, seed=s)).Q for d, s in ((a, 1), (b, 2)))
    return U * torch.arange(1, k + 1, dtype=torch.float64) ** -power @ V.T


@pytest.mark.parametrize("shape", [(256, 96), (96, 256)])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_randomized_subspace_iteration(shape, power) -> None:
    A, r = spectrum_matrix(*shape, power), 16
    best = subspace.best_rank_energy(A, r)
    cold = [
        subspace.randomized_subspace_iteration(A, r, subspace.gaussian_start(A, r + 8, gen(3)), k) for k in range(4)
    ]
    shares = [subspace.captured_energy(A, P) / best for P in cold]
    assert max(subspace.orthonormality_error(P) for P in cold) <= 1e-12
    assert shares == sorted(shares)
    assert shares[2] >= 0.98
    assert shares[3] <= 1 + 1e-12
    warm = subspace.randomized_subspace_iteration(A, r, subspace.warm_start(cold[2], 8, gen(4)), 1)
    assert subspace.captured_energy(A, warm) / best >= shares[2] - 1e-12


def test_subspace_iteration_is_exact_for_low_rank() -> None:
    A = randn(40, 5) @ randn(5, 30, seed=1)
    P = subspace.randomized_subspace_iteration(A, 5, subspace.gaussian_start(A, 8, gen(2)), 1)
    assert subspace.captured_energy(A, P) == pytest.approx(A.square().sum().item(), rel=1e-12)
    assert subspace.overlap(P, torch.linalg.svd(A).Vh[:5].T) == pytest.approx(1.0, abs=1e-12)
