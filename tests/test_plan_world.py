"""Plans of one rank of many: state, collectives and placements are those of worlds that run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lowmem.bench.errors import UserError
from lowmem.bench.models import SHAPES
from lowmem.bench.plan_rank import RankPlan, rank_plan
from lowmem.bench.plan_world import Cost, World, own, place, pretended
from lowmem.bench.skeleton import Skeleton
from lowmem.optim import Adafactor, AdamW8bit, Fira, Frugal, GaLore, LowRank, OnlineSubspaceDescent, kept_shard
from lowmem.optim.core import layout
from lowmem.optim.core.sharding import local
from lowmem.optim.plan import KINDS, by_kind
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

from tests.helpers import randn

RANK = 4
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "galore": lambda m: GaLore(m.parameters(), rank=RANK),
    "galore-reverse": lambda m: GaLore(m.parameters(), rank=RANK, proj_type="reverse_std"),
    "fira": lambda m: Fira(m.parameters(), rank=RANK),
    "frugal-svd": lambda m: Frugal(m.parameters(), rank=RANK, projector="svd"),
    "frugal-columns": lambda m: Frugal(m.parameters(), density=0.25),
    "online": lambda m: OnlineSubspaceDescent(m.parameters(), rank=RANK),
    "channel": lambda m: LowRank(m.parameters(), rank=RANK, residual="channel"),
    "adafactor": lambda m: Adafactor(m.parameters()),
    "adamw": lambda m: AdamW8bit(m.parameters(), state_dtype="float32"),
}
WORLDS = {
    "fsdp2": World(3),
    "uneven": World(5),
    "many": World(12),
    "kept": World(3, kept=True),
    "hsdp": World(6, "hsdp", 3),
    "ddp": World(3, "ddp"),
    "replicas": World(3, "ddp", replicas=True),
}


class Small(nn.Module):
    """Two tall matrices, a wide one, and a vector that some ranks have nothing of."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.tall, self.other, self.wide = (
            nn.Parameter(torch.empty(shape, device=device)) for shape in [(48, 30), (48, 30), (26, 60)]
        )
        self.vector = nn.Parameter(torch.empty(4, device=device))


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore", FutureWarning)


BASELESS = ("adafactor", "adamw")
CASES = [(name, where) for where in WORLDS for name in OPTIMIZERS if where != "replicas" or name not in BASELESS]


