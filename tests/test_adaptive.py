"""Ranks chosen by the gradients, and weight normalisation."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.optim import Fira, GaLore, GaLorePlus
from lowmem.optim.core import projector as projectors
from lowmem.optim.core.adaptive import Candidate, ranks, spectrum
from lowmem.optim.core.basis import Bases
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.helpers import randn

few = settings(max_examples=40, deadline=None)
falls = st.floats(0.0, 3.0)


def shares(size: int, fall: float) -> Tensor:
    energy = torch.arange(1, size + 1, dtype=torch.float64) ** -fall
    return energy / energy.sum()


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    return randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1)


# --------------------------------------------------------------------------------------------- ranks


@few
@given(
    sizes=st.lists(st.tuples(st.integers(2, 30), falls, st.integers(1, 50)), min_size=1, max_size=6),
    slack=st.integers(0, 3000),
)
def test_a_budget_is_kept_and_no_exchange_of_directions_would_hold_more(
    sizes: list[tuple[int, float, int]], slack: int
) -> None:
    candidates = [Candidate(shares(size, fall), cost, cost + 3) for size, fall, cost in sizes]
    budget = sum(c.least for c in candidates) + slack
    chosen = ranks(candidates, None, budget)
    spent = sum(c.least + (rank - 1) * c.cost for rank, c in zip(chosen, candidates, strict=True))
    assert spent <= budget
    assert all(1 <= rank < max(len(c.shares), 2) for rank, c in zip(chosen, candidates, strict=True))
    last = [c.shares[rank - 1] / c.cost for rank, c in zip(chosen, candidates, strict=True) if rank > 1]
    following = [
        (c.shares[rank] / c.cost, c.cost)
        for rank, c in zip(chosen, candidates, strict=True)
        if rank < len(c.shares) - 1
    ]
    if last and following:
        assert min(last) >= max(gain for gain, _ in following) - 1e-15
    if following:  # what is left over does not pay for the best of what follows
        assert budget - spent < max(cost for gain, cost in following if gain >= max(g for g, _ in following) - 1e-15)


@few
@given(size=st.integers(2, 40), fall=falls, energy=st.floats(0.05, 1.0))
def test_an_energy_target_takes_the_fewest_directions_that_reach_it(size: int, fall: float, energy: float) -> None:
    whole = shares(size, fall)
    (rank,) = ranks([Candidate(whole, 1, 1)], energy, None)
    assert rank == size - 1 or whole[:rank].sum() >= energy - 1e-9
    assert rank == 1 or whole[: rank - 1].sum() < energy


def test_a_budget_that_is_too_small_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match=r"budget=10 bytes is too little.*takes 14"):
        ranks([Candidate(shares(4, 1.0), 7, 7)] * 2, None, 10)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (1, 4)])
def test_the_spectrum_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = randn(*shape, dtype=torch.float64)
    energy = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(spectrum(matrix * 1e-30), energy / energy.sum())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_gradient_has_a_flat_spectrum(value: float) -> None:
    torch.testing.assert_close(spectrum(torch.full((3, 4), value)), torch.full((3,), 1 / 3, dtype=torch.float64))


def auto(seed: int = 0, **options: Any) -> tuple[GaLore, list[nn.Parameter]]:
    params = [nn.Parameter(randn(24, 16, seed=seed + i)) for i in range(3)] + [nn.Parameter(randn(7))]
    return GaLore([{"params": params, "rank": "auto", "update_proj_gap": 3, **options}], lr=0.01), params


def give(params: list[nn.Parameter], step: int) -> None:
    for index, (param, rank) in enumerate(zip(params, (1, 4, 12), strict=False)):
        param.grad = low_rank(24, 16, rank, seed=10 * step + index)
    params[-1].grad = randn(7, seed=step)


@pytest.mark.parametrize("options", [{"energy": 0.999}, {"budget": 10_000}, {"energy": 0.999, "budget": 9_000}])
def test_matrices_get_the_ranks_of_their_gradients(options: dict[str, Any]) -> None:
    optimizer, params = auto(**options)
    give(params, 0)
    optimizer.step()
    held = [optimizer.state[param]["basis"].shape[1] for param in params[:3]]
    assert held == optimizer.param_groups[0]["ranks"][:3]
    assert held[0] == 1
    assert held[0] < held[1] < held[2]
    if "budget" not in options:
        assert held[1] == 4
    assert optimizer.param_groups[0]["ranks"][3] == 0
    matrices = [row for row in optimizer.summary() if row.rank is not None]
    assert sum(row.state_bytes for row in matrices) <= options.get("budget", 10**9)
    assert sum(row.count for row in matrices) == 3


def test_chosen_ranks_survive_checkpoints_and_copies() -> None:
    optimizer, params = auto(energy=0.9)
    for step in range(4):
        give(params, step)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other, others = auto(seed=50, energy=0.9)
    with torch.no_grad():
        for param, mine in zip(others, params, strict=True):
            param.copy_(mine)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    both, (twin, twins) = (optimizer, other), copy.deepcopy((optimizer, params))
    for step in range(4, 9):
        for opt, members in zip((*both, twin), (params, others, twins), strict=True):
            give(members, step)
            opt.step()
    for mine, loaded, copied in zip(params, others, twins, strict=True):
        assert torch.equal(mine, loaded)
        assert torch.equal(mine, copied)


def test_a_group_goes_on_with_ranks_that_were_chosen_before() -> None:
    optimizer, params = auto(energy=0.9)
    give(params, 0)
    optimizer.step()
    chosen = optimizer.param_groups[0]["ranks"]
    other, others = auto(energy=0.9, ranks=list(chosen))
    give(others, 5)  # which would choose others
    other.step()
    assert other.param_groups[0]["ranks"] == chosen
    assert [other.state[param]["basis"].shape for param in others[:3]] == [(16, rank) for rank in chosen[:3]]
    with pytest.raises(ValueError, match=r"got ranks=\[1, 2\] for 4 parameters: pass one for each"):
        auto(energy=0.9, ranks=[1, 2])


def test_the_ranks_are_unknown_before_the_first_step() -> None:
    optimizer, _ = auto(energy=0.9)
    with pytest.raises(RuntimeError, match="call summary"):
        optimizer.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "auto"}, "needs a target: pass energy=0.9"),
        ({"rank": "auto", "energy": 1.5}, "Invalid energy: 1.5"),
        ({"rank": "auto", "budget": 0}, "Invalid budget: 0"),
        ({"rank": 4, "energy": 0.9}, "energy=0.9, budget=None choose ranks, and no group has rank='auto'"),
        ({"rank": "auto", "energy": 0.9, "proj_type": "full"}, "state grows with the square of the rank"),
        ({"rank": "all"}, "Invalid rank: 'all'"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLore([nn.Parameter(randn(9, 7))], **options)


def test_a_group_waits_for_a_gradient_that_tells() -> None:
    optimizer, params = auto(energy=0.9)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.param_groups[0]["ranks"] is None
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    give(params, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["ranks"][0] == 1


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (GaLore, {"weight_norm": True, "budget": 6000}),
        (GaLore, {"projector": "dct", "budget": 5000}),
        (GaLorePlus, {"residual_density": 0.1, "residual_warmup": 1, "budget": 20_000}),
        (Fira, {"rule": "lion", "budget": 3000}),
    ],
)
def test_all_state_is_within_the_budget(build: type[GaLore], options: dict[str, Any]) -> None:
    param = nn.Parameter(randn(64, 48))
    optimizer = build([param], rank="auto", **options)
    param.grad = randn(64, 48, seed=1)
    for _ in range(3):
        optimizer.step()
        held = optimizer.state[param]
        assert sum(value.numel() * value.element_size() for value in held.values() if value.dim()) <= options["budget"]
    assert held["basis"].shape[-1] > 1


def test_groups_with_and_without_a_rank_of_their_own_go_together() -> None:
    params = [nn.Parameter(randn(24, 16, seed=i)) for i in range(2)]
    optimizer = GaLore([{"params": params[:1], "rank": "auto"}, {"params": params[1:], "rank": 4}], energy=0.9)
    for param in params:
        param.grad = low_rank(24, 16, 2)
    optimizer.step()
    assert [optimizer.state[param]["basis"].shape[1] for param in params] == [2, 4]
    again = GaLore(optimizer.param_groups)
    again.step()
    assert again.state[params[0]]["basis"].shape[1] == 2


# --------------------------------------------------------------------------------------------- weight normalisation


def identity_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = projectors.each(lambda request: Bases(torch.eye(request.view.b, dtype=request.matrix.dtype)))
    find = projectors.Projector(eye)
    monkeypatch.setitem(projectors.PROJECTORS, "sketch", find)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_full_basis_is_adamw_on_length_and_direction(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], maximize: bool
) -> None:
    identity_basis(monkeypatch)
    m, n = shape
    torch.manual_seed(0)
    theirs = weight_norm(nn.Linear(n, m, bias=False).double())
    ours = nn.Parameter(theirs.weight.detach().clone())
    options = {"lr": 0.03, "weight_decay": 0.1, "maximize": maximize, "betas": (0.8, 0.95)}
    adamw = torch.optim.AdamW(theirs.parameters(), **options)
    monkeypatch.setattr(GaLore, "_view", lambda self, param, group: projectors.MatrixView.of(shape, min(shape), "std"))
    optimizer = GaLore([ours], rank=min(shape), weight_norm=True, scale=1.0, update_proj_gap=100, **options)
    sign = -1.0 if maximize else 1.0
    for step in range(12):
        goal = randn(m, n, seed=step, dtype=torch.float64)
        adamw.zero_grad()
        (sign * (theirs.weight - goal).square().sum()).backward()
        ours.grad = sign * 2 * (ours.detach() - goal)
        adamw.step()
        optimizer.step()
        torch.testing.assert_close(ours.detach(), theirs.weight.detach(), rtol=0, atol=1e-12)
    original = theirs.parametrizations.weight
    torch.testing.assert_close(optimizer.state[ours]["norm_weight"], original.original0.detach()[:, 0])
    torch.testing.assert_close(optimizer.state[ours]["norm_direction"], original.original1.detach().norm(dim=1))


@pytest.mark.parametrize("build", [GaLore, Fira])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_rows_have_the_kept_lengths_and_one_gradient_is_not_changed(build: type[GaLore], rule: str) -> None:
    param = nn.Parameter(randn(12, 8))
    optimizer = build([param], lr=0.01, rank=3, weight_norm=True, rule=rule, update_proj_gap=2)
    for step in range(7):
        param.grad = randn(12, 8, seed=step)
        before = param.grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, before)
        torch.testing.assert_close(param.detach().norm(dim=1), optimizer.state[param]["norm_weight"])


def test_the_gradient_of_the_direction_is_tangential(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    param = nn.Parameter(randn(12, 8, dtype=torch.float64))

    class Spy(GaLore):
        def update(self, b: Any) -> None:
            seen.append((b.grads[0].clone(), b.params[0].detach().clone()))
            super().update(b)

    optimizer = Spy([param], lr=0.01, rank=3, weight_norm=True)
    for step in range(3):
        param.grad = randn(12, 8, seed=step, dtype=torch.float64)
        optimizer.step()
    for grad, direction in seen:
        assert (grad * direction).sum(1).abs().max() < 1e-12


def test_a_reset_of_the_moments_does_not_restart_the_lengths() -> None:
    moved = []
    for carry in ("keep", "reset"):
        param = nn.Parameter(randn(12, 8))
        options = {"weight_norm": True, "weight_decay": 0.0, "update_proj_gap": 5, "carry": carry}
        optimizer = GaLore([param], lr=0.01, rank=4, projector="random", **options)
        for _ in range(6):
            before = param.detach().norm(dim=1)
            param.grad = param.detach() / before[:, None]
            optimizer.step()
        moved.append(before - param.detach().norm(dim=1))
    torch.testing.assert_close(*moved)


def test_rows_of_zeros_and_bad_gradients_do_no_harm() -> None:
    param = nn.Parameter(randn(12, 8))
    with torch.no_grad():
        param[3] = 0.0
    optimizer = GaLore([param], lr=0.01, rank=3, weight_norm=True, update_proj_gap=2)
    for step in range(5):
        param.grad = torch.full((12, 8), float("nan")) if step == 2 else randn(12, 8, seed=step)
        optimizer.step()
        assert param.isfinite().all()
    assert param[3].norm() > 0


def test_a_checkpoint_resumes_bit_for_bit_and_costs_four_numbers_a_row() -> None:
    def build() -> tuple[GaLore, nn.Parameter]:
        param = nn.Parameter(randn(12, 8))
        return GaLore([param], lr=0.01, rank=3, weight_norm=True, update_proj_gap=2), param

    one, mine = build()
    for step in range(3):
        mine.grad = randn(12, 8, seed=step)
        one.step()
    other, theirs = build()
    with torch.no_grad():
        theirs.copy_(mine)
    other.load_state_dict(one.state_dict())
    for step in range(3, 7):
        for optimizer, param in ((one, mine), (other, theirs)):
            param.grad = randn(12, 8, seed=step)
            optimizer.step()
    assert torch.equal(mine, theirs)
    assert one.summary().state_bytes == 4 * (8 * 3 + 2 * 12 * 3 + 4 * 12)


def test_weights_of_low_precision_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch.bfloat16 .*model.float\(\)"):
        GaLore([nn.Parameter(randn(12, 8).bfloat16())], rank=3, weight_norm=True)
    param = nn.Parameter(randn(12, 8))
    optimizer = GaLore([param], rank=3, weight_norm=True)
    param.data, param.grad = param.data.half(), None
    param.grad = randn(12, 8).half()
    with pytest.raises(TypeError, match=r"got torch.float16"):
        optimizer.step()
