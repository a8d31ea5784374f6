"""Moments in 8 bits and weights in bf16, through every optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.kernels import tiles
from lowmem.kernels.blockwise import FORMATS
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    BAdam,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdamW8bit,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
)
from lowmem.optim.core import codec, compact
from lowmem.optim.core.state import is_counter
from torch import Tensor, nn

from tests.helpers import feed, randn

Build = Callable[..., torch.optim.Optimizer]
RANK, GAP = 32, 4
SHAPES = ((160, 96), (96, 160), (10, 60, 3, 3), (40,))

OPTIMIZERS: dict[str, Build] = {
    "adamw": AdamW8bit,
    "galore": lambda p, **o: GaLore(p, rank=RANK, update_proj_gap=GAP, scale=1.0, **o),
    "galore-full": lambda p, **o: GaLore(p, rank=80, update_proj_gap=GAP, scale=1.0, proj_type="full", **o),
    "galore-lion": lambda p, **o: GaLore(p, rank=RANK, update_proj_gap=GAP, scale=1.0, rule="lion", **o),
    "galore-rmsprop": lambda p, **o: GaLore(p, rank=RANK, update_proj_gap=GAP, scale=1.0, rule="rmsprop", **o),
    "fira": lambda p, **o: Fira(p, rank=RANK, update_proj_gap=GAP, scale=1.0, **o),
    "frugal-columns": lambda p, **o: Frugal(p, density=0.5, update_proj_gap=GAP, **o),
    "frugal-randk": lambda p, **o: Frugal(p, density=0.5, projector="randk", update_proj_gap=GAP, **o),
    "frugal-svd": lambda p, **o: Frugal(p, rank=RANK, projector="svd", update_proj_gap=GAP, **o),
    "online": lambda p, **o: OnlineSubspaceDescent(p, rank=RANK, proj_ratio=0.1, **o),
    "galore_plus": lambda p, **o: GaLorePlus(
        p, rank=RANK, update_proj_gap=GAP, scale=1.0, residual_density=0.4, residual_warmup=2, **o
    ),
    "dct-norm": lambda p, **o: LowRank(
        p, rank=RANK, update_proj_gap=GAP, scale=1.0, projector="dct", residual="norm", **o
    ),
    "flora": lambda p, **o: Flora(p, rank=RANK, scale_parameter=False, **o),
    "adafactor": lambda p, **o: Adafactor(p, beta1=0.9, scale_parameter=False, **o),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
coded = pytest.mark.parametrize("state_dtype", FORMATS)
ROUNDS = ("stochastic", "compensated", "compensated8")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter((0.05 * randn(*shape, seed=i)).to(dtype)) for i, shape in enumerate(SHAPES)]


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    for index, param in enumerate(params):
        param.grad = randn(*param.shape, seed=100 * seed + index).to(param.dtype)
    optimizer.step()


def train(name: str, steps: int = 9, dtype: torch.dtype = torch.float32, **options: Any):
    params = parameters(dtype)
    optimizer = OPTIMIZERS[name](params, lr=1e-2, **options)
    for seed in range(steps):
        step(optimizer, params, seed)
    return optimizer, params


def movement(params: list[nn.Parameter]) -> Tensor:
    start = parameters()
    return torch.cat([(p.detach().float() - s.detach()).flatten() for p, s in zip(params, start, strict=True)])


@every
@coded
def test_eight_bits_follow_fp32(name: str, state_dtype: str) -> None:
    """As near as 8 bits are; what follows the sign of a moment (Lion) turns where that is small."""
    exact, near = (movement(train(name, state_dtype=storage)[1]) for storage in ("float32", state_dtype))
    assert (near - exact).norm() < (0.25 if name == "galore-lion" else 0.05) * exact.norm()
    assert not torch.equal(near, exact)


@every
@coded
def test_codes_take_the_bytes_that_the_summary_tells(name: str, state_dtype: str) -> None:
    optimizer, _ = train(name, steps=2, state_dtype=state_dtype)
    states = list(optimizer.state.values())
    measured = sum(value.nbytes for held in states for key, value in held.items() if not is_counter(key))
    assert measured == optimizer.summary().state_bytes
    codes = [held[key] for held in states for key in held if key + codec.SCALE in held]
    assert codes
    assert all(value.dtype in (torch.int8, torch.uint8) for value in codes)


@pytest.mark.parametrize(("rank", "scales"), [(128, 1), (200, 2), (256, 2), (100, 1)])
def test_the_formula_of_eight_bit_galore(rank: int, scales: int) -> None:
    """A basis, and of either moment a byte an entry and four a block: `4 min r + 2 max (r + 4 ceil(r / 128))`."""
    weight = nn.Parameter(randn(300, 520))
    optimizer = GaLore([weight], rank=rank, state_dtype="8bit")
    feed(optimizer, weight, [randn(300, 520)])
    formula = 4 * 300 * rank + 2 * 520 * (rank + 4 * scales)
    assert optimizer.summary().state_bytes == formula
    kept = ("basis", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    assert sum(optimizer.state[weight][key].nbytes for key in kept) == formula


@pytest.mark.parametrize(
    ("shape", "is_coded"),
    [((4096,), False), ((63, 65), False), ((64, 64), True), ((1024, 15), False), ((1024, 16), True)],
)
def test_small_tensors_and_short_rows_stay_in_fp32(shape: tuple[int, ...], is_coded: bool) -> None:
    weight = nn.Parameter(randn(*shape))
    optimizer = AdamW8bit([weight])
    feed(optimizer, weight, [randn(*shape)])
    assert (optimizer.state[weight]["exp_avg"].dtype == torch.int8) == is_coded


@every
@pytest.mark.parametrize("rounding", ROUNDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, rounding: str) -> None:
    options: dict[str, Any] = {"state_dtype": "8bit", "rounding": rounding}
    optimizer, params = train(name, steps=6, dtype=torch.bfloat16, **options)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Parameter]):
        saved = torch.load(file, weights_only=True)
    twins = [nn.Parameter(torch.as_tensor(param).detach().clone()) for param in saved["params"]]
    twin = OPTIMIZERS[name](twins, lr=1e-2, **options)
    twin.load_state_dict(saved["optimizer"])
    copied, copies = copy.deepcopy((optimizer, params))
    for seed in range(6, 12):
        for one, of in ((optimizer, params), (twin, twins), (copied, copies)):
            step(one, of, seed)
    for param, *others in zip(params, twins, copies, strict=True):
        for other in others:
            assert torch.equal(param, other)
    for param, other in zip(params, twins, strict=True):
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, twin.state[other][key]), key
            assert value.dtype == twin.state[other][key].dtype


@pytest.mark.parametrize(("saved", "ours"), [("8bit", "float32"), ("float32", "8bit"), ("8bit", "bnb8")])
def test_a_checkpoint_of_other_bits_is_refused_by_both_names(saved: str, ours: str) -> None:
    optimizer, _ = train("galore", steps=1, state_dtype=saved)
    reader = OPTIMIZERS["galore"](parameters(), state_dtype=ours)
    with pytest.raises(ValueError, match=rf"state_dtype='{saved}', this optimizer state_dtype='{ours}'"):
        reader.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("state_dtype", "left"), [("float32", 0.905), ("bfloat16", 0.905), ("8bit", 0.905)])
@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_a_second_moment_decays_on_bf16_weights(name: str, state_dtype: str, left: float) -> None:
    """100 gradients of zero take it to 0.999^100; in the neighbours' bf16 it stays where it was."""
    weight = nn.Parameter(randn(160, 96).bfloat16())
    rank: dict[str, Any] = {} if name == "adamw" else {"rank": RANK, "update_proj_gap": 1000}
    optimizer = (AdamW8bit if name == "adamw" else GaLore)([weight], state_dtype=state_dtype, **rank)
    feed(optimizer, weight, [randn(160, 96)])
    before = codec.load(optimizer.state[weight], "exp_avg_sq", state_dtype, torch.float32).sum()
    feed(optimizer, weight, [torch.zeros(160, 96)] * 100)
    after = codec.load(optimizer.state[weight], "exp_avg_sq", state_dtype, torch.float32).sum()
    assert (after / before).item() == pytest.approx(left, rel=0.01)