@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_plan_is_what_the_first_rank_keeps_and_sends(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = WORLDS[where]
    found = rank_plan(Small("meta"), OPTIMIZERS[name], world)
    state, step, refresh = run(OPTIMIZERS[name], world, monkeypatch)
    assert found.state == state
    assert (found.step.elements, found.step.bytes, found.step.calls) == step
    extra = tuple(more - less for more, less in zip(refresh, step, strict=True))
    assert (found.refresh.elements, found.refresh.bytes, found.refresh.calls) == extra


def run(make: Callable[[nn.Module], Any], world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """State of the first rank by kind, and what it sends in a step without and with a refresh."""
    sent: list[list[tuple[int, int]]] = []
    watch(monkeypatch, sent)
    found: dict[str, Any] = {}

    def body() -> None:
        model = Small("cpu")
        mesh = init_device_mesh("cpu", (world.size // world.shards, world.shards)[-len(world.placements(model.tall)) :])

        def put(tensor: Tensor) -> Tensor:
            return tensor if world.parallel == "ddp" else distribute_tensor(tensor, mesh, world.placements(tensor))

        for seed, (key, param) in enumerate(list(model.named_parameters())):
            setattr(model, key, nn.Parameter(put(randn(*param.shape, seed=seed))))
        optimizer = make(model)
        if world.replicas:
            optimizer.replicas = dist.group.WORLD
        for turn in range(3):
            for seed, param in enumerate(model.parameters()):
                param.grad = put(randn(*param.shape, seed=10 * turn + seed))
                if turn == 2 and "until_refresh" in optimizer.state[param]:
                    optimizer.state[param]["until_refresh"].zero_()
            if dist.get_rank() == 0:
                sent.append([])
            optimizer.step()
            dist.barrier()
        if dist.get_rank() == 0:
            held = ({key: local(value) for key, value in each.items()} for each in optimizer.state.values())
            found.update(by_kind(held))

    in_world(world.size, body)
    return found, *((sum(n for n, _ in turn), sum(b for _, b in turn), len(turn)) for turn in sent[1:])


def watch(monkeypatch: pytest.MonkeyPatch, sent: list[list[tuple[int, int]]]) -> None:
    """Note what the first rank passes to collectives."""

    def note(module: Any, name: str, which: int, times: int = 1) -> None:
        plain = getattr(module, name)

        def noted(*args: Any, **options: Any) -> Any:
            made = plain(*args, **options)
            if dist.get_rank() == 0:
                tensor = args[which] if which >= 0 else made
                sent[-1].append((times * tensor.numel(), times * tensor.nbytes))
            return made

        monkeypatch.setattr(module, name, noted)

    note(layout, "_reduce_scatter", 1)
    note(layout, "_all_gather", 0)
    note(layout.dist, "all_reduce", 0, 2)
    note(layout.dist, "broadcast", 0)
    gather = layout.Layout.gather_all

    def gather_all(self: Any, matrix: Tensor, whole: Any) -> Tensor:
        if dist.get_rank() == 0 and self.sharding is not None:
            along = (*self.rows, *self.cols)
            each = -(-(whole.a if self.rows else whole.b) // dist.get_world_size(along[0]))
            size = each * dist.get_world_size(along[0]) * (whole.b if self.rows else whole.a)
            sent[-1].append((size, size * matrix.itemsize))
        return gather(self, matrix, whole)

    monkeypatch.setattr(layout.Layout, "gather_all", gather_all)


def in_world(size: int, body: Callable[[], None]) -> None:
    """Run on every rank of a world of threads."""
    raised: list[BaseException] = []

    def rank(_: Any) -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)
            raise

    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
        spawn_threads_and_init_comms(func=rank, world_size=size)(None)
    if raised:
        raise raised[0]


@pytest.mark.parametrize("world", [World(4), World(4, kept=True), World(8, "hsdp", 4)], ids=str)
def test_parameters_are_placed_as_fully_shard_places_them(world: World) -> None:
    with torch.device("meta"):
        ours, theirs = (Skeleton(SHAPES["tiny"], torch.float32) for _ in range(2))
    with pretended(world) as mesh:
        place(ours, mesh, world)
        names = ("replicas", "shards")[-mesh.ndim :]
        over = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=names)
        options = {"shard_placement_fn": kept_shard} if world.kept else {}
        for layer in (*theirs.model.layers, theirs):
            fully_shard(layer, mesh=over, **options)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.placements == other.placements
            assert one.to_local().shape == other.to_local().shape
            assert one.shape == other.shape
    with pytest.raises(UserError, match=r"dimension 1 of a \(128, 344\) parameter to be a multiple of 16"):
        Small("meta") and World(16, kept=True).placements(torch.empty(128, 344))


class Matrices(nn.Module):
    """Matrices of one shape (m, n)."""

    def __init__(self, m: int, n: int, count: int = 3) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(m, n, device="meta") for _ in range(count)])


@pytest.mark.parametrize(
    ("name", "kept", "projected"),
    [
        ("galore", lambda a, r: 0, lambda a, r: 2 * a * r),
        ("fira", lambda a, r: 2, lambda a, r: 2 * a * r + 2 * a + 4),
        ("frugal-svd", lambda a, r: 0, lambda a, r: 3 * a * r + 2 * a),
    ],
)
def test_traffic_of_a_step_is_the_formula(name: str, kept: Any, projected: Any) -> None:
    """Of matrices whose longer side a = 64 is sharded, or whose shorter side is."""
    tall, wide = (rank_plan(Matrices(*shape), OPTIMIZERS[name], World(8)) for shape in [(64, 32), (32, 64)])
    assert tall.step.elements == 3 * kept(64, RANK)
    assert wide.step.elements == 3 * projected(64, RANK)


def test_bases_that_are_replicated_outweigh_the_moments_of_adamw_on_many_ranks() -> None:
    def state(make: Callable[[nn.Module], Any], world: World) -> RankPlan:
        return rank_plan(Matrices(1024, 1024), make, world)

    def galore(shard_basis: bool) -> Callable[[nn.Module], Any]:
        return lambda m: GaLore(m.parameters(), rank=256, shard_basis=shard_basis)

    few, many = (
        [sum(state(make, World(size)).state.values()) for make in (galore(False), galore(True), OPTIMIZERS["adamw"])]
        for size in (2, 64)
    )
    assert few[1] < few[0] < few[2]
    assert many[1] < many[2] < many[0]
    spread = state(galore(True), World(64))
    assert spread.step.elements == 3 * 1024 * 256  # bases are gathered for the step


def test_what_the_wrapper_sends_itself() -> None:
    assert own(World(8), 80, 160) == (Cost(240, 480), Cost(160, 320))
    assert own(World(8, "hsdp", 2), 80, 160) == (Cost(320, 640), Cost(240, 480))
    assert own(World(8, "ddp"), 80, 160) == (Cost(160, 320), Cost(160, 320))
    assert own(World(1), 80, 160) == (Cost(), Cost())


def test_refreshes_are_spread_over_their_interval() -> None:
    found = [
        rank_plan(Matrices(64, 32), lambda m, gap=gap: GaLore(m.parameters(), rank=4, update_proj_gap=gap), World(4))
        for gap in (10, 40)
    ]
    assert found[0].refresh == found[1].refresh
    assert [each.amortised for each in found] == [round(found[0].refresh.bytes / gap) for gap in (10, 40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "zero3"}, "fsdp2, hsdp, ddp"),
        ({"parallel": "hsdp"}, "--parallel hsdp --shard 8"),
        ({"shard": 2}, "--parallel hsdp --shard 8"),
        ({"parallel": "hsdp", "shard": 3}, "must divide"),
        ({"parallel": "ddp", "kept": True}, "--kept"),
        ({"replicas": True}, "--parallel ddp --replicas"),
    ],
)
def test_worlds_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World(8, **options)


