"""APOLLO's limits and invariants (arXiv 2412.05270), and bases that are Gaussian and not orthonormal."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.optim import Apollo, APOLLOAdamW, Fira, Frugal, GaLore, LowRank, convert_state, param_groups
from torch import Tensor
from torch.nn import Parameter

from tests.cases import gradients
from tests.helpers import feed, randn
from tests.reference.subspace import orthonormality_error

SHAPES = {"tall": (24, 15), "wide": (13, 28), "conv": (10, 4, 3, 3)}
CHANNEL = {"residual": "channel", "projector": "gaussian", "carry": "keep"}


def build(
    shape: tuple[int, ...] = (24, 16), dtype: torch.dtype = torch.float64, cls: Any = Apollo, **options: Any
) -> tuple[Any, Parameter]:
    param = Parameter(randn(*shape, dtype=dtype))
    defaults = {"lr": 1e-2, "rank": 4, "update_proj_gap": 5, "weight_decay": 0.0}
    return cls([param], **{**defaults, **options}), param


def grads(steps: int, shape: tuple[int, ...] = (24, 16)) -> list[Tensor]:
    return [randn(*shape, seed=step) for step in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["row", "matrix"])
@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_it_is_the_rescaled_gradient_of_lowrank_with_a_root_of_the_scale(shape: str, mode: str, scale: float) -> None:
    size = SHAPES[shape]
    one, ours = build(size, scale=scale, scale_mode=mode, weight_decay=0.1)
    other, theirs = build(size, cls=LowRank, scale=scale**0.5, scale_mode=mode, weight_decay=0.1, **CHANNEL)
    feed(one, ours, gradients(size, 13))
    feed(other, theirs, gradients(size, 13))
    assert torch.equal(ours, theirs)


def test_the_scale_is_a_square_of_the_learning_rate() -> None:
    one, a = build(scale=16.0, lr=1e-2)
    two, b = build(scale=1.0, lr=4e-2)
    feed(one, a, grads(8))
    feed(two, b, grads(8))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["row", "matrix"])
def test_updates_are_multiples_of_the_gradient(mode: str) -> None:
    optimizer, param = build(scale_mode=mode)
    for grad in grads(7):
        before, grad = param.detach().clone(), grad.double()
        feed(optimizer, param, [grad])
        moved, dims = before - param.detach(), (1,) if mode == "row" else (0, 1)
        factors = (moved * grad).sum(dims, keepdim=True) / grad.square().sum(dims, keepdim=True)
        assert factors.min() > 0
        assert (moved - factors * grad).abs().max() < 1e-14


def test_rows_are_magnified_as_the_rule_magnifies_their_image() -> None:
    """Without memory Adam's direction is a sign, |N_i| = sqrt(r)."""
    optimizer, param = build(gamma=None, betas=(0.0, 0.0), eps=0.0)
    before, grad = param.detach().clone(), randn(24, 16, seed=3, dtype=torch.float64)
    feed(optimizer, param, [grad])
    image = grad @ optimizer.state[param]["basis"]
    expected = 1e-2 * 4**0.5 * grad.norm(dim=1) / image.norm(dim=1)
    torch.testing.assert_close((before - param.detach()).norm(dim=1), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_bases_are_gaussian_and_new_at_every_refresh(shape: tuple[int, int]) -> None:
    optimizer, param = build(shape, rank=25, update_proj_gap=2)
    seen = []
    for grad in grads(5, shape):
        feed(optimizer, param, [grad])
        seen.append(optimizer.state[param]["basis"].clone())
    assert seen[0].shape == (200, 25)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    for basis in (seen[0], seen[2], seen[4]):
        assert abs(basis.mean()) < 4 * 0.2 / 5000**0.5
        assert basis.var() == pytest.approx(1 / 25, rel=0.1)
        assert ((5 * basis).abs() < 1).double().mean() == pytest.approx(0.6827, abs=0.03)
        assert orthonormality_error(basis) > 1
    assert max(abs((a * b).mean()) for a, b in itertools.combinations(seen[::2], 2)) < 4 * 0.04 / 5000**0.5


def test_both_bases_of_a_full_projection_are_gaussian() -> None:
    optimizer, param = build((80, 60), rank=16, proj_type="full", scale_mode="matrix")
    feed(optimizer, param, [randn(80, 60)])
    right, left = (optimizer.state[param][name] for name in ("basis", "basis_left"))
    assert (right.shape, left.shape) == ((60, 16), (80, 16))
    assert not torch.equal(right, left[:60])
    assert right.var() == pytest.approx(1 / 16, rel=0.15)
    assert left.var() == pytest.approx(1 / 16, rel=0.15)


def test_a_gradient_of_zero_makes_a_gaussian_basis_too() -> None:
    optimizer, param = build(dtype=torch.float32)
    before = param.detach().clone()
    feed(optimizer, param, [torch.zeros(24, 16)])
    assert torch.equal(param, before)
    assert optimizer.skipped_refreshes() == 1
    assert optimizer.state[param]["basis"].var() == pytest.approx(0.25, rel=0.5)
    feed(optimizer, param, [randn(24, 16)])
    assert not torch.equal(param, before)


@pytest.mark.parametrize("mode", ["row", "matrix"])
def test_the_norm_of_the_update_grows_by_gamma_at_most(mode: str) -> None:
    optimizer, param = build(scale_mode=mode)
    scales = 10 ** (6 * torch.rand(60, generator=torch.Generator().manual_seed(0)) - 3)
    norms = []
    for scale, grad in zip(scales, grads(60), strict=True):
        before = param.detach().clone()
        feed(optimizer, param, [float(scale) * grad])
        norms.append(float((param.detach() - before).norm()) / 1e-2)
    assert all(after <= 1.01 * (before + 1e-8) * (1 + 1e-6) for before, after in itertools.pairwise(norms))
    assert any(after < 0.9 * before for before, after in itertools.pairwise(norms))


def test_a_zero_gradient_locks_only_the_official_limiter() -> None:
    lengths = {}
    for compat in (None, "official"):
        optimizer, param = build(compat=compat)
        feed(optimizer, param, [torch.zeros(24, 16)])
        before = param.detach().clone()
        feed(optimizer, param, grads(20))
        lengths[compat] = float((param.detach() - before).norm())
    assert lengths["official"] < 1e-6 < 1e-2 < lengths[None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_bad_gradient_poisons_nothing(bad: float, at: int) -> None:
    optimizer, param = build(dtype=torch.float32)
    given = grads(9)
    given[at][3, 5] = bad
    feed(optimizer, param, given)
    assert param.isfinite().all()
    assert all(held.isfinite().all() for held in optimizer.state[param].values())


# ------------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mini", [False, True])
def test_state_is_a_basis_two_moments_and_a_number(shape: tuple[int, ...], dtype: torch.dtype, mini: bool) -> None:
    param = Parameter(randn(*shape, dtype=dtype))
    optimizer = Apollo.mini([param]) if mini else Apollo([param], rank=4)
    rank, long = 1 if mini else 4, 40
    expected = 24 * rank * dtype.itemsize + 4 * (2 * long * rank + 1)
    assert optimizer.summary().state_bytes == expected
    feed(optimizer, param, [randn(*shape)])
    held = optimizer.state[param]
    kept = ("basis", "exp_avg", "exp_avg_sq", "limit_norm")
    assert sum(held[name].untyped_storage().nbytes() for name in kept) == expected
    counters = {"step", "refreshes", "until_refresh", "skipped_refreshes"}
    assert held.keys() == {*kept, *counters}


def test_mini_is_rank_one_by_matrix_at_scale_128() -> None:
    mini, ours = build(cls=Apollo.mini, rank=1)
    same, theirs = build(rank=1, scale=128.0, scale_mode="matrix")
    feed(mini, ours, grads(7))
    feed(same, theirs, grads(7))
    assert torch.equal(ours, theirs)
    assert Apollo.mini([Parameter(randn(9, 7))]).param_groups[0]["rank"] == 1
    assert Apollo.mini([Parameter(randn(9, 7))], scale=64.0).param_groups[0]["scale"] == 64.0


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"state_dtype": "bnb8"}, {"rounding": "compensated"}])
def test_resume_in_the_middle_of_an_interval_is_bit_exact(options: dict[str, Any], tmp_path: Path) -> None:
    shape = (272, 64)
    options = {"rank": 32, **options}
    whole, a = build(shape, torch.bfloat16, **options)
    feed(whole, a, grads(13, shape))
    first, b = build(shape, torch.bfloat16, **options)
    feed(first, b, grads(7, shape))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Apollo([b], lr=1e-2, update_proj_gap=5, weight_decay=0.0, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    feed(second, b, grads(13, shape)[7:])
    assert torch.equal(a, b)
    if "state_dtype" in options:
        assert whole.state[a]["exp_avg"].element_size() == whole.state[a]["exp_avg_sq"].element_size() == 1


@pytest.mark.parametrize("state_dtype", ["8bit", "bnb8", "bfloat16"])
def test_moments_in_few_bits_stay_close(state_dtype: str) -> None:
    shape, moved = (272, 64), {}
    for kind in ("float32", state_dtype):
        optimizer, param = build(shape, torch.float32, rank=32, state_dtype=kind)
        start = param.detach().clone()
        feed(optimizer, param, grads(12, shape))
        moved[kind] = param.detach() - start
    assert (moved[state_dtype] - moved["float32"]).norm() < 0.02 * moved["float32"].norm()


def test_ranks_of_gaussian_bases_are_not_converted() -> None:
    """Their length depends on the rank: cut, they would shorten R and lengthen the update."""
    optimizer, param = build()
    feed(optimizer, param, grads(3))
    with pytest.raises(ValueError, match="only ranks of one dense basis can be converted"):
        convert_state(optimizer.state_dict(), build(rank=2)[0])
    coded = build(state_dtype="8bit")[0]
    coded.load_state_dict(convert_state(optimizer.state_dict(), coded))


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Apollo, {"gamma": 0.9}, "Invalid gamma"),
        (Apollo, {"scale_mode": "tensor"}, "Invalid scale_mode"),
        (Apollo, {"scale": 0.0}, "Invalid scale"),
        (Apollo, {"proj_type": "full"}, 'pass scale_mode="matrix"'),
        (Apollo, {"rule": "adafactor"}, "choose adamw, rmsprop"),
        (Apollo, {"carry": "rotate"}, "pass carry='keep' or carry='reset'"),
        (Apollo, {"carry": None}, "pass carry='keep' or carry='reset'"),
        (Apollo, {"lazy": 0.5}, "lazy=0.5 compares orthonormal bases.*drop the option"),
        (Apollo, {"basis_dtype": "int8"}, "basis_dtype='int8' is for one dense basis"),
        (GaLore, {"projector": "gaussian"}, "Apollo.params, rank=256.*projector='random'"),
        (Fira, {"projector": "gaussian"}, "it is for the gradient itself"),
        (Frugal, {"projector": "gaussian", "rank": None}, "it is for the gradient itself"),
        (LowRank, {"projector": "gaussian"}, "residual='channel', carry='keep'"),
        (LowRank, {**CHANNEL, "residual": "norm"}, "residual='channel', carry='keep'"),
        (LowRank, {**CHANNEL, "residual": "signsgd"}, "residual='channel', carry='keep'"),
        (LowRank, {**CHANNEL, "carry": None}, "pass carry='keep' or carry='reset'"),
        (APOLLOAdamW, {"proj": "sketch"}, "Invalid proj: 'sketch'; choose one of 'random', 'svd'"),
        (APOLLOAdamW, {"scale_type": "row"}, "Invalid scale_type: 'row'; choose one of 'channel', 'tensor'"),
        (APOLLOAdamW, {"proj": "svd", "projector": "svd"}, "'proj' and 'projector' are two names of one option"),
        (APOLLOAdamW, {"scale_front": True}, "scale_front=True is not offered"),
    ],
)
def test_what_has_no_meaning_is_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(cls=cls, **options)


