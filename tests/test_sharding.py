"""Sharded parameters against the dense run: worlds of threads in one process, every layout of one mesh dimension."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Apollo,
    BAdam,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdafactor,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
    SubspaceAccumulator,
)
from lowmem.optim.core import bucket, refresh
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

from tests.helpers import randn

Build = Callable[..., torch.optim.Optimizer]
SHAPES = {"tall": (24, 15), "wide": (13, 28), "square": (7, 7)}
STEPS, RANK, GAP, LR = 9, 4, 4, 1e-2  # refreshes at steps 0, 4 and 8

OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda p: AdamW8bit(p, lr=LR, state_dtype="float32"),
    "galore": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, lr=LR),
    "galore-svd": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="svd"),
    "galore-track": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="track"),
    "galore-random-lion": lambda p: GaLore(
        p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="random", rule="lion", carry="reset"
    ),
    "galore-reverse": lambda p: GaLore(
        p, rank=RANK, update_proj_gap=GAP, lr=LR, proj_type="reverse_std", rule="rmsprop"
    ),
    "fira": lambda p: Fira(p, rank=RANK, update_proj_gap=GAP, lr=LR),
    "fira-matrix": lambda p: Fira(p, rank=RANK, update_proj_gap=GAP, lr=LR, scale_mode="matrix"),
    "channel": lambda p: LowRank(p, rank=RANK, update_proj_gap=GAP, lr=LR, residual="channel"),
    "frugal-columns": lambda p: Frugal(p, density=0.4, update_proj_gap=GAP, lr=LR),
    "frugal-svd": lambda p: Frugal(p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="svd"),
    "frugal-complement": lambda p: Frugal(
        p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="random", free_space="complement"
    ),
    "frugal-sgd": lambda p: Frugal(p, rank=RANK, update_proj_gap=GAP, lr=LR, projector="random", free_rule="sgd"),
    "frugal-blocks": lambda p: Frugal(p, rank=1, update_proj_gap=GAP, lr=LR, projector="blocks"),
    "frugal-free": lambda p: Frugal(p, density=0.0, lr=LR),
    "badam": lambda p: BAdam(p, density=1.0, lr=LR, block_by="tensor"),
    "online": lambda p: OnlineSubspaceDescent(p, rank=RANK, lr=LR),
    "flora": lambda p: Flora(p, rank=RANK, lr=LR, update_proj_gap=30),
    "flora-short": lambda p: Flora(p, rank=RANK, lr=LR, update_proj_gap=GAP, beta1=0.5),
    "adafactor": lambda p: Adafactor(p, lr=LR, beta1=0.9),
    "adafactor-torch": lambda p: Adafactor.torch(p, lr=LR),
    "apollo": lambda p: Apollo(p, rank=RANK, update_proj_gap=GAP, lr=LR),
    "apollo-mini": lambda p: Apollo.mini(p, update_proj_gap=GAP, lr=LR),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


@lru_cache
def gradients(shape: tuple[int, int]) -> list[Tensor]:
    """Random gradients with a falling spectrum."""
    found = []
    for seed in range(STEPS):
        left, _, right = torch.linalg.svd(randn(*shape, seed=seed, dtype=torch.float64), full_matrices=False)
        spectrum = torch.arange(1, left.shape[1] + 1, dtype=torch.float64) ** -1.0
        found.append(left * spectrum @ right)
    return found


def run(build: Build, shape: tuple[int, int], make: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64):
    """Train a matrix and a vector, placed by `make`."""
    start = randn(*shape, seed=99, dtype=torch.float64).to(dtype)
    weight, bias = nn.Parameter(make(start)), nn.Parameter(make(start[:, 0].contiguous()))
    optimizer = build([weight, bias])
    for grad in gradients(shape):
        weight.grad, bias.grad = make(grad.to(dtype)), make(grad[:, 0].contiguous().to(dtype))
        optimizer.step()
    return weight.detach(), bias.detach(), optimizer


def in_world(size: int, body: Callable[[], Any]) -> list[Any]:
    """Run a function on every rank of a world of threads; return what it returns, and raise what it raises."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def rank(_: Any) -> None:
        try:
            found.append(body())
        except BaseException as error:
            raised.append(error)
            raise

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            spawn_threads_and_init_comms(func=rank, world_size=size)(None)
    except BaseException:
        if raised:
            raise raised[0] from None
        raise
    return found


def placed(size: int, dim: int) -> Callable[[Tensor], Tensor]:
    mesh = init_device_mesh("cpu", (size,))
    return lambda tensor: distribute_tensor(tensor.clone(), mesh, [Shard(dim if tensor.ndim > 1 else 0)])