def test_moments_in_the_dtype_of_a_bf16_parameter_do_not_decay() -> None:
    """What `compat="official"` reproduces, and why it is not the default."""
    weight = nn.Parameter(randn(160, 96).bfloat16())
    optimizer = GaLore([weight], rank=RANK, update_proj_gap=1000, compat="official")
    feed(optimizer, weight, [randn(160, 96)])
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    feed(optimizer, weight, [torch.zeros(160, 96)] * 100)
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], before)


@every
def test_small_steps_reach_bf16_weights_unless_they_are_rounded_to_nearest(name: str) -> None:
    def run(rounding: str, seed: int = 0) -> Tensor:
        dtype = torch.float32 if rounding == "fp32" else torch.bfloat16
        weight = nn.Parameter(torch.ones(160, 96, dtype=dtype))
        options: dict[str, Any] = {} if rounding == "fp32" else {"rounding": rounding}
        optimizer = OPTIMIZERS[name]([weight], lr=2e-5, weight_decay=0.0, seed=seed, **options)
        feed(optimizer, weight, [randn(160, 96, seed=7)] * 12)
        return optimizer.full_precision(weight) - 1.0

    moved = {rounding: run(rounding) for rounding in ("nearest", "compensated", "compensated8", "fp32")}
    # A gradient that repeats moves the weight by about lr a step, a hundredth of what bf16 resolves at 1; a bf16 basis
    # turns the direction a little.
    truth = moved["compensated"]
    assert truth.norm().item() == pytest.approx(moved["fp32"].norm().item(), rel=0.3)
    assert moved["nearest"].norm() < 0.6 * truth.norm()
    assert share(moved["compensated8"], truth) == pytest.approx(1.0, abs=0.02)
    shares = [share(run("stochastic", seed), run("compensated", seed)) for seed in range(8)]
    assert sum(shares) / 8 == pytest.approx(1.0, abs=0.15)  # right in the mean


