"""Sharded parameters with heads that share a basis, and with single entries: the dense run, by worlds of threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lowmem.bench.plan_rank import rank_plan
from lowmem.optim import Fira, Frugal, GaLore, GaLorePlus, LowRank
from lowmem.optim.core.entries import kth_largest, largest
from lowmem.optim.core.layout import ALONE, Layout
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests import test_plan_world as plans
from tests.helpers import randn
from tests.test_sharding import GAP, LR, RANK, STEPS, Build, compare, gradients, in_world, placed, stepped_badly

SHAPES = {"query": (24, 15), "key": (16, 28)}
LOW: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "lr": LR, "weight_decay": 0.1}
WARM: dict[str, Any] = {**LOW, "residual_density": 0.1, "residual_warmup": 3}
FUSED = {(24, 15): [(12, 3), (6, 1), (6, None)], (16, 28): [(5, 1), (6, 3), (5, None)]}


def fused(params: Any, **options: Any) -> torch.optim.Optimizer:
    """Ranges of rows that shards cut."""
    return GaLorePlus(params, **{**WARM, **options}, num_heads=FUSED[tuple(params[0].shape)])


OPTIMIZERS: dict[str, Build] = {
    "plus": lambda p: GaLorePlus(p, **LOW),
    "exact": lambda p: GaLorePlus(p, **WARM),
    "additive": lambda p: GaLorePlus(p, **WARM, residual="additive"),
    "additive-left": lambda p: GaLorePlus(p, **WARM, residual="additive", proj_type="reverse_std", maximize=True),
    "additive-reset": lambda p: GaLorePlus(p, **WARM, residual="additive", carry="reset"),
    "every-entry": lambda p: GaLorePlus(p, **{**WARM, "residual_density": 1.0}),
    "heads": lambda p: GaLorePlus(p, **LOW, num_heads=4, residual=None),
    "heads-exact": lambda p: GaLorePlus(p, **WARM, num_heads=8),
    "heads-additive": lambda p: GaLorePlus(p, **WARM, num_heads=4, residual="additive", stagger=True),
    "heads-max-norm": lambda p: GaLorePlus(p, **WARM, num_heads=2, head_select="max_norm"),
    "heads-cycle": lambda p: GaLorePlus(p, **WARM, num_heads=8, head_select="cycle", carry="reset"),
    "one-head": lambda p: GaLorePlus(p, **WARM, num_heads=1),
    "heads-options": lambda p: GaLorePlus(p, **WARM, num_heads=4, weight_norm=True, shard_basis=True, lazy=0.5),
    "fused": fused,
    "fused-additive": lambda p: fused(p, residual="additive"),
    "fused-keep": lambda p: fused(p, carry="keep", head_select="max_norm", residual=None),
    "lowrank-track": lambda p: LowRank(p, **WARM, residual="exact", projector="track"),
    "lowrank-columns": lambda p: LowRank(p, **WARM, residual="exact", projector="columns"),
    "full-additive": lambda p: LowRank(p, **WARM, residual="additive", proj_type="full", eps=1e-6),
    "randk": lambda p: Frugal(p, density=0.3, update_proj_gap=GAP, lr=LR, projector="randk"),
    "randk-rotate": lambda p: Frugal(p, density=0.3, update_proj_gap=GAP, lr=LR, projector="randk", carry="rotate"),
    "randk-sgd": lambda p: Frugal(p, rank=2, update_proj_gap=GAP, lr=LR, projector="randk", free_rule="sgd"),
    "randk-lion": lambda p: GaLore(p, **LOW, projector="randk", rule="lion", carry="keep", maximize=True),
    "fira-heads": lambda p: Fira(p, **LOW, projector="cross_head", num_heads=4),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def run(name: str, shape: tuple[int, int], make: Callable[[Tensor], Tensor], steps: int = STEPS) -> tuple[Any, ...]:
    """Train a matrix and a vector, placed by `make`."""
    start = randn(*shape, seed=99, dtype=torch.float64)
    weight, bias = nn.Parameter(make(start)), nn.Parameter(make(start[:, 0].contiguous()))
    optimizer = OPTIMIZERS[name]([weight, bias])
    for grad in gradients(shape)[:steps]:
        weight.grad, bias.grad = make(grad), make(grad[:, 0].contiguous())
        optimizer.step()
    return weight.detach(), bias.detach(), optimizer


@every
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("shape", "size"), [("query", 2), ("key", 5)])
def test_sharded_trajectories_are_the_dense_one(name: str, shape: str, dim: int, size: int) -> None:
    """Kept and projected side sharded; worlds of 5 leave uneven and empty pieces, and cut heads."""
    assert compare(OPTIMIZERS[name], SHAPES[shape], size, dim) < 1e-9


OTHER_WORLDS = [("heads-max-norm", 1, 0), ("fused", 1, 1), ("heads-additive", 64, 1), ("fused", 64, 0)]
OTHER_WORLDS += [(name, 3, dim) for name in ("exact", "additive", "heads-additive", "fused", "randk") for dim in (0, 1)]


@pytest.mark.parametrize(("name", "size", "dim"), OTHER_WORLDS)
def test_worlds_of_one_three_and_sixty_four(name: str, size: int, dim: int) -> None:
    assert compare(OPTIMIZERS[name], SHAPES["key"], size, dim) < 1e-9


def on_mesh(placements: tuple[Any, Any], sizes: tuple[int, int] = (2, 3)) -> Any:
    """Place matrices on a mesh of two dimensions, and vectors where rows are."""
    mesh = init_device_mesh("cpu", sizes)
    of_vector = tuple(Shard(0) if p == Shard(0) else Replicate() for p in placements)
    return lambda tensor: distribute_tensor(tensor.clone(), mesh, placements if tensor.ndim > 1 else of_vector)


MESHES = [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(0))]
MESHES += [(Shard(0), Shard(0))]


MESHED = ["exact", "additive", "every-entry", "heads-additive", "heads-max-norm", "fused", "randk", "randk-rotate"]


@pytest.mark.parametrize("name", MESHED)
@pytest.mark.parametrize("placements", MESHES, ids=str)
def test_two_mesh_dimensions(name: str, placements: tuple[Any, Any]) -> None:
    """Hybrid sharding, and tensor parallelism in both directions."""
    dense = run(name, SHAPES["query"], torch.clone)

    def body() -> float:
        sharded = run(name, SHAPES["query"], on_mesh(placements))
        return max(float((a.full_tensor() - b).abs().max()) for a, b in zip(sharded[:2], dense[:2], strict=True))

    assert max(in_world(6, body)) < 1e-9


@pytest.mark.parametrize("name", ["exact", "fused", "randk-rotate"])
def test_copies_of_whole_weights(name: str) -> None:
    dense = run(name, SHAPES["query"], torch.clone)[0]
    whole = (Replicate(), Replicate())
    found = in_world(2, lambda: run(name, SHAPES["query"], on_mesh(whole, (1, 2)))[0].full_tensor())
    assert all(torch.equal(one, dense) for one in found)


def test_weights_of_more_dimensions() -> None:
    """Convolutions: entries are those of the matrix (first dimension, rest)."""
    build = OPTIMIZERS["additive"]

    def train(make: Any) -> Tensor:
        weight = nn.Parameter(make(randn(12, 4, 5, dtype=torch.float64)))
        optimizer = build([weight])
        for seed in range(7):
            weight.grad = make(randn(12, 4, 5, seed=seed, dtype=torch.float64))
            optimizer.step()
        return weight.detach()

    dense = train(torch.clone)
    for dim in (0, 1):
        found = in_world(2, lambda dim=dim: train(placed(2, dim)).full_tensor())
        assert max(float((one - dense).abs().max()) for one in found) < 1e-9


@lru_cache
def held_by(name: str) -> frozenset[str]:
    optimizer = run(name, SHAPES["query"], torch.clone, steps=1)[2]
    return frozenset(optimizer.state_dict()["state"][0])


@every
@pytest.mark.parametrize("dim", [0, 1])
def test_state_is_sharded_as_its_parameter(name: str, dim: int) -> None:
    """In the warm-up and after it: whole shapes and numbers are those of the dense run, a rank keeps its share."""
    for steps in (2, 6) if "residual_warmup_step" in held_by(name) else (6,):
        dense = run(name, SHAPES["query"], torch.clone, steps=steps)[2].state_dict()["state"]

        def body(steps: int = steps, dense: Any = dense) -> None:
            state = run(name, SHAPES["query"], placed(3, dim), steps=steps)[2].state_dict()["state"]
            for key, held in dense.items():
                assert held.keys() == state[key].keys()
                for part, value in held.items():
                    mine = state[key][part]
                    assert (tuple(mine.shape), mine.dtype) == (tuple(value.shape), value.dtype)
                    assert isinstance(mine, DTensor) == (value.ndim > 0)
                    if (part.startswith("residual") or "randk" in name) and value.ndim and key == 0:
                        assert mine.to_local().numel() <= -(-max(value.shape) // 3) * min(value.shape[1:], default=1)
                        torch.testing.assert_close(mine.full_tensor(), value, rtol=1e-9, atol=1e-9)

        in_world(3, body)


@pytest.mark.parametrize("name", ["exact", "additive", "every-entry", "heads-additive", "fused", "randk-rotate"])
@pytest.mark.parametrize("steps", [2, 6])
def test_a_checkpoint_goes_on_in_any_world(name: str, steps: int) -> None:
    """Out of a world of 3 in the warm-up or after it, into worlds of 2 and 5, and into one process."""
    shape, build = SHAPES["query"], OPTIMIZERS[name]
    whole = run(name, shape, torch.clone)

    def save() -> Any:
        weight, bias, optimizer = run(name, shape, placed(3, 0), steps)
        state = optimizer.state_dict()
        gathered = {
            key: {part: v.full_tensor() if isinstance(v, DTensor) else v.clone() for part, v in held.items()}
            for key, held in state["state"].items()
        }
        return weight.full_tensor(), bias.full_tensor(), {**state, "state": gathered}

    weight, bias, state = in_world(3, save)[0]

    def load(make: Any) -> Tensor:
        params = [nn.Parameter(make(weight)), nn.Parameter(make(bias))]
        optimizer = build(params)
        optimizer.load_state_dict(state)
        for grad in gradients(shape)[steps:]:
            params[0].grad, params[1].grad = make(grad), make(grad[:, 0].contiguous())
            optimizer.step()
        found = params[0].detach()
        return found.full_tensor() if isinstance(found, DTensor) else found

    found = [load(torch.clone), *in_world(2, lambda: load(placed(2, 1))), *in_world(5, lambda: load(placed(5, 0)))]
    assert max(float((one - whole[0]).abs().max()) for one in found) < 1e-9


def made_to_be_loaded_into(name: str, make: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """A matrix and its optimizer after the step of rate zero by which checkpointing tools create state."""
    weight = nn.Parameter(make(randn(24, 15, seed=99, dtype=torch.float64)))
    optimizer = OPTIMIZERS[name]([weight])
    optimizer.param_groups[0]["lr"] = 0.0
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = LR
    return weight, optimizer


@pytest.mark.parametrize("name", ["exact", "additive", "every-entry", "fused", "lowrank-track"])
def test_state_that_was_never_loaded_into_starts_its_warm_up(name: str) -> None:
    """It is made as after the warm-up, which most checkpoints are from."""
    dense = run(name, (24, 15), torch.clone)[0]

    def train(make: Callable[[Tensor], Tensor]) -> Tensor:
        weight, optimizer = made_to_be_loaded_into(name, make)
        assert optimizer.state[weight].keys() >= {"residual_index", "residual_exp_avg", "residual_exp_avg_sq"}
        assert "residual_avg" not in optimizer.state[weight]
        for grad in gradients((24, 15)):
            weight.grad = make(grad)
            optimizer.step()
        return weight.detach()

    assert torch.equal(train(torch.clone), dense)
    assert max(in_world(3, lambda: float((train(placed(3, 0)).full_tensor() - dense).abs().max()))) < 1e-9


@pytest.mark.parametrize("flatten", [True, False])
def test_a_distributed_checkpoint_is_read_into_a_fresh_optimizer(flatten: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def states(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        found = get_optimizer_state_dict(module, optimizer, options=options)
        return {"model": module.state_dict(), "optimizer": found}

    def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
        module = nn.Linear(15, 24, bias=False, dtype=torch.float64)
        return module, OPTIMIZERS["heads-exact"]([*module.named_parameters()])

    def train(module: nn.Linear, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
        for grad in grads:
            module.weight.grad = grad.clone()
            optimizer.step()

    one, other = fresh(), fresh()
    train(*one, gradients((24, 15))[:6])
    dcp.save(states(*one), checkpoint_id=tmp_path)
    found = states(*other)
    dcp.load(found, checkpoint_id=tmp_path)
    other[0].load_state_dict(found["model"])
    set_optimizer_state_dict(*other, found["optimizer"], options=options)
    for each in (one, other):
        train(*each, gradients((24, 15))[6:])
    assert torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize("name", ["exact", "additive", "heads-exact", "fused", "randk"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bad", [0.0, float("nan"), 1e200])
def test_a_bad_gradient_leaves_finite_weights_everywhere(name: str, dim: int, bad: float) -> None:
    def body() -> None:
        weight, optimizer = stepped_badly(OPTIMIZERS[name], SHAPES["query"], dim, bad, (0, 2, 4, 6))
        assert weight.full_tensor().isfinite().all()
        index = optimizer.state[weight]["basis" if "randk" in name else "residual_index"].full_tensor()
        assert len(index.unique()) == len(index) == (108 if "randk" in name else 36)

    in_world(3, body)


@pytest.mark.parametrize("placements", MESHES, ids=str)
def test_copies_agree_in_bf16(placements: tuple[Any, Any]) -> None:
    """Weights and moments that are rounded at random: the same on every rank that has them."""

    def body() -> None:
        make = on_mesh(placements)
        weight = nn.Parameter(make(randn(24, 15).bfloat16()))
        optimizer = GaLorePlus([weight], **WARM, num_heads=4, state_dtype="bfloat16", rounding="stochastic")
        for seed in range(6):
            weight.grad = make(randn(24, 15, seed=seed).bfloat16())
            optimizer.step()
        for value in (weight.detach(), *optimizer.state[weight].values()):
            if isinstance(value, DTensor):
                for index, placement in enumerate(value.placements):
                    if placement.is_replicate():
                        mine = value.to_local().float().contiguous()
                        first = mine.clone()
                        torch.distributed.broadcast(first, group=value.device_mesh.get_group(index), group_src=0)
                        assert torch.equal(mine, first)

    in_world(6, body)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Fira(p, **LOW, projector="randk"), "a norm-scaled residual needs rows, .*choose 'columns'"),
        (lambda p: LowRank(p, **LOW, projector="randk", residual="channel"), "a norm-scaled residual needs rows"),
        (lambda p: GaLorePlus(p, **WARM, projector="randk"), "residual='exact' needs rows"),
        (lambda p: GaLore(p, **LOW, projector="randk", weight_norm=True), "weight_norm=True needs rows"),
        (lambda p: GaLore(p, **LOW, projector="randk", rule="adafactor"), "rule='adafactor' needs rows"),
        (lambda p: Frugal(p, projector="randk", state_dtype="8bit"), "state_dtype='8bit' .*choose 'bfloat16'"),
    ],
)
def test_what_looks_at_rows_is_refused_for_single_entries(build: Build, message: str) -> None:
    def body() -> None:
        weight = nn.Parameter(placed(2, 0)(randn(160, 120)))
        weight.grad = torch.zeros_like(weight)
        with pytest.raises(NotImplementedError, match=message):
            build([weight]).step()

    in_world(2, body)


# ------------------------------------------------------------------------------------------------- single entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_entries_are_those_of_a_sort(dtype: torch.dtype) -> None:
    values = randn(40, 30, dtype=dtype).abs()
    for count in (1, 7, 600, 1200):
        expected = values.flatten().topk(count).indices.sort().values
        assert torch.equal(largest(values, count, 30, ALONE), expected)


def test_of_equal_entries_the_first_are_chosen_in_any_world() -> None:
    values = randn(12, 10).abs().mul(2).round()  # a few values, many times each
    order = sorted(range(120), key=lambda flat: (-float(values.flatten()[flat]), flat))
    for count in (5, 30, 77, 119):
        expected = torch.tensor(sorted(order[:count]))
        assert torch.equal(largest(values, count, 10, ALONE), expected)
        for size, dim in ((3, 0), (3, 1), (7, 0)):

            def body(size: int = size, dim: int = dim, count: int = count) -> Tensor:
                whole = placed(size, dim)(values)
                mine = largest(whole.to_local(), count, 10, layout := Layout.of(whole))
                assert layout.sharding is not None
                return layout.sharding.wrap(mine, (count,), layout.place("entries")).full_tensor()

            assert all(torch.equal(found, expected) for found in in_world(size, body))


def test_the_kth_largest_is_counted_with_those_above_and_beside_it() -> None:
    words = torch.tensor([5, 9, 9, 1 << 40, 0, 9, 3])
    for count, expected in {1: (1 << 40, 0, 1), 2: (9, 1, 3), 4: (9, 1, 3), 5: (5, 4, 1), 7: (0, 6, 1)}.items():
        assert kth_largest(words, count, lambda counts: counts) == expected


# ---------------------------------------------------------------------------------------------------------- plans


def with_heads(model: Any, heads: int = 2, **options: Any) -> torch.optim.Optimizer:
    matrices = {"params": [model.tall, model.other, model.wide], "rank": RANK, "num_heads": heads}
    return GaLorePlus([matrices, {"params": [model.vector]}], head_select="max_norm", **options)


@pytest.mark.parametrize("where", ["fsdp2", "kept", "hsdp"])
@pytest.mark.parametrize("residual", ["exact", "additive", None])
def test_a_plan_counts_what_single_entries_send(where: str, residual: str | None, monkeypatch: Any) -> None:
    """State is that of the warm-up, traffic that of steps after it."""
    warm, now = (lambda m, t=t: with_heads(m, residual_warmup=t, residual=residual) for t in (20, 1))
    found = rank_plan(plans.Small("meta"), warm, plans.WORLDS[where])
    state = plans.run(warm, plans.WORLDS[where], monkeypatch)[0]
    _, step, refresh = plans.run(now, plans.WORLDS[where], monkeypatch)
    assert found.state == state
    assert (found.step.elements, found.step.bytes, found.step.calls) == step
    extra = tuple(more - less for more, less in zip(refresh, step, strict=True))
    assert (found.refresh.elements, found.refresh.bytes, found.refresh.calls) == extra


def test_a_head_that_is_alone_is_not_searched_for() -> None:
    """It may be planned, and sends no norms of heads."""
    one, two = (
        rank_plan(plans.Small("meta"), lambda m, h=heads: with_heads(m, h, residual=None), plans.WORLDS["fsdp2"])
        for heads in (1, 2)
    )
    assert one.state == two.state
    assert one.refresh.calls < two.refresh.calls


def test_a_step_sends_three_numbers_for_an_entry() -> None:
    """Indices and directions are gathered, gradients dealt out."""
    matrices, count = plans.Matrices(64, 32), 256
    for residual, sent in (("exact", 3 * count), (None, 0)):
        options = {"residual": residual, "residual_density": count / (64 * 32)}
        found = rank_plan(matrices, lambda m, o=options: GaLorePlus(m.parameters(), rank=RANK, **o), plans.World(8))
        assert found.step.elements == 3 * sent