def compare(build: Build, shape: tuple[int, int], size: int, dim: int) -> float:
    dense = run(build, shape, torch.clone)

    def body() -> float:
        sharded = run(build, shape, placed(size, dim))
        return max(float((a.full_tensor() - b).abs().max()) for a, b in zip(sharded[:2], dense[:2], strict=True))

    return max(in_world(size, body))


@every
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 5])
def test_sharded_trajectories_are_the_dense_one(name: str, shape: tuple[int, int], dim: int, size: int) -> None:
    """Kept and projected side sharded; worlds of 5 leave uneven and empty pieces."""
    assert compare(OPTIMIZERS[name], shape, size, dim) < 1e-9


@pytest.mark.parametrize("name", ["galore", "fira", "frugal-svd", "online", "flora", "adafactor"])
@pytest.mark.parametrize(("size", "dim"), [(1, 0), (1, 1), (3, 0), (3, 1), (64, 0), (64, 1)])
def test_worlds_of_one_three_and_sixty_four(name: str, size: int, dim: int) -> None:
    assert compare(OPTIMIZERS[name], SHAPES["wide"], size, dim) < 1e-9


@pytest.mark.parametrize("name", ["galore", "fira", "frugal-columns", "online", "flora", "adafactor"])
@pytest.mark.parametrize("placements", [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(0))], ids=str)
def test_two_mesh_dimensions(name: str, placements: tuple[Any, Any]) -> None:
    """Hybrid sharding, and tensor parallelism in both directions."""
    build, shape = OPTIMIZERS[name], SHAPES["tall"]
    dense = run(build, shape, torch.clone)

    def body() -> float:
        mesh = init_device_mesh("cpu", (2, 3))

        def make(tensor: Tensor) -> Tensor:
            vector = tuple(p if p.is_replicate() else Shard(0) if p == Shard(0) else Replicate() for p in placements)
            return distribute_tensor(tensor.clone(), mesh, placements if tensor.ndim > 1 else vector)

        sharded = run(build, shape, make)
        return max(float((a.full_tensor() - b).abs().max()) for a, b in zip(sharded[:2], dense[:2], strict=True))

    assert max(in_world(6, body)) < 1e-9


@every
@pytest.mark.parametrize("dim", [0, 1])
def test_state_is_sharded_as_its_parameter(name: str, dim: int) -> None:
    """Whole shapes are those of the dense run, and a rank keeps its share."""
    build, shape = OPTIMIZERS[name], SHAPES["tall"]
    dense = run(build, shape, torch.clone)[2].state_dict()["state"]

    def body() -> None:
        state = run(build, shape, placed(3, dim))[2].state_dict()["state"]
        for key, held in dense.items():
            assert held.keys() == state[key].keys()
            for part, value in held.items():
                mine = state[key][part]
                assert tuple(mine.shape) == tuple(value.shape)
                assert mine.dtype == value.dtype
                assert isinstance(mine, DTensor) == (value.ndim > 0)
        moments = [v for k, v in state[0].items() if k == "exp_avg" and v.numel() > 1]
        for moment in moments:
            assert moment.to_local().numel() < moment.numel()

    in_world(3, body)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated8"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "frugal-free"])
def test_bf16_weights_are_rounded_by_their_place_in_the_whole(name: str, rounding: str) -> None:
    def build(params: Any) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[name](params)
        for group in optimizer.param_groups:
            group["rounding"] = rounding
            group["beta1"] = group.get("beta1") and None
            group["scale_parameter"] = False
            group["clip_threshold"] = None
        return optimizer

    dense = run(build, SHAPES["tall"], torch.clone, torch.bfloat16)

    def body() -> None:
        sharded = run(build, SHAPES["tall"], placed(3, 0), torch.bfloat16)
        differs = (sharded[0].full_tensor() != dense[0]).float().mean()
        assert differs < (0.02 if name == "adafactor" else 1e-9)  # sums in another order

    in_world(3, body)


def test_a_step_without_refresh_sends_nothing_where_the_kept_side_is_sharded() -> None:
    sent = counted(OPTIMIZERS["galore"], SHAPES["tall"], 0)
    assert sent == {}
    assert set(counted(OPTIMIZERS["fira"], SHAPES["tall"], 0)) == {"all_reduce"}


