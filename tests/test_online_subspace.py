"""Online Subspace Descent's limits and invariants (arXiv 2408.12857)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.optim import GaLore, OnlineSubspaceDescent
from lowmem.optim.core.descend import pca_gradient
from torch.nn import Parameter

from tests.helpers import feed, randn
from tests.reference.subspace import best_rank_energy, captured_energy

PROJ_RULES = ("adam", "sgd", "lion", "adafactor")


def build(
    shape: tuple[int, ...] = (24, 16), dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[OnlineSubspaceDescent, Parameter]:
    param = Parameter(randn(*shape, dtype=dtype))
    return OnlineSubspaceDescent([param], **{"lr": 1e-3, "rank": 4, "weight_decay": 0.0, **options}), param


@pytest.mark.parametrize("ortho", [0.0, 0.3])
def test_the_closed_form_is_the_gradient_of_the_loss(ortho: float) -> None:
    matrix, basis = randn(9, 7, dtype=torch.float64), randn(7, 3, seed=1, dtype=torch.float64).requires_grad_()
    unit = matrix / matrix.norm()
    loss = (unit @ basis @ basis.T - unit).square().sum()
    loss = loss + ortho * (basis.T @ basis - torch.eye(3, dtype=torch.float64)).square().sum()
    (expected,) = torch.autograd.grad(loss, basis)
    with torch.no_grad():
        image = unit @ basis
        found = pca_gradient(basis, unit.T @ image, (basis.T @ basis, image.T @ image), ortho)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_first_step_is_that_of_galore(shape: tuple[int, int]) -> None:
    optimizer, ours = build(shape)
    galore = GaLore([theirs := Parameter(ours.detach().clone())], lr=1e-3, rank=4, weight_decay=0.0, scale=1.0)
    feed(optimizer, ours, [randn(*shape, seed=1)])
    feed(galore, theirs, [randn(*shape, seed=1)])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("proj_rule", PROJ_RULES)
def test_the_basis_follows_a_rotating_gradient_and_stays_orthonormal(proj_rule: str) -> None:
    optimizer, param = build((40, 24), proj_rule=proj_rule, proj_ratio=50.0 if proj_rule == "sgd" else 5.0)
    left, first, second = randn(40, 4, seed=1), randn(4, 24, seed=2), randn(4, 24, seed=3)
    optimizer.param_groups[0]["lr"] = 5e-3
    for step in range(300):
        angle = torch.tensor(min(step, 200) / 200 * torch.pi / 2)
        grad = left @ (angle.cos() * first + angle.sin() * second)
        feed(optimizer, param, [grad])
    basis = optimizer.state[param]["basis"]
    assert captured_energy(grad, basis) >= 0.9 * best_rank_energy(grad, 4)
    assert (basis.T @ basis - torch.eye(4)).norm() < 0.5


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("proj_rule", PROJ_RULES)
def test_a_zero_or_bad_gradient_leaves_the_basis(bad: float, proj_rule: str) -> None:
    optimizer, param = build(proj_rule=proj_rule)
    feed(optimizer, param, [randn(24, 16, seed=step) for step in range(3)])
    before = {name: held.clone() for name, held in optimizer.state[param].items() if name.startswith("basis")}
    feed(optimizer, param, [torch.full((24, 16), bad)])
    assert all(torch.equal(optimizer.state[param][name], held) for name, held in before.items())
    feed(optimizer, param, [randn(24, 16, seed=9)])
    assert param.isfinite().all()
    assert all(held.isfinite().all() for name, held in optimizer.state[param].items() if name != "until_refresh")


def test_a_schedule_moves_the_rate_of_the_basis_too() -> None:
    optimizer, param = build(proj_rule="sgd", proj_betas=(0.0, 0.0))
    feed(optimizer, param, [randn(24, 16)])
    start = optimizer.state[param]["basis"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    feed(optimizer, param, [randn(24, 16, seed=1)])
    assert torch.equal(optimizer.state[param]["basis"], start)


@pytest.mark.parametrize(
    ("proj_rule", "extra"), [("adam", 2 * 16 * 4), ("sgd", 0), ("lion", 16 * 4), ("adafactor", 16 + 4)]
)
def test_state_bytes_equal_the_formula(proj_rule: str, extra: int) -> None:
    optimizer, param = build(proj_rule=proj_rule)
    feed(optimizer, param, [randn(24, 16)])
    held = sum(t.numel() * t.element_size() for t in optimizer.state[param].values() if t.ndim)
    assert held == 4 * (16 * 4 + 2 * 24 * 4 + extra)
    assert optimizer.summary().state_bytes == held


def test_bf16_weights_keep_an_fp32_basis() -> None:
    optimizer, param = build(dtype=torch.bfloat16)
    feed(optimizer, param, [randn(24, 16, seed=step) for step in range(3)])
    assert optimizer.state[param]["basis"].dtype == torch.float32


@pytest.mark.parametrize("proj_rule", PROJ_RULES)
def test_resume_is_bit_exact(tmp_path: Path, proj_rule: str) -> None:
    grads = [randn(24, 16, seed=step) for step in range(9)]
    whole, a = build(proj_rule=proj_rule)
    feed(whole, a, grads)
    first, b = build(proj_rule=proj_rule)
    feed(first, b, grads[:5])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = OnlineSubspaceDescent([b], lr=1e-3, rank=4, weight_decay=0.0, proj_rule=proj_rule)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    feed(second, b, grads[5:])
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_rule": "adamw"}, "proj_rule"),
        ({"proj_ratio": -1.0}, "proj_ratio"),
        ({"proj_type": "full"}, "full"),
        ({"carry": "keep"}, "carry"),
        ({"update_proj_gap": 10}, "update_proj_gap"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