def share(moved: Tensor, truth: Tensor) -> float:
    """How far a movement goes along another one, by unit of it."""
    return float((moved * truth).sum() / truth.norm() ** 2)


def test_a_compensated_weight_is_the_fp32_one() -> None:
    exact, params = nn.Parameter(randn(96, 64).bfloat16().float()), nn.Parameter(randn(96, 64).bfloat16())
    one = AdamW8bit([exact], lr=1e-3, state_dtype="float32")
    other = AdamW8bit([params], lr=1e-3, state_dtype="float32", rounding="compensated")
    for seed in range(20):
        grad = randn(96, 64, seed=seed).bfloat16()
        exact.grad, params.grad = grad.float(), grad
        one.step()
        other.step()
    torch.testing.assert_close(other.full_precision(params), exact.detach(), rtol=1e-6, atol=1e-8)
    assert torch.equal(other.full_precision(params).bfloat16(), params)


def test_wide_weights_have_nothing_to_round_and_fp16_is_refused() -> None:
    one, other = (train("galore", rounding=rounding)[1] for rounding in ("nearest", "compensated"))
    assert all(map(torch.equal, one, other))
    with pytest.raises(TypeError, match=r"bf16 weights, got torch\.float16"):
        GaLore([nn.Parameter(randn(8, 8).half())], rank=2, rounding="stochastic")
    with pytest.raises(ValueError, match="Invalid rounding: 'up'; choose one of 'nearest', 'stochastic'"):
        GaLore([nn.Parameter(randn(8, 8))], rank=2, rounding="up")


