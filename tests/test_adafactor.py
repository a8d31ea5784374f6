"""Adafactor against its laws, its dense references, torch.optim and transformers."""

import copy
import inspect
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.optim import Adafactor
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import adafactor as af

SHAPES = ((), (1,), (5,), (7, 5), (5, 7), (1, 6), (6, 1), (3, 7, 5), (4, 3, 3, 3))
EMPTY = ((0,), (0, 5), (5, 0), (2, 0, 3), (0, 3, 4))
PLAIN = {"lr": 1.0, "scale_parameter": False, "clip_threshold": None}
"""Options under which a step from X = 0 leaves X = -U."""
BF16_EPS = torch.finfo(torch.bfloat16).eps
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def uneven(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A gradient whose slices differ in scale by e^-2 .. e^2, so that no statistic is flat."""
    g = randn(*shape, seed=seed)
    for dim, size in enumerate(shape):
        g = g * torch.linspace(-2, 2, size, dtype=F64).exp().view([-1 if d == dim else 1 for d in range(len(shape))])
    return g.to(dtype)


def weight(*shape: int, seed: int = 100, dtype: torch.dtype = F64) -> torch.nn.Parameter:
    return torch.nn.Parameter(randn(*shape, seed=seed, dtype=dtype))


def take(optimizer: torch.optim.Optimizer, param: Tensor, grad: Tensor) -> None:
    param.grad = grad.clone()
    optimizer.step()


def update(grad: Tensor, *earlier: Tensor, **options: Any) -> Tensor:
    """U of the last gradient, after the earlier ones."""
    param = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = Adafactor([param], **PLAIN | options)
    for g in (*earlier, grad):
        param.data.zero_()
        take(optimizer, param, g)
    return -param.detach()


def moments(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {name: value for name, value in optimizer.state[param].items() if name != "step"}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry; 0 for empty tensors."""
    if not theirs.numel():
        return 0.0
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# ------------------------------------------------------------------------------------------------ laws of the estimate


def test_v_is_exact_where_squares_have_rank_one() -> None:
    g = randn(9, 1, seed=1) * randn(1, 6, seed=2)
    v = (g / update(g)).square()
    assert error(v, g.square()) <= 1e-14
    assert ((v / g.square()) - 1).abs().max() <= 1e-13  # every entry, not only the large ones


def test_two_by_two_law() -> None:
    g = randn(2, 2, seed=3)
    q = g.square()
    expected = torch.linalg.det(q) / q.sum() * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=F64)
    assert error((g / update(g)).square() - q, expected) <= 1e-13


@pytest.mark.parametrize("shape", [(8, 5), (3, 4, 6)])
def test_marginals(shape: tuple[int, ...]) -> None:
    param = torch.nn.Parameter(torch.zeros(shape, dtype=F64))
    optimizer = Adafactor([param], **PLAIN)
    row = torch.zeros(shape[:-1], dtype=F64)
    for t in range(1, 6):
        g = uneven(*shape, seed=t)
        param.data.zero_()
        take(optimizer, param, g)
        v = (g / param.detach()).square()
        held = optimizer.state[param]
        row.lerp_(g.square().mean(-1), t**-0.8)
        assert error(v.mean(-1), held["exp_avg_sq_row"]) <= 1e-13
        assert error(v.mean(-2), held["exp_avg_sq_col"]) <= 1e-13
        assert error(held["exp_avg_sq_row"], row) <= 1e-13


EQUIVARIANT = (
    {"lr": 0.1},
    {"lr": None, "beta1": 0.9},
    {"lr": 0.1, "beta1": 0.5, "momentum_on": "update", "weight_decay": 0.1},
    {"lr": 0.1, "eps_mode": "floor", "eps": (1e-3, 1e-3)},
    {"lr": 0.1, "eps_mode": "floor", "eps": (10.0, 1e-3)},
)


def trajectory(shape: tuple[int, ...], act: Callable[[Tensor], Tensor], steps: int = 6, **options: Any) -> Tensor:
    param = torch.nn.Parameter(act(randn(*shape, seed=50)).contiguous())
    optimizer = Adafactor([param], **options)
    for t in range(steps):
        take(optimizer, param, act(uneven(*shape, seed=t)).contiguous())
    return param.detach()


@pytest.mark.parametrize("options", EQUIVARIANT, ids=str)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (1, 5), (3, 5, 4)])
def test_transposition_equivariance(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    turned = trajectory(shape, lambda x: x.mT, **options)
    assert error(turned.mT, trajectory(shape, lambda x: x, **options)) <= 1e-13


@pytest.mark.parametrize("options", EQUIVARIANT, ids=str)
def test_permutation_equivariance(options: dict[str, Any]) -> None:
    rows, cols = torch.randperm(9, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 0, 2])
    moved = trajectory((9, 4), lambda x: x[rows][:, cols], **options)
    assert error(moved, trajectory((9, 4), lambda x: x, **options)[rows][:, cols]) <= 1e-13


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1)])
def test_largest2_does_not_depend_on_the_order_of_dimensions(order: tuple[int, ...]) -> None:
    moved = trajectory((3, 8, 5), lambda x: x.permute(order), factor_dims="largest2")
    assert error(moved, trajectory((3, 8, 5), lambda x: x).permute(order)) <= 1e-13


def test_a_batch_of_matrices_has_a_v_per_matrix_and_one_clip_and_scale() -> None:
    g = uneven(4, 6, 5, seed=1) * torch.tensor([1e-4, 1.0, 30.0, 1e4], dtype=F64).view(4, 1, 1)
    alone = torch.stack([update(g[i]) for i in range(4)])
    assert error(update(g), alone) <= 1e-13
    clipped = alone / max(1.0, rms(alone) / 0.5)
    assert rms(alone) > 0.5
    assert error(update(g, clip_threshold=0.5), clipped) <= 1e-13
    # A clip of each matrix by itself would be another one.
    apart = torch.stack([u / max(1.0, rms(u) / 0.5) for u in alone])
    assert error(apart, clipped) > 1e-3

    param = torch.nn.Parameter(randn(4, 6, 5) * torch.tensor([1e-3, 1.0, 2.0, 5.0], dtype=F64).view(4, 1, 1))
    before = param.detach().clone()
    take(Adafactor([param], lr=0.1, clip_threshold=None), param, g)
    assert error(before - param.detach(), 0.1 * rms(before) * alone) <= 1e-12


