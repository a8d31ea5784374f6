"""Projectors beside sketch and svd: index, cosine, following and lazy ones, against plain formulas."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import random
from lowmem.optim import GaLore
from lowmem.optim.core.change import Match, Turn
from lowmem.optim.core.linalg import cholesky_qr, orthonormal
from torch import Tensor, nn

from tests.cases import gradients
from tests.helpers import randn
from tests.reference.galore import galore_step
from tests.reference.subspace import orthonormality_error

SHAPES = {"tall": (24, 15), "wide": (13, 28), "square": (16, 16)}
GAP, RANK = 4, 5
few = settings(max_examples=30, deadline=None)


def unit(size: int, chosen: Tensor) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[:, chosen]


def chosen(size: int, count: int, refreshes: int) -> Tensor:
    """What a random choice of the first parameter is at a refresh: an input of the reference, not its result."""
    return random.subset(random.mix(0, 0, refreshes), size, count)


def follow(shape: tuple[int, int], bases: Any, side: str, projector: str, rule: str, carry: str) -> float:
    """The relative error against the dense reference with the same bases, over four refreshes."""
    ours = nn.Parameter(randn(*shape, dtype=torch.float64))
    theirs = ours.detach().clone()
    shared = {"betas": (0.9, 0.99), "weight_decay": 0.1, "scale": 0.25, "rule": rule, "carry": carry}
    optimizer = GaLore([ours], lr=0.01, rank=RANK, update_proj_gap=GAP, projector=projector, **shared)
    state: dict[str, Any] = {}
    made = []

    def basis_fn(matrix: Tensor, *_: Any) -> Any:
        made.append(bases(matrix, len(made)))
        return made[-1]

    for grad in gradients(shape, 13):
        ours.grad = grad.clone()
        optimizer.step()
        flat = (1, -1) if projector == "randk" else shape
        galore_step(
            theirs.view(flat), grad.view(flat), state, lr=0.01, rank=RANK, gap=GAP, proj_type=side,
            basis_fn=basis_fn, **shared,
        )  # fmt: skip
    return float((ours.detach() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("carry", ["keep", "reset"])
@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion", "adafactor"])
@pytest.mark.parametrize("projector", ["columns", "rows", "randk", "dct"])
@pytest.mark.parametrize("shape", SHAPES)
def test_index_bases_follow_the_dense_reference(shape: str, projector: str, rule: str, carry: str) -> None:
    m, n = SHAPES[shape]
    side = {"columns": "right", "rows": "left", "randk": "right"}.get(projector, "right" if m >= n else "left")
    size = {"columns": n, "rows": m, "randk": m * n}.get(projector, min(m, n))

    def bases(matrix: Tensor, refreshes: int) -> Tensor:
        if projector == "dct":
            i, k = torch.arange(size)[:, None], torch.arange(size)[None, :]
            cosine = torch.cos(math.pi * (2 * i.double() + 1) * k / (2 * size)) * math.sqrt(2 / size)
            cosine[:, 0] = math.sqrt(1 / size)
            return cosine[:, (matrix @ cosine).norm(dim=0).topk(RANK).indices.sort().values]
        return unit(size, chosen(size, RANK * (max(m, n) if projector == "randk" else 1), refreshes))

    assert follow((m, n), bases, side, projector, rule, carry) <= 1e-9


@few
@given(data=st.data(), size=st.integers(1, 60))
def test_coordinates_that_stay_keep_their_moments_and_new_ones_start_at_zero(data: st.DataObject, size: int) -> None:
    count = data.draw(st.integers(1, size))
    old, new = (random.subset(data.draw(st.integers(0, 99)), size, count).int() for _ in range(2))
    match, turn = Match.of(new, old), Turn(unit(size, new.long()).T @ unit(size, old.long()))
    moment, col = randn(7, count, dtype=torch.float64), randn(count, seed=1, dtype=torch.float64)
    torch.testing.assert_close(match.first(moment), turn.first(moment), rtol=0, atol=0)
    torch.testing.assert_close(match.second(moment), turn.second(moment), rtol=0, atol=0)
    torch.testing.assert_close(match.cols(col), turn.cols(col), rtol=0, atol=0)
    torch.testing.assert_close(match.overlap().double(), turn.overlap())


@pytest.mark.parametrize("projector", ["columns", "rows", "randk", "dct"])
def test_index_bases_cost_the_integers_they_need(projector: str) -> None:
    param = nn.Parameter(randn(24, 16))
    optimizer = GaLore([param], rank=3, projector=projector, carry="reset")
    param.grad = randn(24, 16, seed=1)
    optimizer.step()
    held = optimizer.state[param]
    entries = {"columns": 24 * 3, "rows": 16 * 3, "randk": 24 * 3, "dct": 24 * 3}[projector]
    indices = 24 * 3 if projector == "randk" else 3
    assert held["basis"].dtype == torch.int32
    assert held["basis"].numel() == indices
    assert optimizer.summary().state_bytes == 4 * indices + 2 * 4 * entries


def test_carried_coordinates_have_an_age_of_their_own() -> None:
    """A column that has just entered makes Adam's first step, whatever the age of the matrix."""
    param = nn.Parameter(torch.zeros(20, 12, dtype=torch.float64))
    optimizer = GaLore([param], lr=1.0, rank=4, projector="columns", update_proj_gap=5, weight_decay=0.0, scale=1.0)
    param.grad = torch.ones(20, 12, dtype=torch.float64)
    for step in range(11):
        before, held = param.detach().clone(), optimizer.state[param]
        old = set(held["basis"].tolist()) if held else set()
        optimizer.step()
        entered = sorted(set(held["basis"].tolist()) - old) if held else []
        moved = (before - param.detach())[:, sorted(set(optimizer.state[param]["basis"].tolist()))]
        torch.testing.assert_close(moved, torch.ones_like(moved), rtol=1e-6, atol=0)
        assert step not in (5, 10) or entered