def test_rounding_does_not_touch_global_random_state_and_is_the_same_in_every_process() -> None:
    before = torch.get_rng_state()
    runs = [
        train("fira", dtype=torch.bfloat16, state_dtype="8bit", rounding="stochastic", seed=s)[1] for s in (3, 3, 4)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not all(map(torch.equal, runs[0], runs[2]))


def test_corrections_outlive_the_state_of_their_block() -> None:
    layers = [(f"layers.{i}.weight", nn.Parameter(torch.ones(80, 64, dtype=torch.bfloat16))) for i in range(2)]
    optimizer = BAdam(layers, lr=1e-5, update_proj_gap=2, block_order="ascending", rounding="compensated")
    first = layers[0][1]
    for index in range(4):
        for _, param in layers:
            param.grad = randn(80, 64, seed=index).bfloat16()
        optimizer.step()
        if index == 1:
            moved = optimizer.full_precision(first)
    assert "exp_avg" not in optimizer.state[first]
    assert torch.equal(optimizer.full_precision(first), moved)
    assert (moved != 1.0).any()


def test_the_authors_eight_bit_class_is_a_preset() -> None:
    """Eps after bias correction, decay after the update, bitsandbytes' codes, and small projected matrices move."""
    weight = nn.Parameter(randn(24, 16))
    start = weight.detach().clone()
    optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": 4, "update_proj_gap": 10, "scale": 0.25}], lr=1e-2)
    feed(optimizer, weight, [randn(24, 16, seed=1)])
    group = optimizer.param_groups[0]
    assert (group["state_dtype"], group["eps"], group["weight_decay"]) == ("bnb8", 1e-8, 1e-2)
    basis = torch.linalg.svd(randn(24, 16, seed=1), full_matrices=False).Vh[:4]
    low = randn(24, 16, seed=1) @ basis.T
    expected = (start - 1e-2 * 0.25 * (low / (low.abs() + 1e-8)) @ basis) * (1 - 1e-2 * 1e-2)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_bad_gradient_leaves_coded_moments_alone() -> None:
    for name in ("adamw", "galore", "fira", "frugal-columns"):
        optimizer, params = train(name, steps=3, state_dtype="8bit")
        for value in (torch.nan, torch.inf, 1e30):
            for param in params[:3]:
                param.grad = randn(*param.shape)
                param.grad.view(-1)[5] = value
            params[3].grad = None
            optimizer.step()
        assert all(param.isfinite().all() for param in params), name
        step(optimizer, params, 5)
        assert all(param.isfinite().all() for param in params), name


def test_coded_weights_of_any_stride_and_maximize() -> None:
    for options in ({}, {"rounding": "stochastic"}, {"maximize": True}):
        results = []
        for strided in (False, True):
            base = randn(96, 64).bfloat16()
            weight = nn.Parameter(base.T.contiguous().T if strided else base)
            optimizer = AdamW8bit([weight], lr=1e-2, **options)
            feed(optimizer, weight, [randn(96, 64, seed=s) for s in range(3)])
            results.append(weight.detach().clone())
        assert torch.equal(*results)


@pytest.mark.parametrize(("dtype", "overlap", "skew"), [("int8", 0.9999, 0.015), ("int4", 0.975, 0.25)])
@pytest.mark.parametrize("shape", [(256, 64), (130, 33), (5, 5), (64, 1)])
def test_a_basis_in_few_bits_keeps_lengths_and_nearly_its_span(
    dtype: str, overlap: float, skew: float, shape: tuple[int, int]
) -> None:
    basis = torch.linalg.qr(randn(*shape)).Q
    described = compact.specs("basis", shape, dtype, torch.device("cpu"))
    codes, scale = (torch.zeros(spec.shape, dtype=spec.dtype) for spec in described.values())
    compact.write([codes], [scale], basis[None])
    found = compact.read(codes, scale, torch.float32)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(shape[1]), rtol=1e-5, atol=0)
    assert (basis.T @ torch.linalg.qr(found).Q).square().sum() / shape[1] > overlap
    assert torch.linalg.matrix_norm(found.T @ found - torch.eye(shape[1]), 2) < skew
    again = codes.clone()
    compact.write([again], [scale.clone()], found[None])
    assert torch.equal(again, codes)


def test_the_size_of_tiles_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 18, 1 << 10):
        monkeypatch.setattr(tiles, "CHUNK", chunk)
        optimizer, params = train("adamw", steps=3, dtype=torch.bfloat16, rounding="stochastic")
        found.append((params, [optimizer.state[param]["exp_avg_sq"] for param in params]))
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["galore", "galore-full", "fira", "frugal-svd", "galore_plus"])
def test_optimizers_keep_bases_in_few_bits(name: str, dtype: str) -> None:
    options: dict[str, Any] = {"gamma": None} if name == "fira" else {}
    steps = GAP - 1  # within one interval: the next basis of noise is another one after any change
    exact = movement(train(name, steps, **options)[1])
    optimizer, params = train(name, steps, basis_dtype=dtype, **options)
    # Two-sided, R is diagonal where the bases are found: Adam makes steps of one out of the errors beside.
    if name != "galore-full":
        assert (movement(params) - exact).norm() < {"int8": 0.1, "int4": 0.5}[dtype] * exact.norm()
    held = optimizer.state[params[0]]
    assert held["basis"].dtype == {"int8": torch.int8, "int4": torch.uint8}[dtype]
    measured = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if not is_counter(k))
    assert measured == optimizer.summary().state_bytes
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    twin = OPTIMIZERS[name](twins, lr=1e-2, basis_dtype=dtype, **options)
    twin.load_state_dict(optimizer.state_dict())
    for one, of in ((optimizer, params), (twin, twins)):
        step(one, of, 50)
    assert all(map(torch.equal, params, twins))


def test_bases_in_few_bits_where_they_mean_nothing_are_refused() -> None:
    weight = nn.Parameter(randn(12, 8))
    with pytest.raises(ValueError, match="basis_dtype='int8' is for one dense basis a matrix, projector='columns'"):
        Frugal([weight], density=0.5, basis_dtype="int8")
    with pytest.raises(ValueError, match="basis_dtype='int4' keeps a basis only nearly orthonormal"):
        Fira([weight], rank=2, basis_dtype="int4")
