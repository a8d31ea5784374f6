"""Checkpoints at another rank or in other bits: converted, or refused with both sides named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    BAdam,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdamW,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
    convert_state,
)
from lowmem.optim.core import codec
from lowmem.optim.core.basis import DENSE
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers import randn

SHAPES = ((160, 96), (96, 160), (80,))
Build = Callable[..., Any]


def trained(build: Build, steps: int = 4, dtype: torch.dtype = torch.float32, **options: Any):
    params = [nn.Parameter((0.05 * randn(*shape, seed=i)).to(dtype)) for i, shape in enumerate(SHAPES)]
    optimizer = build(params, lr=1e-3, **options)
    for seed in range(steps):
        step(optimizer, params, seed)
    return optimizer, params


def step(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    for index, param in enumerate(params):
        param.grad = randn(*param.shape, seed=50 * seed + index).to(param.dtype)
    optimizer.step()


def twin(params: list[nn.Parameter], build: Build, **options: Any):
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    return build(copies, lr=1e-3, **options), copies


def moment(optimizer: Any, param: Tensor, name: str) -> Tensor:
    held = optimizer.state[param]
    return codec.load(held, name, optimizer.param_groups[0]["state_dtype"], torch.float32)


def test_a_lower_rank_keeps_the_leading_columns() -> None:
    old, params = trained(GaLore, rank=32, update_proj_gap=50)
    new, copies = twin(params, GaLore, rank=12, update_proj_gap=50)
    new.load_state_dict(convert_state(old.state_dict(), new))
    for param, copy in zip(params[:2], copies, strict=False):
        for name in ("basis", "exp_avg", "exp_avg_sq"):
            assert torch.equal(new.state[copy][name], old.state[param][name][:, :12])
        assert new.state[copy]["step"] == 4
    assert torch.equal(new.state[copies[2]]["exp_avg"], old.state[params[2]]["exp_avg"])
    step(new, copies, 9)


@pytest.mark.parametrize(("before", "after"), [(40, 16), (16, 40)])
def test_both_bases_of_a_full_projection_are_converted(before: int, after: int) -> None:
    old, params = trained(GaLore, rank=before, proj_type="full")
    new, copies = twin(params, GaLore, rank=after, proj_type="full")
    new.load_state_dict(convert_state(old.state_dict(), new))
    held = new.state[copies[0]]
    assert held["exp_avg"].shape == (after, after)
    for name in ("basis", "basis_left"):
        kept = min(before, after)
        assert torch.equal(held[name][:, :kept], old.state[params[0]][name][:, :kept])
        torch.testing.assert_close(held[name].T @ held[name], torch.eye(after), atol=1e-5, rtol=0)
    step(new, copies, 9)


@pytest.mark.parametrize("build", [GaLore, Fira, OnlineSubspaceDescent], ids=lambda build: build.__name__)
def test_a_higher_rank_adds_orthonormal_columns_without_momentum(build: Build) -> None:
    old, params = trained(build, rank=12)
    new, copies = twin(params, build, rank=32)
    new.load_state_dict(convert_state(old.state_dict(), new))
    before = old.state[params[0]]["basis"].float()
    held = new.state[copies[0]]
    basis = held["basis"].float()
    assert torch.equal(basis[:, :12], before)
    added = basis[:, 12:]
    torch.testing.assert_close(added.T @ added, torch.eye(20), atol=1e-5, rtol=0)
    span = torch.linalg.qr(before).Q
    assert (span.T @ added).abs().max() < 1e-3 if build is not OnlineSubspaceDescent else 1.0
    assert not held["exp_avg"][:, 12:].any()
    second = held["exp_avg_sq"]
    torch.testing.assert_close(second[:, 12:], second[:, :12].mean(1, keepdim=True).expand(-1, 20))
    assert held["until_refresh"] == (torch.inf if build is OnlineSubspaceDescent else 0)
    start = [copy.detach().clone() for copy in copies]
    step(new, copies, 9)
    for copy, was in zip(copies, start, strict=True):
        assert 0 < (copy - was).abs().max() < 0.02


@pytest.mark.parametrize("build", [AdamW8bit, GaLore, Fira, Frugal, Flora, Adafactor], ids=lambda build: build.__name__)
@pytest.mark.parametrize("before", ["float32", "8bit", "bnb8", "bfloat16"])
@pytest.mark.parametrize("after", ["float32", "8bit", "bnb8", "bfloat16"])
def test_moments_are_decoded_and_coded(build: Build, before: str, after: str) -> None:
    options: dict[str, Any] = {"density": 0.5} if build is Frugal else {"beta1": 0.9} if build is Adafactor else {}
    options |= {"rank": 32} if build in (GaLore, Fira, Flora) else {}
    old, params = trained(build, state_dtype=before, **options)
    new, copies = twin(params, build, state_dtype=after, **options)
    new.load_state_dict(convert_state(old.state_dict(), new))
    tolerance = {"float32": 1e-7, "bfloat16": 2.0**-7, "8bit": 0.02, "bnb8": 0.03}[after] if before != after else 0.0
    for param, copy in zip(params, copies, strict=True):
        for name in {"exp_avg", "exp_avg_sq"} & old.state[param].keys():
            one, other = moment(old, param, name), moment(new, copy, name)
            assert (one - other).abs().max() <= tolerance * one.abs().max()
    step(new, copies, 9)


@pytest.mark.parametrize(("before", "after"), [(None, "int8"), ("int8", None), ("int8", "int4"), ("int4", "int8")])
def test_bases_are_coded_anew(before: str | None, after: str | None) -> None:
    old, params = trained(GaLore, rank=32, basis_dtype=before)
    new, copies = twin(params, GaLore, rank=32, basis_dtype=after)
    new.load_state_dict(convert_state(old.state_dict(), new))
    one, other = (DENSE.read(o.state[p], torch.float32) for o, p in ((old, params[0]), (new, copies[0])))
    assert (one - other).norm() < (0.2 if "int4" in (before, after) else 0.01) * one.norm()


@pytest.mark.parametrize("before", ["nearest", "compensated", "compensated8"])
@pytest.mark.parametrize("after", ["stochastic", "compensated", "compensated8"])
def test_corrections_are_converted_started_or_left_out(before: str, after: str) -> None:
    old, params = trained(GaLore, dtype=torch.bfloat16, rank=32, rounding=before)
    new, copies = twin(params, GaLore, rank=32, rounding=after)
    new.load_state_dict(convert_state(old.state_dict(), new))
    for param, copy in zip(params, copies, strict=True):
        was, now = old.full_precision(param), new.full_precision(copy)
        bits = 2.0 ** -(15 if "compensated" in before and "compensated" in after else 8)
        assert ((was - now).abs() <= was.abs() * bits).all()
    step(new, copies, 9)


def test_the_same_rank_and_bits_are_the_same_state_to_the_bit() -> None:
    old, params = trained(GaLore, rank=32, state_dtype="8bit", rounding="compensated", dtype=torch.bfloat16)
    new, copies = twin(params, GaLore, rank=32, state_dtype="8bit", rounding="compensated")
    new.load_state_dict(convert_state(old.state_dict(), new))
    for seed in range(10, 14):
        step(old, params, seed)
        step(new, copies, seed)
    assert all(torch.equal(one, other) for one, other in zip(params, copies, strict=True))


def test_a_converted_run_stays_near_the_one_that_goes_on() -> None:
    old, params = trained(GaLore, rank=32)
    new, copies = twin(params, GaLore, rank=32, state_dtype="8bit")
    new.load_state_dict(convert_state(old.state_dict(), new))
    start = [param.detach().clone() for param in params]
    for seed in range(10, 20):
        step(old, params, seed)
        step(new, copies, seed)
    for param, copy, was in zip(params, copies, start, strict=True):
        assert (param - copy).norm() < 0.02 * (param - was).norm()


@pytest.mark.parametrize(
    ("build", "saved", "here", "message"),
    [
        (GaLore, {"rank": 8, "rule": "lion"}, {"rank": 8}, "has rule='lion', this optimizer rule='adamw': construct"),
        (GaLore, {"rank": 8, "proj_type": "left"}, {"rank": 8}, "has proj_type='left', this optimizer proj_type='std'"),
        (
            LowRank,
            {"rank": 8, "projector": "columns"},
            {"rank": 8},
            "projector='columns', this optimizer projector='sk",
        ),
        (LowRank, {"rank": 8, "projector": "columns"}, {"rank": 8, "projector": "dct"}, "in another form"),
        (Frugal, {"density": 0.25, "projector": "sketch"}, {"density": 1.0, "projector": "sketch"}, "one dense basis"),
        (GaLore, {"rank": 8}, {"rank": "auto", "energy": 0.5}, "rank='auto' is chosen .* the checkpoint has rank=8"),
        (GaLore, {"rank": None}, {"rank": 8}, "is plain in the checkpoint and projected on its right side at rank 8"),
        (Frugal, {"density": 0.5}, {"density": 0.25}, "at rank 48 in the checkpoint and .* at rank 24 here"),
        (Flora, {"rank": 32}, {"rank": 16}, "at rank 32 in the checkpoint and .* at rank 16 here"),
    ],
)
def test_other_differences_are_refused(build: Build, saved: Any, here: Any, message: str) -> None:
    old, params = trained(build, **saved)
    new, _ = twin(params, build, **here)
    with pytest.raises(ValueError, match=message):
        convert_state(old.state_dict(), new)


def test_loading_another_rank_names_the_way_to_convert_and_another_method_both_methods() -> None:
    old, params = trained(GaLore, rank=32)
    with pytest.raises(ValueError, match=r"rank=32, this optimizer rank=16: .*convert_state\(state_dict, optimizer\)"):
        twin(params, GaLore, rank=16)[0].load_state_dict(old.state_dict())
    fira, params = trained(Fira, rank=32)
    with pytest.raises(ValueError, match=r"saved with \['gamma', 'residual', 'scale_mode'\], has .* this GaLore keeps"):
        twin(params, GaLore, rank=32)[0].load_state_dict(fira.state_dict())


def test_groups_of_other_sizes_and_strangers_are_refused() -> None:
    old, params = trained(GaLore, rank=32)
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters, this optimizer of \[1\]"):
        convert_state(old.state_dict(), GaLore(params[:1], rank=32))
    with pytest.raises(TypeError, match="got a SGD"):
        convert_state(old.state_dict(), torch.optim.SGD(params))  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), [("density", "rank"), ("rank", "density")])
def test_a_rank_and_a_density_are_converted_into_each_other(before: str, after: str) -> None:
    size: dict[str, Any] = {"rank": 16, "density": 0.25}
    param, copy = nn.Parameter(0.05 * randn(96, 64)), nn.Parameter(0.05 * randn(96, 64))
    old = GaLore([{"params": [param], before: size[before]}], lr=1e-3)
    new = GaLore([{"params": [copy], after: size[after] / 2 if after == "density" else 8}], lr=1e-3)
    step(old, [param], 0)
    new.load_state_dict(convert_state(old.state_dict(), new))
    assert new.state[copy]["basis"].shape == (64, 8)
    assert new.param_groups[0].get(before) is None
    step(new, [copy], 1)


def plus(kind: str, rank: int = 16, warmup: int = 2, **options: Any) -> Build:
    def build(params: Any, lr: float) -> Any:
        shared: dict[str, Any] = {"rank": rank, "residual": kind, "residual_density": 0.5, "residual_warmup": warmup}
        return (LowRank if "rule" in options else GaLorePlus)(params, lr=lr, **shared, **options)

    return build


@pytest.mark.parametrize("kind", ["exact", "additive"])
@pytest.mark.parametrize("after", ["8bit", "bfloat16"])
@pytest.mark.parametrize("lowrank", [{}, {"rule": "adamw"}], ids=["GaLorePlus", "LowRank"])
def test_a_chosen_residual_is_kept_and_its_moments_stored_anew(kind: str, after: str, lowrank: dict[str, Any]) -> None:
    old, params = trained(plus(kind, rank=48, **lowrank))
    new, copies = twin(params, plus(kind, rank=48, state_dtype=after, **lowrank))
    new.load_state_dict(convert_state(old.state_dict(), new))
    for param, copy in zip(params[:2], copies, strict=False):
        one, other = old.state[param], new.state[copy]
        assert torch.equal(one["residual_index"], other["residual_index"])
        assert other["exp_avg"].element_size() == (1 if after == "8bit" else 2)
        for name in ("exp_avg", "residual_exp_avg"):
            assert (moment(new, copy, name) - one[name]).abs().max() <= 0.02 * one[name].abs().max()
    step(new, copies, 9)


def whole_moment(held: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """`back(M)` of a weight in its own orientation."""
    left, basis = held.get("basis_left"), held["basis"]
    if left is not None:
        return left @ held["exp_avg"] @ basis.T
    whole = held["exp_avg"] @ basis.T
    return whole if whole.shape == shape and len(basis) == shape[1] else whole.T


@pytest.mark.parametrize("side", ["std", "full"])
@pytest.mark.parametrize(("kind", "warmup"), [("exact", 20), ("additive", 20), ("additive", 2), ("exact", 2)])
@pytest.mark.parametrize("rank", [6, 24])
def test_a_residual_takes_up_what_a_lower_rank_cuts_off(kind: str, warmup: int, side: str, rank: int) -> None:
    """`dM + back(M)` is the first moment of the whole gradient, at S of the additive one too; exact ones stay."""
    old, params = trained(plus(kind, warmup=warmup, proj_type=side))
    new, copies = twin(params, plus(kind, rank, warmup, proj_type=side))
    new.load_state_dict(convert_state(old.state_dict(), new))
    for param, copy in zip(params[:2], copies, strict=False):
        one, other = old.state[param], new.state[copy]
        shape = (param.shape[0], param.shape[1])
        moments = [whole_moment(held, shape) for held in (one, other)]
        assert rank > 16 or (moments[0] - moments[1]).abs().max() > 1e-3
        if warmup > 4:
            sums = [held["residual_avg"] + moment for held, moment in zip((one, other), moments, strict=True)]
        else:
            shares = [0.0 if kind == "exact" else m.take(one["residual_index"].long()) for m in moments]
            sums = [h["residual_exp_avg"] + share for h, share in zip((one, other), shares, strict=True)]
        torch.testing.assert_close(*sums, atol=1e-6, rtol=1e-5)
    step(new, copies, 9)


def named(params: list[nn.Parameter], build: Build, **options: Any) -> Any:
    return build([(f"layers.{i}.weight", param) for i, param in enumerate(params)], lr=1e-3, **options)


@pytest.mark.parametrize("build", [BAdam, Frugal])
def test_active_blocks_are_coded_and_others_have_no_state(build: Build) -> None:
    options: dict[str, Any] = {"density": 0.5, "projector": "blocks"} if build is Frugal else {"rank": 1}
    params = [nn.Parameter(0.05 * randn(96, 64, seed=i)) for i in range(3)]
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    old, new = named(params, build, seed=3, **options), named(copies, build, seed=4, state_dtype="8bit", **options)
    for seed in range(3):
        step(old, params, seed)
    new.load_state_dict(convert_state(old.state_dict(), new))
    active = ["exp_avg" in old.state[param] for param in params]
    assert sum(active) == (2 if build is Frugal else 1)
    for param, copy, runs in zip(params, copies, active, strict=True):
        assert ("exp_avg_scale" in new.state[copy]) is runs
        if runs:
            value = moment(new, copy, "exp_avg")
            assert (value - old.state[param]["exp_avg"]).abs().max() <= 0.02 * value.abs().max()
    step(new, copies, 9)
    assert ["exp_avg" in new.state[copy] for copy in copies] == active


def test_blocks_that_would_become_active_or_frozen_are_refused() -> None:
    params = [nn.Parameter(0.05 * randn(96, 64, seed=i)) for i in range(3)]
    old, new = (Frugal(params, lr=1e-3, rank=rank, projector="blocks") for rank in (2, 1))
    step(old, params, 0)
    with pytest.raises(ValueError, match=r"is projected .* in the checkpoint and without moments here"):
        convert_state(old.state_dict(), new)


@pytest.mark.parametrize("after", [{"rank": "auto", "energy": 0.6}, {"rank": 16}])
def test_chosen_ranks_are_those_of_the_optimizer(after: dict[str, Any]) -> None:
    old, params = trained(GaLore, rank="auto", energy=0.3)
    new, copies = twin(params, GaLore, **after)
    step(new, copies, 30)
    chosen = new.param_groups[0].get("ranks") or [16, 16, 0]
    assert chosen != old.param_groups[0]["ranks"]
    new.load_state_dict(convert_state(old.state_dict(), new))
    assert new.param_groups[0].get("ranks", chosen) == chosen
    assert new.param_groups[0]["energy"] == after.get("energy")
    assert [new.state[copy]["exp_avg"].shape[-1] for copy in copies[:2]] == chosen[:2]
    step(new, copies, 9)


def test_chosen_ranks_are_the_checkpoints_where_the_optimizer_has_none() -> None:
    old, params = trained(GaLore, rank="auto", energy=0.3)
    new, copies = twin(params, GaLore, rank="auto", energy=0.6, state_dtype="8bit")
    new.load_state_dict(convert_state(old.state_dict(), new))
    assert new.param_groups[0]["ranks"] == old.param_groups[0]["ranks"]
    assert torch.equal(new.state[copies[0]]["basis"], old.state[params[0]]["basis"])
    step(new, copies, 9)


def test_a_fixed_rank_becomes_the_chosen_ones() -> None:
    old, params = trained(GaLore, rank=24)
    new, copies = twin(params, GaLore, rank="auto", energy=0.3)
    step(new, copies, 30)
    chosen = list(new.param_groups[0]["ranks"])
    new.load_state_dict(convert_state(old.state_dict(), new))
    assert new.param_groups[0]["ranks"] == chosen
    step(new, copies, 9)


def test_a_checkpoint_without_steps_leaves_ranks_open() -> None:
    params = [nn.Parameter(0.05 * randn(96, 64))]
    new, copies = twin(params, GaLore, rank="auto", energy=0.3)
    step(new, copies, 0)
    new.load_state_dict(convert_state(GaLore(params, lr=1e-3, rank="auto", energy=0.5).state_dict(), new))
    assert new.param_groups[0]["ranks"] is None
    step(new, copies, 1)


@pytest.mark.parametrize(
    ("build", "saved", "here"),
    [
        (GaLore, {"lazy": 0.5}, {}),
        (GaLore, {}, {"lazy": 0.5}),
        (GaLore, {"weight_norm": True}, {}),
        (GaLore, {}, {"weight_norm": True}),
        (LowRank, {"projector": "columns", "carry": "rotate"}, {"projector": "columns", "carry": "reset"}),
        (LowRank, {"projector": "columns", "carry": "reset"}, {"projector": "columns", "carry": "rotate"}),
        (LowRank, {"projector": "columns"}, {"projector": "rows"}),
        (GaLore, {"rule": "sgd", "betas": (0.0, 0.9)}, {"rule": "sgd"}),
        (GaLore, {"rule": "rmsprop"}, {"rule": "rmsprop", "betas": (0.0, 0.9)}),
    ],
)
def test_other_options_are_the_checkpoints_as_in_loading(build: Build, saved: Any, here: Any) -> None:
    old, params = trained(build, rank=32, **saved)
    new, copies = twin(params, build, rank=32, state_dtype="8bit", **here)
    new.load_state_dict(convert_state(old.state_dict(), new))
    for name in saved.keys() | here.keys():
        assert new.param_groups[0][name] == old.param_groups[0][name]
    for param, copy in zip(params, copies, strict=True):
        assert {k for k in new.state[copy] if not k.endswith("_scale")} == old.state[param].keys()
    step(new, copies, 9)


@pytest.mark.parametrize(
    ("missing", "here"),
    [
        ("state_dtype", {"state_dtype": "8bit"}),
        ("basis_dtype", {"basis_dtype": "int8"}),
        ("rounding", {"rounding": "compensated"}),
        ("lazy", {"lazy": 0.5}),
        ("weight_norm", {"rounding": "compensated"}),
    ],
)
def test_an_option_that_an_older_checkpoint_lacks_had_its_value_of_then(missing: str, here: dict[str, Any]) -> None:
    old, params = trained(GaLore, rank=32, dtype=torch.bfloat16)
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group[missing]
    new, copies = twin(params, GaLore, rank=32, **here)
    new.load_state_dict(convert_state(saved, new))
    again, _ = twin(params, GaLore, rank=32, **here)
    again.load_state_dict(convert_state(old.state_dict(), again))
    for one, other in zip(leaves(new.state_dict()["state"]), leaves(again.state_dict()["state"]), strict=True):
        assert torch.equal(one, other)
    step(new, copies, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [AdamW8bit, GaLore])
def test_torch_moments_are_coded(build: Build, dtype: torch.dtype) -> None:
    old, params = trained(torch.optim.AdamW, dtype=dtype)
    new, copies = twin(params, build, state_dtype="8bit", **({"rank": None} if build is GaLore else {}))
    new.load_state_dict(convert_state(old.state_dict(), new))
    for param, copy in zip(params, copies, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            one = old.state[param][name].float()
            assert (one - moment(new, copy, name)).abs().max() <= 0.02 * one.abs().max()
    step(new, copies, 9)
    with pytest.raises(ValueError, match="is plain in the checkpoint"):
        convert_state(old.state_dict(), twin(params, GaLore, rank=8)[0])
    with pytest.raises(ValueError, match="has rule='adamw', this optimizer rule='lion'"):
        convert_state(old.state_dict(), twin(params, GaLore, rank=None, rule="lion")[0])


@pytest.mark.parametrize("rule", ["lion", "rmsprop", "sgd", "adafactor"])
@pytest.mark.parametrize(("before", "after"), [("float32", "8bit"), ("8bit", "float32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_other_rules(rule: str, before: str, after: str, dtype: torch.dtype) -> None:
    old, params = trained(GaLore, rank=32, rule=rule, state_dtype=before, dtype=dtype)
    new, copies = twin(params, GaLore, rank=24, rule=rule, state_dtype=after)
    new.load_state_dict(convert_state(old.state_dict(), new))
    for param, copy in zip(params, copies, strict=True):
        one, other = moment(old, param, "exp_avg" if rule != "rmsprop" else "exp_avg_sq"), new.state[copy]
        value = moment(new, copy, "exp_avg" if rule != "rmsprop" else "exp_avg_sq")
        one = one[:, :24] if one.ndim == 2 else one
        assert (one - value).abs().max() <= 0.02 * one.abs().max()
        assert other["step"] == 4
    step(new, copies, 9)


@pytest.mark.parametrize("build", [AdamW8bit, GaLore, Adafactor, Flora])
def test_vectors_numbers_and_empty_parameters(build: Build) -> None:
    shapes = ((5000,), (), (0,), (0, 7), (3, 0), (8, 600, 2))
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    old = build(params, lr=1e-3, state_dtype="8bit")
    step(old, params, 0)
    for kept in ("float32", "bfloat16", "bnb8"):
        new, copies = twin(params, build, state_dtype=kept)
        new.load_state_dict(convert_state(old.state_dict(), new))
        step(new, copies, 9)


@pytest.mark.parametrize(("before", "after"), [(200, 96), (200, 16), (16, 200)])
def test_official_presets_at_ranks_beyond_the_smaller_side(before: int, after: int) -> None:
    old, params = trained(GaLoreAdamW, rank=before, dtype=torch.bfloat16)
    new, copies = twin(params, GaLoreAdamW, rank=after)
    new.load_state_dict(convert_state(old.state_dict(), new))
    kept, rank = min(before, after, 96), min(after, 96)
    basis = new.state[copies[0]]["basis"]
    assert basis.shape == (96, rank)
    assert torch.equal(basis[:, :kept], old.state[params[0]]["basis"][:, :kept])
    assert (basis.float().T @ basis.float() - torch.eye(rank)).abs().max() < 0.05
    step(new, copies, 9)


def test_several_groups_with_names() -> None:
    params = [nn.Parameter(0.05 * randn(160, 96, seed=i)) for i in range(3)]
    copies = [nn.Parameter(param.detach().clone()) for param in params]

    def build(members: list[nn.Parameter], ranks: tuple[int | None, ...], bits: tuple[str, ...]) -> GaLore:
        parts = zip("abc", members, ranks, bits, strict=True)
        return GaLore([{"params": [(name, p)], "rank": r, "state_dtype": b} for name, p, r, b in parts], lr=1e-3)

    old = build(params, (16, 8, None), ("float32", "8bit", "float32"))
    new = build(copies, (8, 16, None), ("8bit", "float32", "bnb8"))
    step(old, params, 0)
    new.load_state_dict(convert_state(old.state_dict(), new))
    assert [group["rank"] for group in new.param_groups] == [8, 16, None]
    assert [group["param_names"] for group in new.param_groups] == [["a"], ["b"], ["c"]]
    assert [tuple(new.state[copy]["exp_avg"].shape) for copy in copies] == [(160, 8), (160, 16), (160, 96)]
    step(new, copies, 9)


def test_a_subspace_is_not_made_the_whole_matrix() -> None:
    """Density 1 has the weight's own coordinates and no basis; moments in another would be cut to its shape."""
    param = nn.Parameter(0.05 * randn(160, 96))
    old, new = (Frugal([param], lr=1e-3, density=density, projector="sketch") for density in (0.25, 1.0))
    step(old, [param], 0)
    with pytest.raises(ValueError, match=r"at rank 24 in the checkpoint and .* at rank 96 here"):
        convert_state(old.state_dict(), new)