def test_a_step_sends_one_reduce_scatter_and_one_gather_of_r_where_the_projected_side_is() -> None:
    m, _ = SHAPES["tall"]
    elements = -(-m // 3) * 3 * RANK
    assert counted(OPTIMIZERS["galore"], SHAPES["tall"], 1) == {"reduce_scatter": elements, "all_gather": elements}


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "frugal-svd", "frugal-columns", "online"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_matrices_of_a_bucket_share_their_collectives(name: str, dim: int) -> None:
    one, three = (calls(OPTIMIZERS[name], SHAPES["tall"], dim, count) for count in (1, 3))
    assert three == one


@pytest.mark.parametrize("dim", [0, 1])
def test_the_decay_of_an_absolute_rule_sends_nothing_of_its_own(dim: int) -> None:
    def build(decay: float) -> Build:
        group = {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
        return lambda p: GaLoreAdafactor([{"params": p, **group}], lr=LR, weight_decay=decay)

    plain, one, three = (
        calls(build(decay), SHAPES["tall"], dim, count) for decay, count in ((0.0, 1), (0.1, 1), (0.1, 3))
    )
    assert three == one <= plain + 1


REFRESHED: dict[str, Build] = {
    **{name: OPTIMIZERS[name] for name in ("galore", "galore-track", "galore-reverse", "fira", "apollo", "online")},
    "adafactor inside": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, rule="adafactor"),
    "int8": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, basis_dtype="int8"),
    "both sides": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, proj_type="full"),
    "lazy": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, lazy=0.9),
    "dct": lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, projector="dct"),
    "heads": lambda p: GaLorePlus(
        [{"params": p, "rank": RANK, "projector": "cross_head", "num_heads": 4, "head_select": "max_norm"}],
        update_proj_gap=GAP,
    ),
    "fused heads": lambda p: GaLorePlus(
        [{"params": p, "rank": RANK, "projector": "cross_head", "num_heads": [(8, 2), (16, 4)]}], update_proj_gap=GAP
    ),
}


@pytest.mark.parametrize("name", REFRESHED)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("step", [0, GAP], ids=["first", "later"])
def test_the_refreshes_of_a_bucket_share_their_collectives(name: str, dim: int, step: int) -> None:
    one, three = (calls(REFRESHED[name], SHAPES["tall"], dim, count, step) for count in (1, 3))
    assert three == one + (2 if (name, dim) == ("dct", 1) else 0)  # there A D is of the gradient's size


def calls(build: Build, shape: tuple[int, int], dim: int, count: int, step: int = 1) -> int:
    """Collectives of a step, by default one between two refreshes, of some matrices of one shape."""
    seen: dict[str, int] = {}

    def body() -> None:
        make = placed(3, dim)
        weights = [nn.Parameter(make(randn(*shape, dtype=torch.float64, seed=seed))) for seed in range(count)]
        optimizer = build(weights)
        for number, grad in enumerate(gradients(shape)[: step + 1]):
            for weight in weights:
                weight.grad = make(grad)
            with Counting(seen if number == step and dist.get_rank() == 0 else {}):
                optimizer.step()

    in_world(3, body)
    return seen.get("calls", 0)