def test_groups_that_turn_to_a_gaussian_basis_are_validated_in_the_next_step() -> None:
    optimizer, param = build(cls=GaLore)
    feed(optimizer, param, grads(1))
    optimizer.param_groups[0]["projector"] = "gaussian"
    with pytest.raises(ValueError, match="is not orthonormal"):
        feed(optimizer, param, grads(1))


@pytest.mark.parametrize("cls", [Apollo, APOLLOAdamW])
def test_the_neighbours_groups_are_taken(cls: Any) -> None:
    named = {"rank": 4, "update_proj_gap": 5, "scale": 0.5, "proj_type": "std"}
    groups = [
        {"params": [Parameter(randn(7))]},
        {"params": [Parameter(randn(24, 16))], **named, "proj": "random", "scale_type": "channel"},
        {"params": [Parameter(randn(24, 16))], **named, "proj": "svd", "scale_type": "tensor", "scale_front": False},
        {"params": [Parameter(randn(16, 24))], **named, "disable_nl": True},
    ]
    optimizer = cls(groups, lr=1e-2)
    told = [[group[name] for name in ("projector", "scale_mode", "gamma")] for group in optimizer.param_groups[1:]]
    assert told == [["gaussian", "row", 1.01], ["svd", "matrix", 1.01], ["gaussian", "row", None]]
    assert [row.side for row in optimizer.summary()] == ["plain", "right", "right", "left"]
    assert not {"proj", "scale_type", "scale_front", "disable_nl"} & optimizer.param_groups[2].keys()


def test_the_neighbours_class_has_the_order_described_for_it() -> None:
    options = {"eps": 1e-6, "weight_decay": 0.1, "scale": 4.0}
    one, ours = build(cls=APOLLOAdamW, scale_type="tensor", **options)
    other, theirs = build(compat="official", scale_mode="matrix", **options)
    feed(one, ours, grads(8))
    feed(other, theirs, grads(8))
    assert torch.equal(ours, theirs)
    plain = Parameter(randn(5, dtype=torch.float64))
    assert APOLLOAdamW([plain, Parameter(randn(9, 7))]).summary().projected == 0  # no group names a rank


@pytest.mark.parametrize("build_", [Apollo, Apollo.mini])
def test_it_trains_a_model(build_: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32), torch.nn.Tanh())
    value, target = randn(128, 32, seed=1), randn(128, 32, seed=2).tanh()
    optimizer = build_(param_groups(model, rank=1 if build_ == Apollo.mini else 8, update_proj_gap=20), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(value) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