def test_optimizers_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(UserError, match="adamw8bit --state-dtype float32"):
        rank_plan(Small("meta"), lambda m: torch.optim.AdamW(m.parameters()), World(2))
    with pytest.raises(UserError, match="has no bases to share"):
        rank_plan(Small("meta"), OPTIMIZERS["adamw"], World(2, "ddp", replicas=True))
    assert not dist.is_initialized()


def lowmem(*arguments: str, cwd: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowmem.bench", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_command_prints_and_writes_one_rank_beside_adamw(tmp_path: Any) -> None:
    flags = ["--model=tiny", "--optimizer=galore", "--rank=32", "--out=plan.json"]
    made = lowmem("plan", *flags, "--world=8", "--parallel=hsdp", "--shard=4", "--kept", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    assert "one of 8 ranks by hsdp, 4 to a copy" in made.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["world"] == {"size": 8, "parallel": "hsdp", "shard": 4, "kept": True, "replicas": False}
    ours, adamw = written["plans"].values()
    assert set(ours["state"]) == set(KINDS)
    assert ours["weights"] == adamw["weights"]
    assert adamw["state"]["moments"] == 4 * adamw["weights"]
    assert (ours["step"]["elements"], adamw["step"]["elements"]) == (0, 0)
    assert ours["refresh"]["calls"] > 0
    shared = lowmem("plan", *flags, "--world=4", "--parallel=ddp", "--replicas", cwd=tmp_path)
    assert shared.returncode == 0, shared.stderr  # AdamW beside it has no bases to share
    for flag, of in ((["--world=8", "--budget=3"], "--budget"), (["--kept"], "--kept")):
        refused = lowmem("plan", *flags, *flag, cwd=tmp_path)
        assert refused.returncode == 1
        assert f"{of} is for plans of" in refused.stderr