@pytest.mark.parametrize("count", [1, 4])
def test_uneven_pieces_are_cut_into_the_same_buckets_on_every_rank(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 rows, 3, 3 and 1: by its own rows the last rank would take more matrices at a time than the others."""
    monkeypatch.setattr(bucket, "CPU_BUFFER", 3 * RANK * 2)
    build, shape = OPTIMIZERS["fira"], SHAPES["square"]

    def train(make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        weights = [nn.Parameter(make(randn(*shape, dtype=torch.float64, seed=seed))) for seed in range(count)]
        optimizer = build(weights)
        for grad in gradients(shape):
            for number, weight in enumerate(weights):
                weight.grad = make(grad * (number + 1))
            optimizer.step()
        return [weight.detach() for weight in weights]

    dense = train(torch.clone)

    def body() -> None:
        for ours, theirs in zip(train(placed(3, 0)), dense, strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, rtol=0, atol=1e-9)

    in_world(3, body)


def counted(build: Build, shape: tuple[int, int], dim: int) -> dict[str, int]:
    """Elements of the collectives of a step between two refreshes, of a matrix alone."""
    sent: dict[str, int] = {}

    def body() -> None:
        make = placed(3, dim)
        weight = nn.Parameter(make(randn(*shape, dtype=torch.float64)))
        optimizer = build([weight])
        for seed, grad in enumerate(gradients(shape)[:2]):
            weight.grad = make(grad)
            with Counting(sent if seed == 1 and dist.get_rank() == 0 else {}):
                optimizer.step()

    in_world(3, body)
    sent.pop("calls", None)
    return sent


class Counting:
    """Counts collectives of this process and their elements, in threads that take turns at none of them."""

    def __init__(self, sent: dict[str, int]) -> None:
        self.sent = sent

    def __enter__(self) -> None:
        COUNTERS[dist.get_rank()] = self.sent

    def __exit__(self, *_: Any) -> None:
        COUNTERS.pop(dist.get_rank())


COUNTERS: dict[int, dict[str, int]] = {}


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let collectives of the layout be counted; nothing else of them changes."""
    from lowmem.optim.core import layout

    warnings.simplefilter("ignore", FutureWarning)

    def watch(name: str, run: Callable[..., Any], which: int) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            sent = COUNTERS.get(dist.get_rank())
            if sent is not None:
                sent[name] = sent.get(name, 0) + args[which].numel()
                sent["calls"] = sent.get("calls", 0) + 1
            return run(*args, **options)

        return counted

    monkeypatch.setattr(layout, "_reduce_scatter", watch("reduce_scatter", layout._reduce_scatter, 1))
    monkeypatch.setattr(layout, "_all_gather", watch("all_gather", layout._all_gather, 0))
    monkeypatch.setattr(layout.dist, "all_reduce", watch("all_reduce", layout.dist.all_reduce, 0))


@pytest.mark.parametrize("name", ["galore", "galore-svd", "galore-track", "fira", "frugal-svd", "online", "apollo"])
@pytest.mark.parametrize("options", [{}, {"rank": 4, "proj_type": "full"}], ids=["one side", "both"])
def test_replicas_share_the_search_for_bases(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each basis is found once, the same bits reach every replica, and the run is that of one process."""
    if options and name != "galore":
        pytest.skip("projected from both sides: GaLore")
    shapes = [(24, 15), (24, 15), (13, 28)]
    searches: list[int] = []
    monkeypatch.setattr(refresh, "_find", lambda *args, run=refresh._find: searches.extend(args[1]) or run(*args))

    def train(replicas: Any) -> list[Tensor]:
        params = [nn.Parameter(randn(*shape, seed=i, dtype=torch.float64)) for i, shape in enumerate(shapes)]
        optimizer = OPTIMIZERS[name](params)
        for key, value in options.items():
            optimizer.param_groups[0][key] = value
        optimizer.replicas = replicas
        for step in range(STEPS):
            for param in params:
                param.grad = gradients(tuple(param.shape))[step].clone()
            optimizer.step()
        return [param.detach() for param in params]

    alone = train(None)
    once = len(searches)
    found = in_world(3, lambda: train(dist.group.WORLD))
    for replica in found:
        assert all(torch.equal(one, other) for one, other in zip(replica, found[0], strict=True))
        for one, other in zip(replica, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert len(searches) - once == (3 * once if name == "apollo" else once)


@pytest.mark.parametrize("name", ["galore", "galore-svd", "galore-track", "fira", "frugal-svd", "apollo"])
@pytest.mark.parametrize("basis_dtype", [None, "int8"])
def test_bases_are_spread_over_many_ranks_and_whole_in_a_step(name: str, basis_dtype: str | None) -> None:
    """`shard_basis`: a rank keeps its share of the rows of P, and the trajectory is that of whole bases."""
    if basis_dtype and name not in ("galore", "galore-svd"):
        pytest.skip("bits of a basis: GaLore")

    def build(params: Any, spread: bool | None) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[name](params)
        optimizer.param_groups[0].update(shard_basis=spread, basis_dtype=basis_dtype)
        return optimizer

    shape = SHAPES["tall"]
    dense = run(lambda p: build(p, None), shape, torch.clone)

    def body() -> float:
        weight, _, optimizer = run(lambda p: build(p, True), shape, placed(4, 0))
        basis = next(held["basis"] for held in optimizer.state.values() if "basis" in held)
        assert tuple(basis.shape)[1] == RANK
        assert basis.to_local().shape[0] == max(0, min(4, 15 - 4 * dist.get_rank()))
        return float((weight.full_tensor() - dense[0]).abs().max())

    assert max(in_world(4, body)) < (1e-9 if basis_dtype is None else 1e-2)


@pytest.mark.parametrize(("size", "spread"), [(8, False), (9, True)])
def test_bases_are_spread_above_eight_ranks(size: int, spread: bool) -> None:
    def body() -> bool:
        _, _, optimizer = run(OPTIMIZERS["galore"], SHAPES["tall"], placed(size, 0))
        basis = next(held["basis"] for held in optimizer.state.values() if "basis" in held)
        return basis.placements[0] == Shard(0)

    assert set(in_world(size, body)) == {spread}


def stepped_badly(
    build: Build, shape: tuple[int, int], dim: int, value: float, at: tuple[int, ...] = (0, 2, 4)
) -> tuple[Any, torch.optim.Optimizer]:
    """Step a matrix in a world of 3 whose gradient has one bad entry in some steps; a value of 0 makes it zero."""
    make = placed(3, dim)
    weight = nn.Parameter(make(randn(*shape, dtype=torch.float64)))
    optimizer = build([weight])
    for step, grad in enumerate(gradients(shape)):
        bad = grad.clone()
        if step in at:
            bad[3, 2] = value
            bad *= value != 0
        weight.grad = make(bad)
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "channel", "frugal-svd", "frugal-columns", "online"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_a_gradient_with_one_bad_entry_leaves_finite_weights_everywhere(name: str, dim: int, value: float) -> None:
    def body() -> None:
        weight, _ = stepped_badly(OPTIMIZERS[name], SHAPES["tall"], dim, value)
        assert weight.full_tensor().isfinite().all()

    in_world(3, body)


@pytest.mark.parametrize("dim", [0, 1])
def test_moments_that_keep_their_numbers_keep_their_signs(dim: int) -> None:
    """Singular vectors have free signs, which depend on how rows are orthonormalised."""

    def build(params: Any) -> torch.optim.Optimizer:
        return GaLore(params, rank=RANK, update_proj_gap=GAP, lr=LR, carry="keep")

    assert compare(build, SHAPES["tall"], 3, dim) < 1e-9


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_copies_of_a_moment_round_alike(state_dtype: str) -> None:
    def body() -> None:
        mesh = init_device_mesh("cpu", (2, 2))
        weight = nn.Parameter(distribute_tensor(randn(256, 192), mesh, (Shard(0), Shard(1))))
        optimizer = GaLore([weight], rank=32, state_dtype=state_dtype)
        for seed in range(3):
            weight.grad = distribute_tensor(randn(256, 192, seed=seed), mesh, (Shard(0), Shard(1)))
            optimizer.step()
        for value in optimizer.state[weight].values():
            if isinstance(value, DTensor):
                for index, placement in enumerate(value.placements):
                    if placement.is_replicate():
                        mine = value.to_local().contiguous()
                        sums = [mine.double().sum() for _ in range(2)]
                        dist.broadcast(sums[1], group=mesh.get_group(index), group_src=0)
                        assert sums[0] == sums[1]

    in_world(4, body)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_where_bases_lie_may_change(first: bool, dim: int) -> None:
    dense = run(OPTIMIZERS["galore"], SHAPES["tall"], torch.clone)[0]

    def body() -> float:
        make = placed(3, dim)
        start = randn(*SHAPES["tall"], seed=99, dtype=torch.float64)
        weight = nn.Parameter(make(start))
        optimizer = OPTIMIZERS["galore"]([weight])
        optimizer.param_groups[0]["shard_basis"] = first
        for step, grad in enumerate(gradients(SHAPES["tall"])):
            if step == 5:
                optimizer.param_groups[0]["shard_basis"] = not first
            weight.grad = make(grad)
            optimizer.step()
        return float((weight.full_tensor() - dense).abs().max())

    assert max(in_world(3, body)) < 1e-9


def test_a_step_before_any_gradient_does_nothing() -> None:
    def body() -> None:
        weight = nn.Parameter(placed(2, 0)(randn(24, 15)))
        optimizer = GaLore([weight], rank=RANK, lr=0.1, weight_decay=0.1)
        before = weight.full_tensor().clone()
        optimizer.step()
        assert torch.equal(weight.full_tensor(), before)
        assert not optimizer.state

    in_world(2, body)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: Adafactor([q for q in p if q.ndim > 1], lr=LR),
            "second dimension is cut into 2 pieces of unequal",
        ),
    ],
)
def test_more_that_is_refused(build: Build, message: str) -> None:
    def body() -> None:
        mesh = init_device_mesh("cpu", (2,))
        conv = "second" in message
        start = randn(12, 3, 5) if conv else randn(24, 15)
        weight = nn.Parameter(distribute_tensor(start, mesh, [Shard(1 if conv else 0)]))
        weight.grad = torch.zeros_like(weight)
        with pytest.raises(NotImplementedError, match=message):
            build([weight]).step()

    in_world(2, body)


def test_random_bases_do_not_accumulate_sharded_gradients() -> None:
    def body() -> None:
        weight = nn.Parameter(placed(2, 0)(randn(24, 15)))
        weight.grad = torch.zeros_like(weight)
        with pytest.raises(NotImplementedError, match=r"use those of the optimizer, SubspaceAccumulator\(optimizer\)"):
            SubspaceAccumulator(GaLore([weight], rank=4), rank=4).accumulate()

    in_world(2, body)