def test_sharded_state_is_refused() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        param = nn.Parameter(distribute_tensor(0.05 * randn(32, 16), mesh, [Shard(0)]))
        plain = nn.Parameter(0.05 * randn(32, 16))
        old, new = GaLore([param], lr=1e-3, rank=4), GaLore([plain], lr=1e-3, rank=4)
        saved = old.state_dict() | {"state": {0: {"exp_avg": param.detach()}}}
        for state, reader in ((new.state_dict(), old), (saved, new)):
            with pytest.raises(NotImplementedError, match="full_state_dict=True"):
                convert_state(state, reader)
    finally:
        dist.destroy_process_group()


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a state dict."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)


@pytest.mark.parametrize("here", [{}, {"rank": 16, "state_dtype": "8bit", "rounding": "compensated8"}])
def test_nothing_of_the_result_is_shared_and_nothing_is_changed(here: dict[str, Any]) -> None:
    old, params = trained(GaLore, dtype=torch.bfloat16, rank=32, rounding="compensated")
    old.param_groups[0]["lr"] = torch.tensor(1e-3)
    new, copies = twin(params, GaLore, **{"rank": 32, "rounding": "compensated", **here})
    step(new, copies, 0)
    saved, kept = old.state_dict(), deepcopy((old.state_dict(), new.state_dict()))
    result = convert_state(saved, new)
    given = {t.data_ptr() for t in (*leaves(saved), *leaves(new.state_dict()))}
    assert not given & {tensor.data_ptr() for tensor in leaves(result) if tensor.numel()}
    for tensor in leaves(result):
        if tensor.is_floating_point():
            tensor.fill_(7.0)
    now = (old.state_dict(), new.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(leaves(kept), leaves(now), strict=True))
    assert [group["rank"] for group in saved["param_groups"]] == [32]