# --------------------------------------------------------------------------------------------- followers, lazy ones


@pytest.mark.parametrize("side", ["std", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_track_takes_one_power_step_from_its_basis(shape: str, side: str) -> None:
    m, n = SHAPES[shape]
    param = nn.Parameter(randn(m, n, dtype=torch.float64))
    optimizer = GaLore([param], rank=RANK, projector="track", update_proj_gap=1, proj_type=side)
    left = m < n and side == "std"
    for grad in gradients((m, n), 6):
        matrix = grad.T if left else grad
        held = optimizer.state.get(param) or None
        old = None if held is None else held["basis"].clone()
        param.grad = grad.clone()
        optimizer.step()
        new = optimizer.state[param]["basis"]
        assert orthonormality_error(new) < 1e-12
        if old is not None:
            expected = torch.linalg.qr(matrix.T @ (matrix @ old))[0]
            torch.testing.assert_close(new @ new.T, expected @ expected.T)


def test_track_finds_a_fixed_subspace() -> None:
    spread = torch.linalg.qr(randn(30, 30, dtype=torch.float64))[0] * 0.5 ** torch.arange(30, dtype=torch.float64)
    matrix = torch.linalg.qr(randn(40, 30, seed=1, dtype=torch.float64))[0] @ spread.T
    param = nn.Parameter(randn(40, 30, dtype=torch.float64))
    optimizer = GaLore([param], rank=4, projector="track", update_proj_gap=1)
    for _ in range(30):
        param.grad = matrix.clone()
        optimizer.step()
    best = torch.linalg.svd(matrix, full_matrices=False)[2][:4].T
    found = optimizer.state[param]["basis"]
    torch.testing.assert_close(found @ found.T, best @ best.T, rtol=0, atol=1e-8)


def intervals(grads: list[Tensor], **options: Any) -> list[int]:
    """Steps between the refreshes of one matrix."""
    param = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = GaLore([param], rank=3, update_proj_gap=2, **options)
    at, refreshes = [], 0
    for step, grad in enumerate(grads):
        param.grad = grad.clone()
        optimizer.step()
        if optimizer.state[param]["refreshes"] > refreshes:
            refreshes += 1
            at.append(step)
    return [later - earlier for earlier, later in pairwise(at)]


def test_a_lazy_interval_doubles_while_the_subspace_stays_and_falls_back_when_it_turns() -> None:
    same = randn(20, 3) @ randn(3, 12, seed=1)
    other = randn(20, 3, seed=5) @ randn(3, 12, seed=6)
    assert intervals([same] * 150, lazy=0.9) == [2, 4, 8, 16, 32, 32, 32]
    assert intervals([same] * 25 + [other] * 25, lazy=0.9) == [2, 4, 8, 16, 2, 4, 8]
    assert intervals([same] * 9) == [2, 2, 2, 2]
    assert intervals([same] * 9, lazy=1.0, projector="random") == [2, 2, 2, 2]


def test_a_lazy_interval_survives_a_checkpoint() -> None:
    same, params = randn(20, 3) @ randn(3, 12, seed=1), [nn.Parameter(torch.zeros(20, 12)) for _ in range(2)]
    one, other = (GaLore([param], rank=3, update_proj_gap=2, lazy=0.9) for param in params)
    for _ in range(9):
        params[0].grad = same.clone()
        one.step()
    other.load_state_dict(one.state_dict())
    assert other.state[params[1]]["interval"] == one.state[params[0]]["interval"] == 8


def test_staggered_lazy_intervals_are_no_shorter_than_the_gap() -> None:
    params = [nn.Parameter(torch.zeros(20, 12)) for _ in range(4)]
    optimizer = GaLore(params, rank=3, update_proj_gap=20, lazy=0.0, stagger=True)
    for _ in range(100):
        for param in params:
            param.grad = randn(20, 12)
        optimizer.step()
    assert max(int(optimizer.state[param]["refreshes"]) for param in params) <= 4


@pytest.mark.parametrize("projector", ["track", "sketch", "dct", "columns"])
def test_large_half_precision_gradients_stay_finite(projector: str) -> None:
    param = nn.Parameter(torch.zeros(256, 128, dtype=torch.float16))
    optimizer = GaLore([param], lr=1e-3, rank=8, projector=projector, update_proj_gap=1)
    for step in range(4):
        param.grad = (500 + randn(256, 128, seed=step)).half()
        optimizer.step()
        assert param.isfinite().all()
        assert optimizer.state[param]["basis"].isfinite().all()


# --------------------------------------------------------------------------------------------- orthonormalisation

HOSTILE = {
    "power law": lambda m, r: randn(m, r) * torch.arange(1, r + 1) ** -3.0,
    "low rank": lambda m, r: randn(m, max(r // 3, 1)) @ randn(max(r // 3, 1), r, seed=1),
    "few rows": lambda m, r: randn(m, r) * (torch.arange(m) < max(m // 8, 1))[:, None],
    "zero": lambda m, r: torch.zeros(m, r),
    "tiny": lambda m, r: randn(m, r) * 1e-30,
    "huge": lambda m, r: randn(m, r) * 1e30,
    "equal columns": lambda m, r: randn(m, 1).expand(m, r),
}


@pytest.mark.parametrize("size", [(512, 128), (300, 300), (64, 7), (5, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("method", [cholesky_qr, orthonormal])
def test_orthonormalisation_survives_hostile_columns(
    method: Any, name: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    columns = HOSTILE[name](*size).to(dtype)
    found = method(columns)
    assert found.isfinite().all()
    assert orthonormality_error(found.double()) < 3e-5 if dtype == torch.float32 else 1e-12
    scaled = columns.double() / columns.double().abs().amax().clamp(min=1e-300)
    outside = scaled - found.double() @ (found.double().T @ scaled)
    assert outside.norm() <= 1e-4 * scaled.norm() + 1e-12
