"""Gradients summed in a subspace equal those of one large batch, or are an unbiased copy of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.optim import (
    Adafactor,
    Fira,
    Flora,
    GaLore,
    GaLoreAdamW,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
    SubspaceAccumulator,
)
from lowmem.optim.core.accumulation import RandomBases
from lowmem.optim.core.seeded import DISTRIBUTIONS
from lowmem.optim.core.view import MatrixView
from torch import Tensor, nn
from torch.nn import Parameter

from tests.helpers import randn

SHAPES = ((24, 16), (16, 24), (8, 5, 3, 3), (9,), (3, 20))
MICRO = 4


def parameters(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def backward(params: list[Parameter], seed: int) -> None:
    """One backward pass whose gradients depend on the seed alone; one parameter in five takes no part."""
    for i, param in enumerate(params):
        if (i + seed) % 5:
            (param * randn(*param.shape, seed=100 * seed + i, dtype=param.dtype)).sum().backward()


def train(
    build: Callable[[list[Parameter]], torch.optim.Optimizer],
    accumulate: Callable[[torch.optim.Optimizer], SubspaceAccumulator] | None,
    steps: int = 9,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    params = parameters(dtype)
    optimizer = build(params)
    accumulator = accumulate(optimizer) if accumulate else None
    for step in range(steps):
        for micro in range(MICRO):
            backward(params, MICRO * step + micro)
            if accumulator:
                accumulator.accumulate()
        if accumulator:
            accumulator.step()
        else:
            optimizer.step()
            optimizer.zero_grad()
    return [param.detach() for param in params]


def assert_close(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-9) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


GALORE: list[dict[str, Any]] = [
    {},
    {"rule": "adafactor", "proj_type": "full"},
    {"rule": "lion", "proj_type": "reverse_std", "carry": "keep"},
    {"projector": "svd", "stagger": True, "maximize": True},
    {"projector": "dct"},
    {"projector": "columns"},
    {"projector": "randk"},
    {"projector": "random", "lazy": 0.5},
    {"rank": "auto", "energy": 0.5},
]


# --------------------------------------------------------------------------------------------- in its own basis


@pytest.mark.parametrize("options", GALORE, ids=str)
def test_sums_in_the_own_basis_equal_one_large_batch(options: dict[str, Any]) -> None:
    def build(params: list[Parameter]) -> GaLore:
        return GaLore(params, **{"lr": 1e-2, "rank": 4, "update_proj_gap": 3, "eps": 1e-4, **options})

    assert_close(train(build, SubspaceAccumulator), train(build, None))


def test_low_rank_without_a_residual_is_accumulated_too() -> None:
    def build(params: list[Parameter]) -> LowRank:
        return LowRank(params, lr=1e-2, rank=4, update_proj_gap=3, eps=1e-4)

    assert_close(train(build, SubspaceAccumulator), train(build, None))


@pytest.mark.parametrize("build", [GaLore, GaLoreAdamW])
def test_low_precision_weights_and_presets(build: Callable[..., GaLore]) -> None:
    def make(params: list[Parameter]) -> GaLore:
        return build(params, lr=1e-3, rank=4, update_proj_gap=4)

    ours, theirs = (train(make, way, 6, torch.bfloat16) for way in (SubspaceAccumulator, None))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_between_refreshes_only_low_rank_sums_are_kept() -> None:
    param = Parameter(randn(24, 16))
    optimizer = GaLore([param], rank=4, update_proj_gap=3)
    accumulator = SubspaceAccumulator(optimizer)
    kept = []
    for seed in range(1, 9):
        for _ in range(2):
            backward([param], seed)
            accumulator.accumulate()
        kept.append((param.grad is not None, [tuple(low.shape) for low in accumulator._sums.values()]))
        accumulator.step()
        assert param.grad is None
        assert not optimizer._low_grads
        assert not accumulator._sums
    whole, low = (True, []), (False, [(24, 4)])
    assert kept[:4] == [whole, low, low, whole]


def test_a_skipped_step_leaves_nothing_behind() -> None:
    def run(skip: bool) -> Tensor:
        param = Parameter(randn(24, 16))
        accumulator = SubspaceAccumulator(GaLore([param], rank=4, update_proj_gap=10))
        for seed in (1, 2, 3):
            if seed == 2 and not skip:
                continue
            backward([param], seed)
            accumulator.accumulate()
            if seed == 2:
                accumulator.flush()  # and a gradient scaler does not step
            else:
                accumulator.step()
        return param.detach()

    assert torch.equal(run(True), run(False))


REFUSED: dict[str, tuple[Callable[[list[Parameter]], torch.optim.Optimizer], str]] = {
    "torch": (torch.optim.AdamW, "AdamW has no subspace of its own"),
    "fira": (lambda params: Fira(params, rank=4), "Fira uses whole gradients in every step"),
    "online": (lambda params: OnlineSubspaceDescent(params, rank=4), "uses whole gradients"),
    "plus": (lambda params: GaLorePlus(params, rank=4), "uses whole gradients"),
    "flora": (lambda params: Flora(params, rank=4), "uses whole gradients"),
    "adafactor": (Adafactor, "uses whole gradients"),
    "residual": (lambda params: LowRank(params, rank=4, residual="norm"), "residual='norm'"),
    "norm": (lambda params: GaLore([params[0]], rank=4, weight_norm=True), "weight_norm=True"),
    "track": (lambda params: GaLore(params, rank=4, projector="track"), "projector='track'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_whole_gradients_are_refused_with_a_remedy(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{message}.*SubspaceAccumulator\(optimizer, rank=128\)"):
        SubspaceAccumulator(build(parameters()))
    SubspaceAccumulator(build(parameters()), rank=4)


def test_a_group_that_turns_to_whole_gradients_is_noticed() -> None:
    optimizer = GaLore(params := parameters(), rank=4)
    accumulator = SubspaceAccumulator(optimizer)
    optimizer.param_groups[0]["projector"] = "track"
    backward(params, 1)
    with pytest.raises(ValueError, match="projector='track'"):
        accumulator.accumulate()


# ---------------------------------------------------------------------------------------------- in random bases


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_random_bases_are_unbiased_and_linear(distribution: str, proj_type: str) -> None:
    count, rank = 400, 4
    param = Parameter(randn(12, 8, dtype=torch.float64))
    one, two = randn(12, 8, seed=1, dtype=torch.float64), randn(12, 8, seed=2, dtype=torch.float64)
    mean, spread = torch.zeros(12, 8, dtype=torch.float64), 0.0
    for seed in range(count):
        accumulator = SubspaceAccumulator(
            torch.optim.SGD([param]), rank, seed=seed, distribution=distribution, proj_type=proj_type
        )
        results = []
        for grads in ((one, two), (one + two,)):
            accumulator.cycle = 0
            for grad in grads:
                param.grad = grad.clone()
                accumulator.accumulate()
                assert param.grad is None
            accumulator.flush()
            results.append(param.grad)
            param.grad = None
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        mean += results[0] / count
        spread += float((results[0] - one - two).square().sum()) / count
    assert spread > 1.0
    assert float((mean - one - two).square().sum()) < 4 * spread / count


def test_nothing_is_lost_in_full_orthonormal_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RandomBases, param: Tensor) -> MatrixView | None:
        rank = min(len(param), param.numel() // len(param))
        return MatrixView.of(param.shape, rank, "std") if param.ndim > 1 else None

    monkeypatch.setattr(RandomBases, "view", full)
    for build in (torch.optim.AdamW, lambda params: Flora(params, lr=1e-2, rank=2)):
        ours = train(build, lambda optimizer: SubspaceAccumulator(optimizer, 1, distribution="orthonormal"), 3)
        assert_close(ours, train(build, None, 3), 1e-5)


def test_every_cycle_and_parameter_has_a_basis_of_its_own() -> None:
    params = [Parameter(torch.zeros(12, 8)) for _ in range(2)]
    accumulator = SubspaceAccumulator(torch.optim.SGD(params, lr=0.0), rank=4)
    seen = []
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(12, 8)
        accumulator.accumulate()
        accumulator.flush()
        seen += [param.grad.clone() for param in params if param.grad is not None]
        accumulator.optimizer.zero_grad()
    assert len({tuple(grad.flatten().tolist()) for grad in seen}) == 4


def test_small_and_flat_parameters_keep_their_gradients_exactly() -> None:
    def run(rank: int | None) -> list[Tensor]:
        way = None if rank is None else lambda optimizer: SubspaceAccumulator(optimizer, rank)
        return train(torch.optim.AdamW, way, 2)

    exact, compressed = run(None), run(6)
    assert [torch.equal(one, other) for one, other in zip(exact, compressed, strict=True)] == [
        *[False, False, False],
        *[True, True],
    ]
    assert all(torch.equal(one, other) for one, other in zip(exact, run(16), strict=True))


def test_the_gradient_has_dtype_and_strides_of_its_parameter() -> None:
    params = [
        Parameter(randn(8, 6, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)),
        Parameter(randn(6, 20).T),
    ]
    accumulator = SubspaceAccumulator(torch.optim.AdamW(params, fused=True), rank=4)
    backward(params, 1)
    accumulator.accumulate()
    accumulator.flush()
    for param in params:
        assert param.grad is not None
        assert (param.grad.dtype, param.grad.stride()) == (param.dtype, param.stride())
    accumulator.optimizer.step()


# -------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("rank", [None, 4])
def test_the_mean_of_micro_batches(rank: int | None) -> None:
    def run(mean: bool) -> list[Tensor]:
        params = parameters()
        optimizer = GaLore(params, lr=1e-2, rank=4, update_proj_gap=3, eps=1e-4)
        accumulator = SubspaceAccumulator(optimizer, rank, mean=mean)
        for step in range(5):
            for micro in range(MICRO):
                loss = [
                    (param * randn(*param.shape, seed=100 * (step * MICRO + micro) + i, dtype=param.dtype)).sum()
                    for i, param in enumerate(params)
                ]
                (sum(loss, torch.zeros(())) / (1 if mean else MICRO)).backward()
                accumulator.accumulate()
            accumulator.step()
        return [param.detach() for param in params]

    assert_close(run(True), run(False))


@pytest.mark.parametrize("rank", [None, 4])
def test_a_cycle_can_be_resumed_in_its_middle(rank: int | None) -> None:
    def fresh() -> tuple[list[Parameter], GaLore, SubspaceAccumulator]:
        params = parameters(torch.float32)
        optimizer = GaLore(params, lr=1e-2, rank=4, update_proj_gap=3)
        return params, optimizer, SubspaceAccumulator(optimizer, rank, seed=3)

    def go(run: tuple[list[Parameter], GaLore, SubspaceAccumulator], micros: range) -> None:
        for micro in micros:
            backward(run[0], micro)
            run[2].accumulate()
            if micro % MICRO == MICRO - 1:
                run[2].step()

    whole = fresh()
    go(whole, range(24))
    for cut in (2, 6, 12, 13):  # in the first step, between refreshes, at the end of a cycle, at a refresh
        first, second = fresh(), fresh()
        go(first, range(cut))
        stream = io.BytesIO()
        torch.save([first[0], first[1].state_dict(), first[2].state_dict()], stream)
        stream.seek(0)
        weights, state, sums = torch.load(stream, weights_only=True)
        for param, value in zip(second[0], weights, strict=True):
            param.data.copy_(value)
        second[1].load_state_dict(state)
        second[2].load_state_dict(sums)
        go(second, range(cut, 24))
        assert all(torch.equal(one, other) for one, other in zip(whole[0], second[0], strict=True))


def test_another_accumulators_record_is_refused() -> None:
    optimizer = GaLore(parameters(), rank=4)
    record = SubspaceAccumulator(optimizer, 4).state_dict()
    with pytest.raises(ValueError, match="construct it with the recorded options"):
        SubspaceAccumulator(optimizer, 5).load_state_dict(record)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "Invalid rank: 0"),
        ({"rank": 2.5}, "Invalid rank: 2.5"),
        ({"rank": 4, "distribution": "haar"}, "Invalid distribution"),
        ({"rank": 4, "proj_type": "full"}, "Invalid proj_type"),
        ({"rank": 4, "backend": "cuda"}, "Invalid backend"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubspaceAccumulator(torch.optim.SGD(parameters()), **options)


def test_a_model_is_trained_with_clipping_and_a_schedule() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    accumulator = SubspaceAccumulator(optimizer, rank=8, mean=True)
    inputs = torch.randn(4, 32, 16)
    losses = []
    for _ in range(40):
        total = 0.0
        for batch in inputs:
            loss = (model(batch) - batch.flip(1)).square().mean()
            loss.backward()
            accumulator.accumulate()
            total += loss.item()
        losses.append(total)
        accumulator.flush()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert losses[-1] < 0.7 * losses[0]
