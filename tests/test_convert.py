"""Checkpoints at another rank or in other bits: converted, or refused with both sides named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Fira,
    Flora,
    Frugal,
    GaLore,
    OnlineSubspaceDescent,
    convert_state,
)
from lowmem.optim.core import codec
from lowmem.optim.core.basis import DENSE
from torch import Tensor, nn

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
        (GaLore, {"rank": 8, "rule": "lion"}, {"rank": 8}, "has rule='lion', this optimizer rule='adamw': only rank"),
        (GaLore, {"rank": 8, "proj_type": "left"}, {"rank": 8}, "has proj_type='left', this optimizer proj_type='std'"),
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
