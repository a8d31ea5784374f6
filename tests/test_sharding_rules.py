"""Sharded parameters whose rule, norms or bases need sums over the whole: the dense run, by worlds of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lowmem.optim import Adafactor, Fira, Frugal, GaLore, LowRank, OnlineSubspaceDescent
from lowmem.optim.core.sharding import whole
from lowmem.optim.presets import GaLoreAdafactor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.helpers import randn
from tests.test_sharding import (
    GAP,
    LR,
    RANK,
    SHAPES,
    Build,
    compare,
    counted,
    gradients,
    in_world,
    placed,
    run,
    stepped_badly,
)
from tests.test_sharding import watched as watched

Make = Callable[[Tensor], Tensor]
Placements = tuple[Any, ...]
LOW = {"rank": RANK, "update_proj_gap": GAP, "lr": LR}
FULL = {**LOW, "proj_type": "full", "eps": 1e-6}
"""Ritz vectors on both sides make R diagonal at a refresh: Adam with a tiny eps would blow up roundings beside it."""

OPTIMIZERS: dict[str, Build] = {
    "adafactor": lambda p: GaLore(p, **LOW, rule="adafactor"),
    "adafactor-track": lambda p: GaLore(p, **LOW, rule="adafactor", betas=(0.0, 0.999), projector="track"),
    "adafactor-scaled": lambda p: GaLoreAdafactor(with_options(p), weight_decay=0.1, beta1=0.9, carry="rotate"),
    "adafactor-plain": lambda p: GaLore(p, **{**LOW, "rank": None}, rule="adafactor"),
    "norm": lambda p: GaLore(p, **LOW, weight_norm=True),
    "norm-adafactor": lambda p: GaLore(p, **LOW, weight_norm=True, rule="adafactor", weight_decay=0.1),
    "dct": lambda p: GaLore(p, **LOW, projector="dct"),
    "dct-fira-reverse": lambda p: Fira(p, **LOW, projector="dct", proj_type="reverse_std"),
    "dct-signsgd": lambda p: Frugal(p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="dct", free_space="complement"),
    "int8": lambda p: GaLore(p, **LOW, basis_dtype="int8"),
    "int4-track": lambda p: GaLore(p, **LOW, basis_dtype="int4", projector="track"),
    "full": lambda p: GaLore(p, **FULL),
    "full-svd-adafactor": lambda p: GaLore(p, **FULL, projector="svd", rule="adafactor"),
    "full-track-norm": lambda p: GaLore(p, **FULL, projector="track", weight_norm=True),
    "full-random-int8": lambda p: GaLore(p, **FULL, projector="random", basis_dtype="int8"),
    "full-fira": lambda p: Fira(p, **FULL, scale_mode="matrix"),
    "full-signsgd": lambda p: LowRank(p, **FULL, residual="signsgd"),
    "full-sgd": lambda p: LowRank(p, **FULL, residual="sgd"),
    "online-adafactor": lambda p: OnlineSubspaceDescent(p, rank=RANK, lr=LR, proj_rule="adafactor"),
    "norm-fira": lambda p: Fira(p, **LOW, weight_norm=True, proj_type="reverse_std"),
}
MANY: dict[str, Build] = {
    "adafactor": lambda p: Adafactor(p, lr=LR, beta1=0.9),
    "torch": lambda p: Adafactor.torch(p, lr=LR),
    "rule": lambda p: GaLore(p, rank=None, lr=LR, rule="adafactor"),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def with_options(params: Any) -> list[dict[str, Any]]:
    """The groups of a preset, which names its options as the authors' code does."""
    return [{"params": params, "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}]


@every
@pytest.mark.parametrize(("size", "shape"), [(2, "tall"), (5, "tall"), (5, "wide")])
@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_trajectories_are_the_dense_one(name: str, shape: str, dim: int, size: int) -> None:
    """Kept and projected side sharded; worlds of 5 leave uneven and empty pieces."""
    assert compare(OPTIMIZERS[name], SHAPES[shape], size, dim) < 1e-9


@pytest.mark.parametrize("name", ["adafactor", "norm-adafactor", "dct", "int8", "full-random-int8", "online-adafactor"])
@pytest.mark.parametrize(("size", "dim"), [(1, 0), (1, 1), (3, 0), (3, 1)])
def test_worlds_of_one_and_three(name: str, size: int, dim: int) -> None:
    assert compare(OPTIMIZERS[name], SHAPES["wide"], size, dim) < 1e-9


@pytest.mark.parametrize("name", ["adafactor", "int8", "full-random-int8"])
def test_a_world_of_sixty_four(name: str) -> None:
    assert compare(OPTIMIZERS[name], SHAPES["wide"], 64, 1) < 1e-9


@every
@pytest.mark.parametrize("placements", [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(0))], ids=str)
def test_two_mesh_dimensions(name: str, placements: Placements) -> None:
    """Hybrid sharding, and tensor parallelism in both directions; copies of a state are the same bits."""
    dense = run(OPTIMIZERS[name], SHAPES["tall"], torch.clone)

    def body() -> float:
        mesh = init_device_mesh("cpu", (2, 3))

        def make(tensor: Tensor) -> Tensor:
            vector = tuple(p if p == Shard(0) else Replicate() for p in placements)
            return distribute_tensor(tensor.clone(), mesh, placements if tensor.ndim > 1 else vector)

        *sharded, optimizer = run(OPTIMIZERS[name], SHAPES["tall"], make)
        for held in optimizer.state.values():
            for value in held.values():
                assert not isinstance(value, DTensor) or copies_are_equal(value)
        return max(float((a.full_tensor() - b).abs().max()) for a, b in zip(sharded, dense[:2], strict=True))

    assert max(in_world(6, body)) < 1e-9


def copies_are_equal(value: DTensor) -> bool:
    """Whether every rank has the bits of the first one of those that have the same piece."""
    mine = value.to_local().contiguous()
    for index, placement in enumerate(value.placements):
        if placement.is_replicate():
            first = mine.clone()
            dist.broadcast(first, group=value.device_mesh.get_group(index), group_src=0)
            if not torch.equal(mine, first):
                return False
    return True


@every
@pytest.mark.parametrize("dim", [0, 1])
def test_state_has_the_shapes_of_the_whole_and_resumes_in_another_world(name: str, dim: int) -> None:
    """Saved at step 5 by three ranks, loaded by two and by one without sharding."""
    build, shape, half = OPTIMIZERS[name], SHAPES["tall"], 5
    dense = run(build, shape, torch.clone)
    expected = dense[2].state_dict()["state"]

    def train(make: Make, weights: list[Tensor], saved: Any, steps: slice) -> tuple[list[Tensor], Any]:
        params = [nn.Parameter(make(weight)) for weight in weights]
        optimizer = build(params)
        if saved:
            optimizer.load_state_dict(saved)
        for grad in gradients(shape)[steps]:
            for param, one in zip(params, (grad, grad[:, 0].contiguous()), strict=True):
                param.grad = make(one)
            optimizer.step()
        for key, held in optimizer.state_dict()["state"].items():
            assert {part: tuple(value.shape) for part, value in held.items()} == {
                part: tuple(value.shape) for part, value in expected[key].items()
            }
        full = optimizer.state_dict()
        full["state"] = {k: {n: whole(v).clone() for n, v in held.items()} for k, held in full["state"].items()}
        return [whole(param.detach()).clone() for param in params], full

    start = randn(*shape, seed=99, dtype=torch.float64)
    begin = [start, start[:, 0].contiguous()]
    weights, saved = in_world(3, lambda: train(placed(3, dim), begin, None, slice(half)))[0]
    for size in (1, 2):
        found = in_world(size, lambda n=size: train(placed(n, dim), weights, copy.deepcopy(saved), slice(half, None)))
        for one, other in zip(found[0][0], dense[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    alone, _ = train(torch.clone, weights, saved, slice(half, None))
    torch.testing.assert_close(alone, list(dense[:2]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["full", "full-random-int8", "full-track-norm", "norm", "int4-track", "adafactor"])
def test_bases_may_be_spread(name: str) -> None:
    def build(params: Any, spread: bool) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[name](params)
        optimizer.param_groups[0]["shard_basis"] = spread
        return optimizer

    dense = run(OPTIMIZERS[name], SHAPES["tall"], torch.clone)[0]

    def body() -> float:
        weight, _, optimizer = run(lambda p: build(p, True), SHAPES["tall"], placed(4, 0))
        basis = next(held["basis"] for held in optimizer.state.values() if "basis" in held)
        assert basis.placements == (Shard(0),)
        return float((weight.full_tensor() - dense).abs().max())

    assert max(in_world(4, body)) < 1e-9


@pytest.mark.parametrize("build", MANY.values(), ids=MANY)
@pytest.mark.parametrize(("shape", "dim"), [((6, 4, 5), 0), ((6, 4, 5), 1), ((5, 4, 3, 2), 0), ((5, 4, 3, 2), 1)])
def test_adafactor_of_more_dimensions(build: Build, shape: tuple[int, ...], dim: int) -> None:
    """The last two are a matrix, all others a batch."""
    grads = [randn(*shape, seed=seed, dtype=torch.float64) for seed in range(4)]

    def train(make: Make) -> tuple[Tensor, Any]:
        weight = nn.Parameter(make(randn(*shape, seed=9, dtype=torch.float64)))
        optimizer = build([weight])
        for grad in grads:
            weight.grad = make(grad)
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    dense, expected = train(torch.clone)

    def body() -> float:
        mesh = init_device_mesh("cpu", (2,))
        found, state = train(lambda tensor: distribute_tensor(tensor.clone(), mesh, [Shard(dim)]))
        for part, value in state.items():
            assert tuple(value.shape) == tuple(expected[part].shape)
            torch.testing.assert_close(whole(value), expected[part], rtol=1e-9, atol=1e-12)
        return float((found.full_tensor() - dense).abs().max())

    assert max(in_world(2, body)) < 1e-9


@pytest.mark.parametrize(
    "name", ["full", "full-fira", "full-signsgd", "norm", "norm-adafactor", "dct", "online-adafactor"]
)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_a_gradient_with_one_bad_entry_leaves_finite_weights_everywhere(name: str, dim: int, value: float) -> None:
    def body() -> None:
        weight, optimizer = stepped_badly(OPTIMIZERS[name], SHAPES["tall"], dim, value)
        assert weight.full_tensor().isfinite().all()
        for held in optimizer.state[weight].values():
            assert not isinstance(held, DTensor) or copies_are_equal(held)

    in_world(3, body)


@pytest.mark.parametrize("name", ["adafactor", "norm", "dct", "int8", "full-svd-adafactor", "online-adafactor"])
@pytest.mark.parametrize(
    ("shape", "dim", "stacked"),
    [((10, 6, 3, 2), 0, False), ((10, 6, 3, 2), 1, False), ((3, 14, 9), 0, True), ((3, 14, 9), 2, True)],
    ids=str,
)
def test_kernels_and_stacks(name: str, shape: tuple[int, ...], dim: int, stacked: bool) -> None:
    def train(make: Make) -> Tensor:
        weight = nn.Parameter(make(randn(*shape, seed=99, dtype=torch.float64)))
        optimizer = OPTIMIZERS[name]([{"params": [weight], "stacked": stacked}])
        for seed in range(6):
            weight.grad = make(randn(*shape, seed=seed, dtype=torch.float64))
            optimizer.step()
        return weight.detach()

    dense = train(torch.clone)

    def body() -> float:
        mesh = init_device_mesh("cpu", (2,))
        found = train(lambda tensor: distribute_tensor(tensor.clone(), mesh, [Shard(dim)]))
        return float((whole(found) - dense).abs().max())

    assert max(in_world(2, body)) < 1e-9


@pytest.mark.parametrize("rank", [32, None])
@pytest.mark.parametrize("options", [{"rule": "adafactor"}, {"proj_type": "full"}], ids=str)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_copies_of_statistics_and_cores_round_alike(
    rank: int | None, options: dict[str, Any], state_dtype: str
) -> None:
    def body() -> bool:
        mesh = init_device_mesh("cpu", (2, 2))
        placements = (Shard(0), Shard(0)) if rank is None else (Shard(0), Shard(1))
        weight = nn.Parameter(distribute_tensor(randn(256, 192), mesh, placements))
        optimizer = GaLore([weight], rank=rank, state_dtype=state_dtype, **options)
        for seed in range(3):
            weight.grad = distribute_tensor(randn(256, 192, seed=seed), mesh, placements)
            optimizer.step()
        return all(copies_are_equal(v) for v in optimizer.state[weight].values() if isinstance(v, DTensor))

    assert all(in_world(4, body))


def test_what_is_factored_in_another_order_is_refused() -> None:
    def body() -> None:
        weight = nn.Parameter(distribute_tensor(randn(6, 4, 5), init_device_mesh("cpu", (2,)), [Shard(0)]))
        weight.grad = torch.zeros_like(weight)
        with pytest.raises(NotImplementedError, match="pass factor_dims='last2'"):
            Adafactor([weight], factor_dims="largest2").step()

    in_world(2, body)


@pytest.mark.parametrize(
    ("name", "dim", "expected"),
    [
        ("norm", 0, {}),  # rows are whole
        ("full", 0, {"all_reduce": RANK * RANK}),
        ("full", 1, {"all_reduce": RANK * RANK}),
        ("adafactor", 0, {"all_reduce": RANK + 2}),  # columns of R, the mean of its rows, the root mean square
    ],
)
def test_what_a_step_between_two_refreshes_sends(name: str, dim: int, expected: dict[str, int]) -> None:
    assert counted(OPTIMIZERS[name], SHAPES["tall"], dim) == expected