@pytest.mark.parametrize("c", [1e-8, 1e-5, 1e-2, 1e2, 1e5, 1e8])
@pytest.mark.parametrize("shape", [(6,), (9, 4), (2, 4, 6)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_scale_invariance(shape: tuple[int, ...], c: float, dtype: torch.dtype) -> None:
    gradients = [uneven(*shape, seed=t, dtype=dtype) for t in range(4)]
    scaled = [(g.double() * c).to(dtype) for g in gradients]
    # eps1 = 1e-30 is 1e-10 of the smallest squares at c = 1e-8.
    assert error(update(scaled[-1], *scaled[:-1]), update(gradients[-1], *gradients[:-1])) <= (
        2e-6 if dtype == F32 else 1e-11
    )


@pytest.mark.parametrize("d", [0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("lr", [None, 0.3])
def test_rms_of_an_update_is_bounded(d: float, beta1: float | None, lr: float | None) -> None:
    param = weight(7, 5)
    optimizer = Adafactor([param], lr, beta1, clip_threshold=d)
    bounds, reached = [], 0
    for t in range(1, 20):
        before = param.detach().clone()
        bounds.append(d * max(1e-3, rms(before)) * (0.3 if lr else min(1e-2, t**-0.5)))
        take(optimizer, param, uneven(7, 5, seed=t) * 3.0**t)
        change = rms(before - param.detach())
        assert change <= max(bounds) * (1 + 1e-12)
        reached += change >= bounds[-1] * (1 - 1e-9)
    if beta1 is None and d < 1:
        assert reached  # the bound is tight


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(), (6,), (7, 5), (1, 5), (5, 1), (2, 3, 4)])
@pytest.mark.parametrize("d", [None, 1.0])
def test_first_step_is_the_sign_where_magnitudes_have_rank_one(
    shape: tuple[int, ...], dtype: torch.dtype, d: float | None
) -> None:
    g = randn(*shape, seed=1).sign()
    for dim, size in enumerate(shape):
        g = g * randn(size, seed=dim).exp().view([-1 if k == dim else 1 for k in range(len(shape))])
    u = update(g.to(dtype), clip_threshold=d)
    assert error(u, g.sign()) <= (5e-7 if dtype == F32 else 1e-14)


# --------------------------------------------------------------------------------------------------- schedule of beta2


@pytest.mark.parametrize("decay", [-0.8, -0.5, -1.0, 0.0])
@pytest.mark.parametrize("shape", [(5,), (4, 3)])
def test_constant_squares_are_v_at_every_step(shape: tuple[int, ...], decay: float) -> None:
    magnitude = randn(shape[0], seed=1).exp().view(-1, *[1] * (len(shape) - 1)).expand(shape)
    param = torch.nn.Parameter(torch.zeros(shape, dtype=F64))
    optimizer = Adafactor([param], beta2_decay=decay, **PLAIN)
    for t in range(30):
        signs = randn(*shape, seed=t).sign()
        param.data.zero_()
        take(optimizer, param, signs * magnitude)
        assert error(-param.detach(), signs) <= 1e-13


@pytest.mark.parametrize("decay", [-0.8, -0.5])
def test_weights_of_the_average_are_those_of_the_paper_and_sum_to_one(decay: float) -> None:
    steps = 40
    param = torch.nn.Parameter(torch.zeros(steps, dtype=F64))
    optimizer = Adafactor([param], beta2_decay=decay, **PLAIN)
    for t in range(steps):
        take(optimizer, param, torch.eye(steps, dtype=F64)[t])
    weights = optimizer.state[param]["exp_avg_sq"]
    t = torch.arange(1, steps + 1, dtype=F64)
    expected = [t[k] ** decay * (1 - t[k + 1 :] ** decay).prod() for k in range(steps)]
    assert (weights.sum() - 1).abs() <= 1e-12
    assert error(weights, torch.stack(expected)) <= 1e-13


@pytest.mark.parametrize("warmup", [False, True])
def test_relative_step(warmup: bool) -> None:
    param = torch.nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = Adafactor([param], relative_step=True, warmup_init=warmup, scale_parameter=False)
    take(optimizer, param, torch.ones(3, dtype=F64))
    for t in (2, 50, 9_999, 10_001, 40_000, 1_000_000):
        optimizer.state[param]["step"].fill_(t - 1)
        optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        param.data.zero_()
        take(optimizer, param, torch.ones(3, dtype=F64))
        expected = min(1e-6 * t if warmup else 1e-2, t**-0.5)
        assert error(param.detach(), torch.full((3,), -expected)) <= 1e-6  # a Tensor of fp32


# ----------------------------------------------------------------------------------------------------- dense reference


def dense_step(x: Tensor, g: Tensor, held: dict[str, Any], *, lr: float | None, **o: Any) -> None:
    """Every option of the class in fp64, around U of the dense reference."""
    t = held["t"] = held.get("t", 0) + 1
    dims = af.factored_dims(g.shape, o["factor_dims"])
    whole = dims is not None and min(g.shape[d] for d in dims) < o["min_dim_size_to_factor"]
    u = torch.zeros_like(g.flatten() if whole else g)
    clip = math.inf if o["clip_threshold"] is None else o["clip_threshold"]
    eps = (o["eps"][0], 1.0)  # from 0 with rho 1 and eps2 1 the reference moves by -U
    flags = {"rho": 1.0, "beta2_decay": -o["beta2_decay"], "eps": eps, "clip": clip, "factor_dims": o["factor_dims"]}
    af.adafactor_step(u, g.reshape(u.shape) * (-1 if o["maximize"] else 1), held.setdefault("U", {}), **flags)
    u = -u.reshape(g.shape)
    lr = 1e-2 if lr is None else lr
    rho = min(1e-6 * t if o["warmup_init"] else lr, t**-0.5) if o["relative_step"] else lr
    alpha = rho
    if o["scale_parameter"] and x.numel():
        alpha = rho * max(o["eps"][1], rms(x))
    moved = u * (alpha if o["momentum_on"] == "scaled_update" else 1.0)
    if o["beta1"] is not None:
        held["M"] = moved = o["beta1"] * held.get("M", torch.zeros_like(g)) + (1 - o["beta1"]) * moved
    moved = moved * (alpha if o["momentum_on"] == "update" else 1.0)
    x.mul_(1 - o["weight_decay"] * {"lr": lr, "alpha": alpha, "one": 1.0}[o["decay_by"]]).sub_(moved)


SIZES = st.integers(1, 6)
ANY_SHAPE = st.one_of(
    st.just(()),
    st.tuples(SIZES),
    st.tuples(st.integers(6, 12), SIZES),
    st.tuples(SIZES, st.integers(6, 12)),
    st.tuples(st.just(1), SIZES),
    st.tuples(SIZES, st.just(1)),
    st.tuples(SIZES, SIZES, SIZES),
    st.tuples(SIZES, SIZES, st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(EMPTY),
)
OPTIONS = st.fixed_dictionaries(
    {
        "beta1": st.sampled_from([None, 0.0, 0.5, 0.9]),
        "momentum_on": st.sampled_from(["scaled_update", "update"]),
        "decay_by": st.sampled_from(["lr", "alpha", "one"]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "clip_threshold": st.sampled_from([None, 0.3, 1.0, 2.5]),
        "scale_parameter": st.booleans(),
        "factor_dims": st.sampled_from(["last2", "largest2"]),
        "min_dim_size_to_factor": st.sampled_from([0, 0, 3]),
        "beta2_decay": st.sampled_from([-0.8, -0.5]),
        "eps": st.sampled_from([(1e-30, 1e-3), (1e-8, 0.5), (1e-2, 0.0)]),
        "maximize": st.booleans(),
    }
)
STEPS_SIZES = st.one_of(
    st.fixed_dictionaries({"relative_step": st.just(True), "warmup_init": st.booleans(), "lr": st.just(None)}),
    st.fixed_dictionaries({"relative_step": st.just(True), "warmup_init": st.just(False), "lr": st.just(0.7)}),
    # A schedule far above 1e-2 and above 1/sqrt(t): external rates have no caps.
    st.fixed_dictionaries(
        {
            "relative_step": st.just(False),
            "warmup_init": st.just(False),
            "lr": st.lists(st.sampled_from([0.0, 1e-4, 0.02, 0.9, 4.0]), min_size=5, max_size=5),
        }
    ),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(shape=ANY_SHAPE, options=OPTIONS, sizes=STEPS_SIZES, seed=st.integers(0, 1000))
def test_follows_the_dense_reference(
    shape: tuple[int, ...], options: dict[str, Any], sizes: dict[str, Any], seed: int
) -> None:
    lr, flags = sizes["lr"], options | {k: v for k, v in sizes.items() if k != "lr"}
    schedule = lr if isinstance(lr, list) else [lr] * 5
    param = weight(*shape, seed=seed)
    theirs, held = param.detach().clone(), {}
    optimizer = Adafactor([param], schedule[0], **flags)
    for t, rate in enumerate(schedule):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        grad = uneven(*shape, seed=seed + t)
        take(optimizer, param, grad)
        dense_step(theirs, grad, held, lr=rate, **flags)
        assert param.grad is not None
        assert torch.equal(param.grad, grad)  # gradients are the caller's
    assert error(param.detach(), theirs) <= 1e-11


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor_dims", ["last2", "largest2"])
def test_fp32_follows_the_paper_in_fp64(shape: tuple[int, ...], factor_dims: str) -> None:
    param = weight(*shape, dtype=F32)
    theirs, held = param.detach().double(), {}
    optimizer = Adafactor([param], factor_dims=factor_dims)
    for t in range(30):
        grad = uneven(*shape, seed=t, dtype=F32)
        take(optimizer, param, grad)
        af.adafactor_step(theirs, grad, held, factor_dims=factor_dims)
    assert error(param.detach(), theirs) <= 1e-6


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2)])
def test_memory_layout_of_weights_and_gradients_does_not_matter(shape: tuple[int, ...]) -> None:
    def strided(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT

    for factor_dims in ("last2", "largest2"):
        pair = [torch.nn.Parameter(f(randn(*shape)).clone()) for f in (strided, torch.clone)]
        assert not pair[0].is_contiguous()
        for param, f in zip(pair, (strided, torch.clone), strict=True):
            optimizer = Adafactor([param], lr=0.1, beta1=0.9, factor_dims=factor_dims)
            for t in range(4):
                param.grad = f(uneven(*shape, seed=t))
                optimizer.step()
        assert error(pair[0].detach(), pair[1].detach()) <= 1e-13


# -------------------------------------------------------------------------------------------------------- torch preset

TORCH_SETTINGS = {
    "defaults": {},
    "eps": {"eps": (1e-16, 1e-3)},
    "eps2": {"eps": (1e-16, 2.0)},
    "lr": {"lr": 1e-3},
    "cap": {"lr": 0.5},  # 1/sqrt(t) takes over at step 5
    "decay": {"weight_decay": 0.3},
    "d": {"d": 1.5},
    "beta2": {"beta2_decay": -0.5},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "coarse": {"eps": (0.5, 1e-3), "d": 2.0},
}


@pytest.mark.parametrize("setting", TORCH_SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_torch_preset_equals_torch(shape: tuple[int, ...], setting: str, dtype: torch.dtype) -> None:
    options = TORCH_SETTINGS[setting]
    ours, theirs = weight(*shape, dtype=dtype), weight(*shape, dtype=dtype)
    a, b = Adafactor.torch([ours], **options), torch.optim.Adafactor([theirs], **options)
    for t in range(50):
        # Sizes from 1e-9 to 1 cross the thresholds of eps1 that the presets share.
        grad = uneven(*shape, seed=t, dtype=dtype) * (1e-9 if t % 10 == 9 else 1.0)
        take(a, ours, grad)
        take(b, theirs, grad)
    assert error(ours.detach(), theirs.detach()) <= (1e-6 if dtype == F32 else 1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("eps1", [None, 1e-16])
@pytest.mark.parametrize("shape", [(), (5,), (7, 5), (3, 7, 5)])
def test_torch_preset_in_bf16_is_torch_with_fp32_statistics(
    shape: tuple[int, ...], eps1: float | None, size: float
) -> None:
    ours = weight(*shape, dtype=BF16)
    options = {"weight_decay": 0.1, "lr": 0.05}
    optimizer = Adafactor.torch([ours], eps=(eps1, 1e-3), **options)
    theirs, held = ours.detach().clone(), {}
    differ = total = 0
    for t in range(20):
        grad = (uneven(*shape, seed=t) * size).to(BF16)
        take(optimizer, ours, grad)
        exact = theirs.float()
        # None is the resolution of the parameter's dtype, as documented and as in torch.
        af.torch_adafactor_step(exact, grad.float(), held, eps=(BF16_EPS if eps1 is None else eps1, 1e-3), **options)
        theirs = exact.to(BF16)
        assert error(ours.detach(), theirs) <= BF16_EPS
        differ += int((ours.detach() != theirs).sum())
        total += theirs.numel()
        ours.data.copy_(theirs)  # two fp32 roundings may land on two sides of a tie
    assert differ <= 0.01 * total
    names = {"exp_avg_sq_row": "R", "exp_avg_sq_col": "C", "exp_avg_sq": "V"}
    for name, value in moments(optimizer, ours).items():
        assert value.dtype == F32
        assert error(value, held[names[name]].reshape(value.shape)) <= 1e-5


def test_torch_preset_takes_the_arguments_of_torch() -> None:
    signature = inspect.signature(torch.optim.Adafactor.__init__).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    positional = [p.default for p in list(signature.values())[2:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    ours, theirs = weight(4, 3), weight(4, 3)
    for kind in (Adafactor.torch([ours], *positional), Adafactor.torch([ours], **defaults)):
        ours.data.copy_(theirs)
        reference = torch.optim.Adafactor([copied := torch.nn.Parameter(theirs.detach().clone())])
        take(kind, ours, uneven(4, 3))
        take(reference, copied, uneven(4, 3))
        assert error(ours.detach(), copied.detach()) <= 1e-12


def test_equals_torch_at_the_spec_point_without_the_preset() -> None:
    for shape in SHAPES:
        ours, theirs = weight(*shape, dtype=F32), weight(*shape, dtype=F32)
        a, b = Adafactor([ours]), torch.optim.Adafactor([theirs], lr=1e-2, eps=(1e-16, 1e-3))
        for t in range(50):
            grad = uneven(*shape, seed=t, dtype=F32)
            take(a, ours, grad)
            take(b, theirs, grad)
        assert error(ours.detach(), theirs.detach()) <= 1e-6


# ------------------------------------------------------------------------------------ defects of torch that are absent


def paper_update(gradients: list[Tensor]) -> Tensor:
    u, held = torch.zeros(gradients[0].shape, dtype=F64), {}
    for grad in gradients:
        u.zero_()
        af.adafactor_step(u, grad, held, rho=1.0, eps=(1e-30, 1.0))
    return -u


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_small_gradients_keep_adaptivity(size: float, dtype: torch.dtype) -> None:
    gradients = [(uneven(16, 12, seed=t) * size).to(dtype) for t in range(3)]
    expected = paper_update([g.double() for g in gradients])

    def last(optimizer_class: Any) -> Tensor:
        param = torch.nn.Parameter(torch.zeros(16, 12, dtype=dtype))
        optimizer = optimizer_class([param])
        for g in gradients:
            param.data.zero_()
            take(optimizer, param, g)
        return -param.detach() / 1e-5  # max(eps2, 0) min(lr, 1/sqrt(t))

    ours = last(Adafactor)
    assert cosine(ours, expected) >= 0.9999
    assert rms(ours) == pytest.approx(rms(expected), rel=1e-2)
    if size <= 1e-6:
        assert cosine(last(torch.optim.Adafactor), expected) < 0.9  # the test can tell


@pytest.mark.parametrize("build", [Adafactor, Adafactor.torch])
def test_bf16_statistics_do_not_stall(build: Any) -> None:
    param = weight(8, 8, dtype=BF16)
    optimizer = build([param])
    sizes = torch.randn(4000, 8, 8, generator=torch.Generator().manual_seed(0)).to(BF16)
    for t in range(4000):
        param.grad = sizes[t] * (1.0 if t < 2000 else 2.0)
        optimizer.step()
    assert float(optimizer.state[param]["exp_avg_sq_row"].mean()) == pytest.approx(3.9, abs=0.3)


@pytest.mark.parametrize("build", [Adafactor, Adafactor.torch])
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_eps_does_not_leak_over_a_group(build: Any, size: float) -> None:
    results: dict[torch.dtype, list[Tensor]] = {F32: [], BF16: []}
    for order in ((F32,), (BF16,), (F32, BF16), (BF16, F32)):
        params = [weight(6, 5, dtype=dtype) for dtype in order]
        optimizer = build(params)
        for t in range(3):
            for param in params:
                param.grad = (uneven(6, 5, seed=t) * size).to(param.dtype)
            optimizer.step()
        for param in params:
            results[param.dtype].append(param.detach())
    for values in results.values():
        assert len(values) == 3
        assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Adafactor, {}),
        (Adafactor, {"factor_dims": "largest2", "beta1": 0.9}),
        (Adafactor.torch, {}),
        (Adafactor.hf, {"beta1": 0.9}),
    ],
)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty_parameters(build: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    empty, other, alone = weight(*shape), weight(4, 3), weight(4, 3)
    together, single = build([empty, other], **options), build([alone], **options)
    for t in range(3):
        empty.grad = torch.zeros(shape, dtype=F64)
        other.grad = uneven(4, 3, seed=t)
        together.step()
        take(single, alone, uneven(4, 3, seed=t))
    assert empty.shape == shape
    assert torch.equal(other, alone)
    assert all(value.isfinite().all() for value in together.state[empty].values())


# ----------------------------------------------------------------------------------------------------------- hf preset

HF_SETTINGS = {
    "defaults": {},
    "warmup": {"warmup_init": True},
    "lr": {"lr": 1e-2, "relative_step": False},
    "external": {"lr": 0.5, "relative_step": False, "scale_parameter": False},
    "momentum": {"beta1": 0.9},
    "momentum0": {"beta1": 0.0},
    "decay": {"weight_decay": 0.3, "lr": 0.1, "relative_step": False},
    "relative_decay": {"weight_decay": 0.3, "beta1": 0.5},
    "unscaled": {"scale_parameter": False, "warmup_init": True, "weight_decay": 0.1},
    "clip": {"clip_threshold": 0.4, "decay_rate": -0.6, "eps": (1e-12, 0.1)},
}


@pytest.mark.parametrize("setting", HF_SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_hf_preset_equals_the_reference(shape: tuple[int, ...], setting: str, dtype: torch.dtype) -> None:
    options = HF_SETTINGS[setting]
    ours = weight(*shape, dtype=dtype)
    theirs, held = ours.detach().clone(), {}
    optimizer = Adafactor.hf([ours], **options)
    for t in range(30):
        grad = uneven(*shape, seed=t, dtype=dtype)
        take(optimizer, ours, grad)
        af.hf_adafactor_step(theirs, grad, held, **options)
    assert error(ours.detach(), theirs) <= (2e-6 if dtype == F32 else 1e-12)


@pytest.mark.parametrize("setting", HF_SETTINGS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_hf_preset_equals_transformers(setting: str, dtype: torch.dtype) -> None:
    reference = pytest.importorskip("transformers.optimization").Adafactor
    options = HF_SETTINGS[setting]
    for shape in SHAPES:
        ours, theirs = weight(*shape, dtype=dtype), weight(*shape, dtype=dtype)
        a, b = Adafactor.hf([ours], **options), reference([theirs], **options)
        differ = total = 0
        for t in range(30):
            grad = uneven(*shape, seed=t, dtype=dtype)
            take(a, ours, grad)
            take(b, theirs, grad)
            if dtype == BF16:
                assert error(ours.detach(), theirs.detach()) <= BF16_EPS
                differ += int((ours != theirs).sum())
                total += theirs.numel()
                ours.data.copy_(theirs.data)  # two fp32 roundings may land on two sides of a tie
        if dtype == BF16:
            assert differ <= max(1, 0.01 * total)
        else:
            assert error(ours.detach(), theirs.detach()) <= (2e-6 if dtype == F32 else 1e-12)
        for name, value in moments(a, ours).items():
            assert value.dtype == (F64 if dtype == F64 else F32)
            assert error(value, b.state[theirs][name]) <= (1e-12 if dtype == F64 else 2e-5)


# ------------------------------------------------------------------------------------------------------ hard gradients


@pytest.mark.parametrize("build", [Adafactor, Adafactor.torch, Adafactor.hf])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_a_zero_gradient_moves_nothing(build: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    param = weight(*shape, dtype=dtype)
    before = param.detach().clone()
    optimizer = build([param])
    for _ in range(3):
        take(optimizer, param, torch.zeros(shape, dtype=dtype))
        assert torch.equal(param, before)
    take(optimizer, param, uneven(*shape, dtype=dtype))
    assert param.isfinite().all()
    assert not torch.equal(param, before)


@pytest.mark.parametrize("eps1", [1e-30, 1e-16])
@pytest.mark.parametrize("mode", ["square", "floor"])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_a_zero_row_and_column_stay(mode: str, eps1: float, dtype: torch.dtype) -> None:
    param = weight(6, 5, dtype=dtype)
    before = param.detach().clone()
    optimizer = Adafactor([param], lr=0.1, eps_mode=mode, eps=(eps1, 1e-3))
    for t in range(3):
        grad = uneven(6, 5, seed=t, dtype=dtype)
        grad[2], grad[:, 3] = 0, 0
        take(optimizer, param, grad)
    assert param.isfinite().all()
    assert torch.equal(param[2], before[2])
    assert torch.equal(param[:, 3], before[:, 3])
    assert not torch.equal(param[0, 0], before[0, 0])


def test_fp16_weights_and_gradients() -> None:
    for size in (1e-4, 1.0, 1e2):
        param = weight(7, 5, dtype=F16)
        theirs, held = param.detach().double(), {}
        optimizer = Adafactor([param], lr=None)
        for t in range(5):
            grad = (uneven(7, 5, seed=t) * size).to(F16)
            take(optimizer, param, grad)
            af.adafactor_step(theirs, grad, held)
            theirs = theirs.to(F16).double()
            assert error(param.detach(), theirs) <= torch.finfo(F16).eps
            param.data.copy_(theirs)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinite_gradient_is_skipped_by_grad_scaler(bad: float) -> None:
    param, twin = weight(4, 3, dtype=F32), weight(4, 3, dtype=F32)
    optimizer, plain = Adafactor([param], beta1=0.9), Adafactor([twin], beta1=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for t in range(6):
        spoiled = t in (0, 3)
        target = uneven(4, 3, seed=t, dtype=F32)
        optimizer.zero_grad()
        scaler.scale((param * target).sum()).backward()
        before, size = param.detach().clone(), scaler.get_scale()
        if spoiled:
            assert param.grad is not None
            param.grad[1, 1] = bad
        scaler.step(optimizer)
        scaler.update()
        if spoiled:
            assert torch.equal(param, before)
            assert scaler.get_scale() == size / 2
        else:
            take(plain, twin, target)
    assert optimizer.state[param]["step"] == 4
    assert error(param.detach(), twin.detach()) <= 1e-6


# ----------------------------------------------------------------------------------------------------- host and memory


class NoSync(TorchDispatchMode):
    """Fails where a value other than a step counter (or one of `allowed`) is read by the host."""

    def __init__(self, optimizer: torch.optim.Optimizer, *allowed: Tensor) -> None:
        super().__init__()
        self.optimizer, self.allowed, self.reads = optimizer, allowed, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        aten = torch.ops.aten
        assert packet not in (aten.equal, aten.nonzero, aten.is_nonzero, aten.allclose), f"{func} synchronises"
        if packet is aten._local_scalar_dense:
            self.reads += 1
            counters = [held["step"] for held in self.optimizer.state.values() if "step" in held]
            known = any(args[0].data_ptr() == tensor.data_ptr() for tensor in (*counters, *self.allowed))
            assert known, f"the host reads a tensor of shape {tuple(args[0].shape)}"
            assert args[0].device.type == "cpu"
        return func(*args, **(kwargs or {}))


SYNC_OPTIONS = (
    {},
    {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1, "decay_by": "alpha"},
    {"warmup_init": True, "beta1": 0.9, "momentum_on": "update"},
    {"eps_mode": "floor", "factor_dims": "largest2", "maximize": True},
    {"clip_threshold": None, "scale_parameter": False, "lr": 0.1, "decay_by": "one", "weight_decay": 0.1},
    {"state_dtype": "bfloat16", "beta1": 0.9},
)


@pytest.mark.parametrize("options", SYNC_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_host_synchronisation(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [weight(*shape, dtype=dtype) for shape in (*SHAPES, *EMPTY)]
    optimizer = Adafactor(params, **options)
    for t in range(3):
        for param in params:
            param.grad = uneven(*param.shape, seed=t, dtype=dtype)
        with NoSync(optimizer) as mode:
            optimizer.step()
        assert mode.reads == len(params)


@pytest.mark.parametrize("relative", [False, True])
def test_a_tensor_lr_is_not_read_by_the_host(relative: bool) -> None:
    lr = torch.tensor(1e-2)
    params = [weight(*shape, dtype=F32) for shape in SHAPES]
    optimizer = Adafactor(params, lr, relative_step=relative, weight_decay=0.1)
    for t in range(3):
        for param in params:
            param.grad = uneven(*param.shape, seed=t, dtype=F32)
        # Creating state asks once whether this is the warm-up step (lr 0) of a checkpointing tool.
        with NoSync(optimizer, *([lr] if t == 0 else [])):
            optimizer.step()


@pytest.mark.parametrize("options", SYNC_OPTIONS, ids=str)
def test_steps_on_a_device_that_has_no_values(options: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = Adafactor(params, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert all(value.is_meta for param in params for value in moments(optimizer, param).values())


TABLE = (
    # shape, options, elements of the second moment
    ((12, 7), {}, 12 + 7),
    ((1, 7), {}, 1 + 7),
    ((3, 12, 7), {}, 3 * (12 + 7)),
    ((2, 3, 12, 7), {}, 2 * 3 * (12 + 7)),
    ((9,), {}, 9),
    ((), {}, 1),
    ((16, 8, 3, 3), {}, 16 * 8 * (3 + 3)),
    ((16, 8, 3, 3), {"factor_dims": "largest2"}, 9 * (16 + 8)),
    ((3, 12, 7), {"factor_dims": "largest2"}, 3 * (12 + 7)),
    ((12, 7), {"min_dim_size_to_factor": 8}, 12 * 7),
    ((12, 7), {"min_dim_size_to_factor": 7}, 12 + 7),
)


@pytest.mark.parametrize(("shape", "options", "elements"), TABLE)
@pytest.mark.parametrize("beta1", [None, 0.0, 0.9])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_memory_is_that_of_the_table(
    shape: tuple[int, ...], options: dict[str, Any], elements: int, beta1: float | None, dtype: torch.dtype
) -> None:
    param = weight(*shape, dtype=dtype)
    optimizer = Adafactor([param], beta1=beta1, **options)
    predicted = optimizer.summary().state_bytes
    assert not optimizer.state
    for t in range(2):
        take(optimizer, param, uneven(*shape, seed=t, dtype=dtype))
    held = moments(optimizer, param)
    count = sum(value.numel() for value in held.values())
    assert ("exp_avg" in held) == (beta1 is not None)
    assert count == elements + (param.numel() if beta1 is not None else 0)
    assert all(value.dtype == F32 for value in held.values())
    # Nothing hides behind a view.
    assert sum(value.untyped_storage().nbytes() for value in held.values()) == predicted == 4 * count
    assert optimizer.state[param]["step"].shape == ()


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "bfloat16", "float64", "parameter", "float32"])
def test_state_dtype_is_that_of_the_momentum_alone(state_dtype: str | torch.dtype) -> None:
    param = weight(6, 5, dtype=BF16)
    optimizer = Adafactor([param], beta1=0.9, state_dtype=state_dtype)
    for t in range(3):
        take(optimizer, param, uneven(6, 5, seed=t, dtype=BF16))
    dtypes = {name: value.dtype for name, value in moments(optimizer, param).items()}
    assert dtypes.pop("exp_avg") == {"float64": F64, "float32": F32}.get(str(state_dtype), BF16)
    assert set(dtypes.values()) == {F32}


def test_bf16_momentum_is_near_that_of_fp32() -> None:
    results = []
    for state_dtype in ("float32", "bfloat16"):
        param = weight(6, 5, dtype=F32)
        before = param.detach().clone()
        optimizer = Adafactor([param], beta1=0.9, state_dtype=state_dtype)
        for t in range(20):
            take(optimizer, param, uneven(6, 5, seed=t, dtype=F32))
        results.append(param.detach() - before)
    assert 0 < error(results[1], results[0]) <= 0.02


# --------------------------------------------------------------------------------------------------------- checkpoints


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = (
    {},
    {"lr": 0.02, "beta1": 0.9, "weight_decay": 0.1},
    {"factor_dims": "largest2", "eps_mode": "floor", "eps": (None, 1e-3)},
    {"beta1": 0.5, "state_dtype": torch.bfloat16},
    {"lr": torch.tensor(0.02), "momentum_on": "update", "beta1": 0.9},
)


@pytest.mark.parametrize("options", RESUMED, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_resume_is_bit_exact(options: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = (*SHAPES, (0, 5))

    def advance(optimizer: Adafactor, params: list[torch.nn.Parameter], start: int) -> None:
        for t in range(start, start + 4):
            for param in params:
                param.grad = uneven(*param.shape, seed=t, dtype=dtype)
            optimizer.step()

    params = [weight(*shape, dtype=dtype) for shape in shapes]
    optimizer = Adafactor(params, **copy.deepcopy(options))
    advance(optimizer, params, 0)
    saved = reloaded(optimizer.state_dict())
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Adafactor(copies, **copy.deepcopy(options))
    resumed.load_state_dict(saved)
    for param, twin in zip(params, copies, strict=True):
        assert optimizer.state[param].keys() == resumed.state[twin].keys()
        for name, value in optimizer.state[param].items():
            loaded = resumed.state[twin][name]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)
            assert not loaded.numel() or loaded.data_ptr() != value.data_ptr()
    if "state_dtype" not in options:
        widest = F64 if dtype == F64 else F32
        assert {v.dtype for p in copies for v in moments(resumed, p).values()} == {widest}
    advance(optimizer, params, 4)
    advance(resumed, copies, 4)
    assert all(torch.equal(param, twin) for param, twin in zip(params, copies, strict=True))


def test_a_checkpoint_of_another_structure_is_refused_and_nothing_is_loaded() -> None:
    param, other = weight(6, 5, dtype=F32), weight(6, 4, dtype=F32)
    optimizer, reader = Adafactor([param]), Adafactor([other])
    take(optimizer, param, uneven(6, 5, dtype=F32))
    take(reader, other, uneven(6, 4, dtype=F32))
    before = copy.deepcopy(reader.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg_sq_col.*\(5,\).*\(4,\)"):
        reader.load_state_dict(optimizer.state_dict())
    after = reader.state_dict()
    assert before["param_groups"][0].items() <= after["param_groups"][0].items()
    assert all(torch.equal(value, before["state"][0][name]) for name, value in after["state"][0].items())

    theirs = torch.optim.Adafactor([weight(6, 4, dtype=F32)])
    take(theirs, theirs.param_groups[0]["params"][0], uneven(6, 4, dtype=F32))
    with pytest.raises(ValueError, match="row_var"):
        reader.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_go_on_alike(clone: Callable[[Any], Any], steps: int) -> None:
    params = [weight(*shape, dtype=BF16) for shape in SHAPES]
    optimizer = Adafactor(params, beta1=0.9)

    def advance(optimizer: Adafactor, start: int) -> None:
        for t in range(start, start + 3):
            for param in optimizer.param_groups[0]["params"]:
                param.grad = uneven(*param.shape, seed=t, dtype=BF16)
            optimizer.step()

    if steps:
        advance(optimizer, 0)
    twin = clone(optimizer)
    copies = twin.param_groups[0]["params"]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(params, copies, strict=True))
    advance(twin, 3)
    if steps:
        assert not torch.equal(params[3], copies[3])
    advance(optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert {v.dtype for p in copies for v in moments(twin, p).values()} == {F32}


# ---------------------------------------------------------------------------------------------------------- validation

INVALID = (
    ({"lr": -1.0}, "-1.0"),
    ({"lr": math.nan}, "nan"),
    ({"lr": math.inf}, "inf"),
    ({"lr": torch.tensor([0.1, 0.2])}, "1-element"),
    ({"lr": torch.tensor(-0.1)}, r"-0\.1"),
    ({"lr": None, "relative_step": False}, "relative_step"),
    ({"lr": 0.1, "warmup_init": True}, "relative_step"),
    ({"beta1": 1.0}, r"beta1.*1\.0"),
    ({"beta1": -0.1}, r"beta1.*-0\.1"),
    ({"beta2_decay": 0.8}, r"beta2_decay.*0\.8"),
    ({"beta2_decay": math.nan}, "beta2_decay"),
    ({"eps": (-1e-30, 1e-3)}, "-1e-30"),
    ({"eps": (1e-30, -1e-3)}, r"-0\.001"),
    ({"eps": 1e-30}, "eps"),
    ({"eps": (1e-30,)}, "eps"),
    ({"eps": (1e-30, None)}, "eps"),
    ({"clip_threshold": 0.0}, r"clip_threshold.*0\.0"),
    ({"clip_threshold": -1.0}, r"clip_threshold.*-1\.0"),
    ({"clip_threshold": math.nan}, "clip_threshold"),
    ({"weight_decay": -0.1}, r"weight_decay.*-0\.1"),
    ({"momentum_on": "gradient"}, "gradient.*scaled_update"),
    ({"decay_by": "rho"}, "rho.*alpha"),
    ({"eps_mode": "add"}, "add.*square"),
    ({"factor_dims": "first2"}, "first2.*last2"),
    ({"state_dtype": "int8"}, "int8.*float32"),
    ({"state_dtype": torch.int8}, "int8.*float32"),
    ({"min_dim_size_to_factor": -1}, "min_dim_size_to_factor"),
)


@pytest.mark.parametrize(("options", "message"), INVALID, ids=str)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adafactor([weight(3, 2)], **options)


GROUP_INVALID = tuple((o, m) for o, m in INVALID if o not in ({"lr": None, "relative_step": False},))


@pytest.mark.parametrize(("options", "message"), GROUP_INVALID, ids=str)
def test_invalid_options_of_a_group_are_refused(options: dict[str, Any], message: str) -> None:
    optimizer = Adafactor([weight(3, 2)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight(3, 2)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("lr", [None, 0.1])
def test_lr_none_in_a_group_is_the_relative_step_or_refused(lr: float | None) -> None:
    param = weight(3, 2)
    try:
        optimizer = Adafactor([{"params": [param], "lr": None}], lr=lr)
    except ValueError as refused:
        assert "lr" in str(refused)  # noqa: PT017
    else:
        assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_a_misspelled_option_of_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip_treshold.*clip_threshold"):
        Adafactor([{"params": [weight(3, 2)], "clip_treshold": 1.0}])


def test_unsupported_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match=r"complex.*view_as_real"):
        Adafactor([torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))])
    with pytest.raises(TypeError):
        Adafactor(weight(3, 2))
    with pytest.raises(ValueError, match="empty"):
        Adafactor([])
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Adafactor(embedding.parameters()).step()
    with pytest.raises(ValueError, match=r"0\.1.*relative_step"):
        Adafactor.hf([weight(3, 2)], lr=0.1)


def test_preset_options_can_be_overridden() -> None:
    optimizer = Adafactor.torch([weight(3, 2)], beta1=0.9, scale_parameter=False, decay_by="alpha")
    group = optimizer.param_groups[0]
    assert (group["beta1"], group["scale_parameter"], group["decay_by"]) == (0.9, False, "alpha")
    assert isinstance(Adafactor.hf([weight(3, 2)], factor_dims="largest2"), Adafactor)


# --------------------------------------------------------------------------------------- schedulers and life of groups

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["none", "number", "tensor", "tensor1"])
def test_schedulers(scheduler: str, kind: str) -> None:
    lr = {"none": None, "number": 0.2, "tensor": torch.tensor(0.2), "tensor1": torch.tensor([0.2])}[kind]
    shapes = ((), (4,), (4, 3))
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=F64)) for shape in shapes]
    optimizer = Adafactor(params, lr, scale_parameter=False, clip_threshold=None)
    given_lr = optimizer.param_groups[0]["lr"]
    assert isinstance(given_lr, Tensor if kind.startswith("tensor") else float)
    schedule = SCHEDULERS[scheduler](optimizer)
    seen = []
    for t in range(1, 7):
        now = float(optimizer.param_groups[0]["lr"])
        seen.append(now)
        for param in params:
            param.data.zero_()
            param.grad = torch.full_like(param, 3.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "plateau" else []))
        expected = min(now, t**-0.5) if lr is None else now
        for param in params:
            assert error(param.detach(), torch.full_like(param, -expected)) <= 1e-6
            assert param.shape == param.grad.shape
    assert len(set(seen)) > 1


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("lr_shape", [(), (1,)])
def test_tensor_lr_equals_number(lr_shape: tuple[int, ...], relative: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        results = []
        for lr in (0.25, torch.full(lr_shape, 0.25)):
            param = weight(*shape, dtype=dtype)
            optimizer = Adafactor([param], lr, 0.9, relative_step=relative, weight_decay=0.1)
            for t in range(6):
                take(optimizer, param, uneven(*shape, seed=t, dtype=dtype))
            results.append(param.detach())
        assert error(results[1], results[0]) <= 1e-6


def test_a_live_tensor_lr_is_obeyed() -> None:
    lr = torch.tensor(0.5)
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adafactor([param], lr, scale_parameter=False)
    for value in (0.5, 7.0, 0.0):
        lr.fill_(value)
        param.data.zero_()
        take(optimizer, param, torch.ones(3))
        assert error(param.detach(), torch.full((3,), -value)) <= 1e-6 if value else not param.any()


def test_groups_have_options_of_their_own() -> None:
    groups = [
        {"params": [weight(6, 5)], "lr": 0.3},
        {"params": [weight(6, 5)], "beta1": 0.9, "clip_threshold": 0.5},
        {"params": [weight(6, 5)], "weight_decay": 0.2, "decay_by": "one", "factor_dims": "largest2"},
    ]
    optimizer = Adafactor([dict(group) for group in groups], lr=0.1)
    alone = []
    for group in groups:
        param = weight(6, 5)
        options = {"lr": 0.1} | {k: v for k, v in group.items() if k != "params"}
        alone.append((param, Adafactor([param], **options)))
    for t in range(4):
        for group in optimizer.param_groups:
            group["params"][0].grad = uneven(6, 5, seed=t)
        optimizer.step()
        for param, single in alone:
            take(single, param, uneven(6, 5, seed=t))
    for group, (param, _) in zip(optimizer.param_groups, alone, strict=True):
        assert torch.equal(group["params"][0], param)


def test_named_parameters() -> None:
    module = torch.nn.Linear(4, 3)
    optimizer = Adafactor(module.named_parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    Adafactor(module.named_parameters()).load_state_dict(reloaded(optimizer.state_dict()))


def stepped(**options: Any) -> tuple[Adafactor, torch.nn.Parameter]:
    param = weight(6, 5)
    optimizer = Adafactor([param], **options)
    for t in range(3):
        take(optimizer, param, uneven(6, 5, seed=t))
    return optimizer, param


def test_a_group_added_after_steps_starts_at_its_own_first_step() -> None:
    (optimizer, param), (single, twin) = stepped(beta1=0.9), stepped(beta1=0.9)
    late, alone = weight(5, 4, seed=7), weight(5, 4, seed=7)
    optimizer.add_param_group({"params": [late], "weight_decay": 0.1, "lr": 0.05})
    reference = Adafactor([alone], 0.05, 0.9, weight_decay=0.1, relative_step=True)
    for t in range(3, 6):
        late.grad = uneven(5, 4, seed=t)
        take(optimizer, param, uneven(6, 5, seed=t))
        take(single, twin, uneven(6, 5, seed=t))
        take(reference, alone, uneven(5, 4, seed=t))
    assert torch.equal(param, twin)
    assert torch.equal(late, alone)
    assert (optimizer.state[param]["step"], optimizer.state[late]["step"]) == (6, 3)
    again = Adafactor([{"params": [weight(6, 5)]}, {"params": [weight(5, 4)]}], beta1=0.9)
    again.load_state_dict(reloaded(optimizer.state_dict()))
    assert again.param_groups[1]["weight_decay"] == 0.1


def test_parameters_frozen_at_first_are_taken_up_later() -> None:
    frozen, trained = weight(5, 4, seed=7), weight(6, 5)
    frozen.requires_grad_(False)
    optimizer = Adafactor([frozen, trained])
    for t in range(3):
        take(optimizer, trained, uneven(6, 5, seed=t))
    assert frozen not in optimizer.state
    saved = reloaded(optimizer.state_dict())  # a checkpoint of a part of the state
    restored = Adafactor([weight(5, 4, seed=7), weight(6, 5)])
    restored.load_state_dict(saved)
    assert len(restored.state) == 1
    frozen.requires_grad_(True)
    alone = weight(5, 4, seed=7)
    reference = Adafactor([alone])
    for t in range(3, 5):
        frozen.grad = uneven(5, 4, seed=t)
        take(optimizer, trained, uneven(6, 5, seed=t))
        take(reference, alone, uneven(5, 4, seed=t))
    assert torch.equal(frozen, alone)
    assert (optimizer.state[frozen]["step"], optimizer.state[trained]["step"]) == (2, 5)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_warm_up_step_of_checkpointing_tools_creates_state_and_moves_nothing(lr: float | Tensor) -> None:
    param = weight(4, 3)
    before = param.detach().clone()
    optimizer = Adafactor([param], copy.deepcopy(lr), weight_decay=0.1, decay_by="one", beta1=0.9)
    rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], lr * 0
    take(optimizer, param, torch.zeros(4, 3, dtype=F64))
    optimizer.param_groups[0]["lr"] = rate
    assert torch.equal(param, before)
    assert not any(value.any() for value in optimizer.state[param].values())
    alone = weight(4, 3)
    reference = Adafactor([alone], copy.deepcopy(lr), weight_decay=0.1, decay_by="one", beta1=0.9)
    take(optimizer, param, uneven(4, 3))
    take(reference, alone, uneven(4, 3))
    assert torch.equal(param, alone)


def test_closure() -> None:
    param = weight(4, 3)
    optimizer = Adafactor([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == pytest.approx(weight(4, 3).square().sum().item())
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_trains_a_small_network() -> None:
    torch.manual_seed(0)
    data = torch.randn(32, 6)
    target = torch.tanh(data @ torch.randn(6, 2))
    for options in ({"lr": 0.1}, {"lr": 0.1, "beta1": 0.9}):
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        optimizer = Adafactor(model.parameters(), **options)
        losses = []
        for _ in range(80):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
