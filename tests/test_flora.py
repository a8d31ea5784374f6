"""Flora (arXiv 2402.03293): statistics of its bases, limits of the method, state."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from lowmem.kernels import random
from lowmem.optim import Adafactor, Flora
from lowmem.optim.core.seeded import DISTRIBUTIONS, SeededBasis, growth, shortest_window
from torch import Tensor
from torch.nn import Parameter

from tests.helpers import feed, randn

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def build(
    shape: tuple[int, ...] = (24, 16), dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Flora, Parameter]:
    param = Parameter(randn(*shape, dtype=dtype))
    return Flora([param], **{"lr": 1e-2, "rank": 4, **options}), param


def double(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.float64)


def grads_of(steps: int, *shape: int) -> list[Tensor]:
    return [double(*shape, seed=1 + step) for step in range(steps)]


def make(distribution: str, seed: int, size: int, rank: int) -> Tensor:
    return SeededBasis(distribution, random.mix(seed), size, rank).matrix(torch.float64)


# ------------------------------------------------------------------------------------------------------- bases


@every_distribution
def test_bases_are_unbiased(distribution: str) -> None:
    size, rank, count = 12, 5, 4000
    samples = torch.stack([(p := make(distribution, seed, size, rank)) @ p.T for seed in range(count)])
    deviation = (samples.mean(0) - torch.eye(size)).abs() / (samples.std(0) / count**0.5).clamp(min=1e-7)
    assert deviation.max() < 5.0
    spread = samples.std(0).fill_diagonal_(1.0)
    assert spread.min() > 0.05  # it is no constant


@every_distribution
def test_the_noise_of_a_reconstruction_is_what_theory_says(distribution: str) -> None:
    size, rank, count = 32, 8, 3000
    x, error = double(6, size), 0.0
    for seed in range(count):
        p = make(distribution, seed, size, rank)
        error += float((x @ p @ p.T - x).square().sum()) / count
    expected = {"gaussian": (size + 1) / rank, "rademacher": (size - 1) / rank, "orthonormal": size / rank - 1}
    assert error / float(x.square().sum()) == pytest.approx(expected[distribution], rel=0.03)


@every_distribution
def test_a_transfer_is_unbiased_and_grows_as_theory_says(distribution: str) -> None:
    size, rank, count = 16, 6, 6000
    x, mean, grown = double(3, size), torch.zeros(3, size, dtype=torch.float64), 0.0
    for seed in range(count):
        old, new = make(distribution, 2 * seed, size, rank), make(distribution, 2 * seed + 1, size, rank)
        moved = x @ old @ (old.T @ new)
        torch.testing.assert_close(moved, (x @ old @ old.T) @ new, rtol=1e-9, atol=1e-9)
        mean += moved @ new.T / count
        grown += float(moved.square().sum()) / count
    assert grown / float(x.square().sum()) == pytest.approx(growth(distribution, size, rank), rel=0.05)
    assert (mean - x).norm() / x.norm() < 5 * growth(distribution, size, rank) / count**0.5


def test_a_square_orthonormal_basis_loses_nothing() -> None:
    basis = make("orthonormal", 3, 20, 20)
    torch.testing.assert_close(basis @ basis.T, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-6)
    columns = make("orthonormal", 3, 20, 7)
    torch.testing.assert_close(columns.T @ columns, torch.eye(7, dtype=torch.float64) * (20 / 7), rtol=0, atol=1e-6)


def test_the_noise_of_a_gaussian_basis_falls_with_the_root_of_the_rank() -> None:
    x = double(8, 16)
    for rank in (64, 1024):
        errors = [float((x @ (p := make("gaussian", s, 16, rank)) @ p.T - x).square().sum()) for s in range(60)]
        measured = (sum(errors) / 60 / float(x.square().sum())) ** 0.5
        assert measured == pytest.approx((17 / rank) ** 0.5, rel=0.1)


@every_distribution
@pytest.mark.parametrize(("size", "rank"), [(50, 7), (64, 33), (9, 9), (1, 1)])
def test_every_shard_makes_its_rows_of_the_same_basis(distribution: str, size: int, rank: int) -> None:
    basis = SeededBasis(distribution, 12345, size, rank)
    whole = basis.matrix()
    for world in (1, 2, 8):
        cuts = [size * rank_ // world for rank_ in range(world + 1)]
        parts = [basis.rows(range(first, last)) for first, last in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(basis.matrix(dtype), whole.to(dtype))


@every_distribution
def test_bases_differ_by_seed_place_and_window_and_are_told_by_their_key(distribution: str) -> None:
    _, param = build()
    optimizer = Flora([param], rank=4)
    view = optimizer._view(param, optimizer.param_groups[0])
    assert view is not None
    sources = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    made = [SeededBasis.of(view, distribution, *source) for source in sources]
    assert len({tuple(basis.matrix().flatten().tolist()) for basis in made}) == 4
    for basis in made:
        assert basis.of_key(basis.key) == basis
        assert basis.key > 0


def test_the_numbers_are_those_of_this_version() -> None:
    # They are part of what a checkpoint means: a change of these sums makes old ones unreadable.
    sums = {kind: float(make(kind, 1, 40, 9).double().mul(torch.arange(9)).sum()) for kind in DISTRIBUTIONS}
    assert sums == pytest.approx(NUMBERS, abs=1e-5)


NUMBERS = {"rademacher": -14.666667, "gaussian": 14.52549, "orthonormal": -4.934191}


# --------------------------------------------------------------------------------------------------- stability


@every_distribution
@pytest.mark.parametrize(("size", "rank", "beta"), [(16, 4, 0.9), (64, 2, 0.99), (100, 30, 0.5), (12, 12, 0.9)])
def test_the_shortest_window_is_the_first_that_is_stable(distribution: str, size: int, rank: int, beta: float) -> None:
    least, rate = shortest_window(distribution, size, rank, beta), math.sqrt(growth(distribution, size, rank))
    assert beta**least * rate < 1.0
    assert least == 1 or beta ** (least - 1) * rate >= 1.0


@every_distribution
def test_the_momentum_stays_bounded_exactly_where_the_condition_holds(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = shortest_window(distribution, 16, 4, 0.9)
    norms = {}
    for gap in (max(1, least // 3), 2 * least):
        with monkeypatch.context() as patch:
            patch.setattr("lowmem.optim.flora.shortest_window", lambda *_: 1)
            optimizer, param = build(update_proj_gap=gap, distribution=distribution, lr=0.0)
            feed(optimizer, param, grads_of(200, 24, 16))
        norms[gap] = float(optimizer.state[param]["exp_avg"].norm())
    short, long = norms.values()
    assert short > 1e4
    assert long < 100.0


@every_distribution
def test_windows_that_are_too_short_are_refused_with_a_remedy(distribution: str) -> None:
    least = shortest_window(distribution, 16, 4, 0.9)
    with pytest.raises(ValueError, match=f"update_proj_gap={least} or more"):
        build(update_proj_gap=least - 1, distribution=distribution)
    optimizer, param = build(update_proj_gap=least, distribution=distribution)
    with pytest.raises(ValueError, match=r"\(40, 32\) parameter grow without bound"):
        optimizer.add_param_group({"params": [Parameter(randn(40, 32))], "kappa": 2})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["update_proj_gap"] = 1  # a schedule that goes too far
    with pytest.raises(ValueError, match="grow without bound"):
        feed(optimizer, param, grads_of(1, 24, 16))


# ------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (9, 7), (6, 4, 3, 3), (0, 3), (5, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_momentum_it_is_adafactor(shape: tuple[int, ...], dtype: torch.dtype, decay: float) -> None:
    for options in ({"lr": 1e-2}, {"lr": 1e-2, "scale_parameter": False}, {}):
        ours, theirs = Parameter(randn(*shape, dtype=dtype)), Parameter(randn(*shape, dtype=dtype))
        flora = Flora([ours], beta1=None, rank=2, weight_decay=decay, **options)
        adafactor = Adafactor([theirs], weight_decay=decay, decay_by="alpha", **options)
        for grad in grads_of(6, *shape):
            feed(flora, ours, [grad])
            feed(adafactor, theirs, [grad])
        rounding = 8 * torch.finfo(dtype).eps  # clipping and rate are one factor there, two here
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
        assert flora.state[ours].keys() == adafactor.state[theirs].keys()


def test_the_first_update_is_a_tenth_of_adafactors_where_nothing_is_clipped() -> None:
    optimizer, ours = build(clip_threshold=None)
    theirs = Parameter(ours.detach().clone())
    feed(optimizer, ours, grads_of(1, 24, 16))
    feed(Adafactor([theirs], lr=1e-2, clip_threshold=None), theirs, grads_of(1, 24, 16))
    start = double(24, 16)
    torch.testing.assert_close(ours - start, 0.1 * (theirs - start), rtol=1e-9, atol=1e-12)


@every_distribution
def test_a_plain_group_keeps_the_whole_momentum(distribution: str) -> None:
    matrix, plain = Parameter(double(24, 16)), Parameter(double(24, 16))
    options = {"rank": 4, "distribution": distribution}
    optimizer = Flora([{"params": [matrix], **options}, {"params": [plain]}], lr=1e-2, clip_threshold=None)
    expected, row, col, moment = double(24, 16), 0.0, 0.0, 0.0
    for t, grad in enumerate(grads_of(5, 24, 16), start=1):
        matrix.grad, plain.grad = grad.clone(), grad.clone()
        optimizer.step()
        b2, square = 1 - t**-0.8, grad.square() + 1e-30
        row, col = b2 * row + (1 - b2) * square.mean(1), b2 * col + (1 - b2) * square.mean(0)
        moment = 0.9 * moment + 0.1 * grad / (torch.outer(row, col) / row.mean()).sqrt()
        expected = expected - 1e-2 * expected.square().mean().sqrt() * moment
    assert [row_.rank for row_ in optimizer.summary()] == [4, None]
    assert optimizer.state[plain]["exp_avg"].shape == (24, 16)
    torch.testing.assert_close(plain.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_history_has_a_rank_of_r_for_every_window() -> None:
    def history(gap: int) -> int:
        # The part of all updates that is not a multiple of the last gradients: sums of C P^T over the windows.
        total = torch.zeros(40, 30, dtype=torch.float64)
        optimizer, param = build((40, 30), rank=4, update_proj_gap=gap, beta1=0.5, lr=0.0)
        for grad in grads_of(12, 40, 30):
            held = optimizer.state[param]
            if held:
                key = int(held["basis_key"])
                view = optimizer._planned()[0].view
                assert view is not None
                total += held["exp_avg"] @ SeededBasis("rademacher", 0, 30, 4).of_key(key).matrix(torch.float64).T
            feed(optimizer, param, [grad])
        return int(torch.linalg.matrix_rank(total, rtol=1e-9))

    assert history(100) == 4
    assert history(4) == 12
    assert history(6) == 8


# ------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (10, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_state_costs_what_the_formula_says(shape: tuple[int, ...], dtype: torch.dtype, state_dtype: str) -> None:
    optimizer, param = build(shape, dtype, state_dtype=state_dtype)
    feed(optimizer, param, grads_of(1, *shape))
    m, n = shape[0], math.prod(shape[1:])
    work = 8 if dtype == torch.float64 else 4
    expected = max(m, n) * 4 * (2 if state_dtype == "bfloat16" else work) + (m + n) * work
    held = {name: value for name, value in optimizer.state[param].items() if name.startswith("exp_avg")}
    assert sum(value.nbytes for value in held.values()) == optimizer.summary().state_bytes == expected
    assert set(optimizer.state[param]) - set(held) == {"step", "basis_key"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_distribution
def test_resume_within_a_window_and_at_its_end_is_bit_exact(distribution: str, dtype: torch.dtype) -> None:
    grads = grads_of(24, 24, 16)
    whole, a = build(dtype=dtype, update_proj_gap=10, distribution=distribution, seed=5)
    feed(whole, a, grads)
    for cut in (7, 9, 10):
        first, b = build(dtype=dtype, update_proj_gap=10, distribution=distribution, seed=5)
        feed(first, b, grads[:cut])
        stream = io.BytesIO()
        torch.save(first.state_dict(), stream)
        stream.seek(0)
        second = Flora([b], lr=1e-2, rank=4)
        second.load_state_dict(torch.load(stream, weights_only=True))
        assert second.state[b]["exp_avg"].dtype == torch.float32
        feed(second, b, grads[cut:])
        assert torch.equal(a, b)


def test_a_momentum_is_read_in_the_basis_in_which_it_was_written() -> None:
    """Another seed, kind or interval moves the momentum over instead of misreading it."""
    grads = grads_of(6, 24, 16)
    for change in ({"seed": 9}, {"distribution": "orthonormal"}, {"update_proj_gap": 13}):
        optimizer, param = build(update_proj_gap=10, lr=0.0)
        feed(optimizer, param, grads[:-1] * 2 + grads[:1])
        held = optimizer.state[param]
        moment, old = held["exp_avg"].clone(), SeededBasis("rademacher", 0, 16, 4).of_key(int(held["basis_key"]))
        optimizer.param_groups[0].update(change)
        feed(optimizer, param, [torch.zeros(24, 16)])
        new = old.of_key(int(held["basis_key"]))
        assert new != old
        p, q = old.matrix(torch.float64), new.matrix(torch.float64)
        torch.testing.assert_close(held["exp_avg"], 0.9 * moment @ (p.T @ q), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("at", [0, 3, 10])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 0.0])
@pytest.mark.parametrize("shape", [(24, 16), (9,), ()])
def test_a_bad_gradient_counts_as_zero(shape: tuple[int, ...], bad: float, at: int, beta1: float | None) -> None:
    optimizer, param = build(shape, torch.float32, beta1=beta1, update_proj_gap=10)
    grads = grads_of(14, *shape)
    grads[at] = torch.full(shape, bad)
    feed(optimizer, param, grads)
    assert param.isfinite().all()
    assert all(held.isfinite().all() for held in optimizer.state[param].values())


def test_no_temporary_of_the_weights_size_but_the_update() -> None:
    optimizer, param = build((400, 300), torch.float32, update_proj_gap=30)
    feed(optimizer, param, grads_of(1, 400, 300))
    param.grad = randn(400, 300, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak < 1.6 * param.nbytes


# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "haar"}, "Invalid distribution: 'haar'; choose one of 'rademacher'"),
        ({"proj_type": "full"}, "Invalid proj_type: 'full'; choose one of 'std'"),
        ({"beta1": 1.0}, "Invalid beta1"),
        ({"rank": 0}, "Invalid rank"),
        ({"rank": "auto"}, "rank='auto' is not for random bases"),
        ({"update_proj_gap": 0}, "Invalid update_proj_gap"),
        ({"state_dtype": "int8"}, "Invalid state_dtype"),
        ({"backend": "cuda"}, "Invalid backend"),
        ({"lr": None, "relative_step": False}, "lr=None needs relative_step=True"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_group_names_the_window_as_the_paper_does() -> None:
    optimizer = Flora([{"params": [Parameter(randn(24, 16))], "kappa": 50, "density": 0.5}], lr=1e-2)
    assert optimizer.param_groups[0]["update_proj_gap"] == 50
    assert [row.rank for row in optimizer.summary()] == [8]


@pytest.mark.parametrize(("proj_type", "side"), [("std", "right"), ("reverse_std", "left"), ("left", "left")])
def test_the_side_can_be_chosen(proj_type: str, side: str) -> None:
    optimizer, param = build(proj_type=proj_type)
    feed(optimizer, param, grads_of(3, 24, 16))
    assert [row.side for row in optimizer.summary()] == [side]
    assert optimizer.state[param]["exp_avg"].shape == (24 if side == "right" else 16, 4)


def test_channels_last_weights_and_gradients() -> None:
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        optimizer, param = build((8, 6, 3, 3), update_proj_gap=20)
        param.data = param.data.to(memory_format=form)
        for grad in grads_of(3, 8, 6, 3, 3):
            param.grad = grad.to(memory_format=form)
            optimizer.step()
        results.append(param.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
