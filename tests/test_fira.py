"""Fira's limits and invariants (arXiv 2410.01623)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lowmem.optim import Fira, FiraAdamW, GaLore
from torch import Tensor
from torch.nn import Parameter

from tests.helpers import feed, randn


def build(
    shape: tuple[int, ...] = (24, 16), dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Fira, Parameter]:
    param = Parameter(randn(*shape, dtype=dtype))
    defaults = {"lr": 1e-2, "rank": 4, "update_proj_gap": 5, "weight_decay": 0.0}
    return Fira([param], **{**defaults, **options}), param


def residual_norms(optimizer: Fira, param: Parameter, grads: list[Tensor]) -> list[float]:
    norms = []
    for grad in grads:
        feed(optimizer, param, [grad])
        norms.append(float(optimizer.state[param]["limit_norm"]))
    return norms


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_gradient_inside_the_subspace_has_no_residual(shape: tuple[int, int]) -> None:
    grads = [randn(shape[0], 3, seed=1) @ randn(3, shape[1], seed=2) * (1 + step) for step in range(4)]
    fira, ours = build(shape)
    galore = GaLore([theirs := Parameter(randn(*shape, dtype=torch.float64))], lr=1e-2, rank=4, weight_decay=0.0)
    feed(fira, ours, grads)
    feed(galore, theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["row", "matrix"])
def test_the_exact_residual_is_orthogonal_to_the_basis(mode: str) -> None:
    fira, ours = build(scale_mode=mode, gamma=None)
    galore = GaLore([theirs := Parameter(ours.detach().clone())], lr=1e-2, rank=4, weight_decay=0.0, update_proj_gap=5)
    grads = [randn(24, 16, seed=step) for step in range(3)]
    feed(fira, ours, grads)
    feed(galore, theirs, grads)
    residual = ours - theirs  # one basis in all three steps, the same for both
    assert residual.norm() > 1e-3
    assert (residual @ fira.state[ours]["basis"]).norm() < 1e-12


def test_scale_is_a_factor_of_the_learning_rate_in_exact_mode() -> None:
    grads = [randn(24, 16, seed=step) for step in range(8)]
    one, a = build(scale=0.25, lr=1e-2)
    two, b = build(scale=1.0, lr=2.5e-3)
    feed(one, a, grads)
    feed(two, b, grads)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_exact_and_official_residuals_agree_at_scale_one() -> None:
    grads = [randn(24, 16, seed=step) for step in range(8)]
    one, a = build(scale=1.0, residual="exact")
    two, b = build(scale=1.0, residual="official")
    feed(one, a, grads)
    feed(two, b, grads)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_residual_grows_by_gamma_at_most(dtype: torch.dtype) -> None:
    optimizer, param = build(dtype=dtype)
    scales = 10 ** (6 * torch.rand(60, generator=torch.Generator().manual_seed(0)) - 3)
    norms = residual_norms(optimizer, param, [float(c) * randn(24, 16, seed=i) for i, c in enumerate(scales)])
    for before, after in itertools.pairwise(norms):
        assert after <= 1.01 * (before + 1e-8) * (1 + 1e-6)
    assert any(after < 0.9 * before for before, after in itertools.pairwise(norms))


def test_a_zero_gradient_does_not_lock_the_limiter() -> None:
    free, a = build(gamma=None)
    limited, b = build()
    grads = [torch.zeros(24, 16), randn(24, 16, seed=1)]
    feed(free, a, grads)
    feed(limited, b, grads)
    torch.testing.assert_close(a, b)


def test_the_official_limiter_stays_locked() -> None:
    optimizer, param = build(compat="official", projector="svd", scale=1.0)
    norms = residual_norms(optimizer, param, [torch.zeros(24, 16), *(randn(24, 16, seed=i) for i in range(20))])
    assert max(norms) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_bad_gradient_poisons_nothing(bad: float, at: int) -> None:
    optimizer, param = build(dtype=torch.float32)
    grads = [randn(24, 16, seed=step) for step in range(9)]
    grads[at][3, 5] = bad
    feed(optimizer, param, grads)
    assert param.isfinite().all()
    assert all(held.isfinite().all() for held in optimizer.state[param].values())


def test_trajectories_do_not_see_the_scale_of_the_gradient() -> None:
    grads = [randn(24, 16, seed=step) for step in range(8)]
    one, a = build(eps=0.0)
    two, b = build(eps=0.0)
    feed(one, a, grads)
    feed(two, b, [100 * grad for grad in grads])
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_costs_one_number_more_than_galore(dtype: torch.dtype) -> None:
    optimizer, param = build((40, 24), dtype)
    feed(optimizer, param, [randn(40, 24)])
    galore = GaLore([Parameter(randn(40, 24, dtype=dtype))], rank=4)
    assert optimizer.summary().state_bytes == galore.summary().state_bytes + 4
    assert optimizer.state[param]["limit_norm"].dtype == torch.float32


def test_resume_in_the_middle_of_an_interval_is_bit_exact(tmp_path: Any) -> None:
    grads = [randn(24, 16, seed=step) for step in range(13)]
    whole, a = build(dtype=torch.float32)
    feed(whole, a, grads)
    first, b = build(dtype=torch.float32)
    feed(first, b, grads[:7])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Fira([b], lr=1e-2, rank=4, update_proj_gap=5, weight_decay=0.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    feed(second, b, grads[7:])
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.9}, "gamma"),
        ({"scale_mode": "tensor"}, "scale_mode"),
        ({"residual": "leaky"}, "residual"),
        ({"proj_type": "full"}, "scale_mode"),
        ({"rule": "adafactor"}, "adafactor"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_the_preset_takes_the_official_groups() -> None:
    param, plain = Parameter(randn(24, 16)), Parameter(randn(7))
    groups = [
        {"params": [plain]},
        {"params": [param], "rank": 4, "update_proj_gap": 5, "alpha": 0.25, "proj_type": "std"},
    ]
    optimizer = FiraAdamW(groups, lr=1e-2)
    assert optimizer.param_groups[1]["scale"] == 0.25
    assert [row.side for row in optimizer.summary()] == ["plain", "right"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_zero_gradient_does_no_harm_in_low_precision(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(randn(16, 12).to(dtype))
    optimizer = Fira([param], lr=1e-2, rank=3)
    for grad in (randn(16, 12, seed=1), randn(16, 12, seed=2), torch.zeros(16, 12), 2e-7 * randn(16, 12, seed=3)):
        param.grad = grad.to(dtype)
        optimizer.step()
        assert param.isfinite().all()
