"""ZeRO-1 and 2 of DeepSpeed: flat partitions are whole rows; with DeepSpeed where it is installed."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lowmem.optim import Adafactor, AdamW8bit, Apollo, Fira, Flora, Frugal, GaLore
from lowmem.optim.deepspeed import ZeroOptimizer
from torch import Tensor, nn

from tests.helpers import randn
from tests.test_sharding import in_world

SHAPES = {"tall": (12, 6), "wide": (8, 20), "experts": (4, 9, 6), "bias": (7,)}
STEPS = 10


def parameters() -> dict[str, nn.Parameter]:
    shapes = enumerate(SHAPES.items())
    return {name: nn.Parameter(randn(*shape, seed=seed, dtype=torch.float64)) for seed, (name, shape) in shapes}


def gradients(step: int) -> dict[str, Tensor]:
    shapes = enumerate(SHAPES.items())
    return {name: randn(*shape, seed=100 * step + 7 + i, dtype=torch.float64) for i, (name, shape) in shapes}


def groups_of(params: dict[str, nn.Parameter], build: Any) -> list[dict[str, Any]]:
    if build is AdamW8bit:
        return [{"params": [params["tall"], params["wide"]]}, {"params": [params["experts"], params["bias"]]}]
    return [
        {"params": [params["tall"], params["wide"]], "rank": 3},
        {"params": [params["experts"]], "rank": 3, "stacked": True},
        {"params": [params["bias"]]},
    ]


BUILDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "galore": (GaLore, {"update_proj_gap": 4}),
    "galore-random": (GaLore, {"update_proj_gap": 4, "projector": "random", "rule": "lion"}),
    "fira": (Fira, {"update_proj_gap": 4}),
    "apollo": (Apollo, {"update_proj_gap": 4}),
    "frugal": (Frugal, {"update_proj_gap": 4}),
    "plain": (AdamW8bit, {"state_dtype": "float32"}),
}


class FlatZero:
    """What DeepSpeed does with a client optimizer: flat groups, one padded piece a rank, stepped group by group."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.groups = optimizer, optimizer.param_groups
        self.members = [list(group["params"]) for group in self.groups]
        self.pieces = [self._piece(members) for members in self.members]
        for group, piece in zip(self.groups, self.pieces, strict=True):
            group["params"] = [piece]

    def _piece(self, tensors: list[Tensor]) -> Tensor:
        world = dist.get_world_size()
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * world)))
        return flat.chunk(world)[dist.get_rank()].clone()

    def step(self, grads: dict[int, Tensor]) -> None:
        for group, members, piece in zip(self.groups, self.members, self.pieces, strict=True):
            piece.grad = self._piece([grads[id(member)] for member in members])
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            self.optimizer.param_groups = self.groups

    def weights(self) -> dict[int, Tensor]:
        found = {}
        for members, piece in zip(self.members, self.pieces, strict=True):
            parts = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, piece)
            flat = torch.cat(parts)
            for member in members:
                found[id(member)], flat = flat[: member.numel()].view(member.shape), flat[member.numel() :]
        return found


def dense(name: str) -> dict[str, Tensor]:
    cls, options = BUILDS[name]
    params = parameters()
    optimizer = cls(groups_of(params, cls), lr=1e-2, **options)
    for step in range(STEPS):
        for key, grad in gradients(step).items():
            params[key].grad = grad
        optimizer.step()
    return {key: param.detach() for key, param in params.items()}


def wrapped(name: str) -> tuple[dict[str, nn.Parameter], ZeroOptimizer, FlatZero]:
    cls, options = BUILDS[name]
    params = parameters()
    optimizer = ZeroOptimizer(cls, groups_of(params, cls), lr=1e-2, **options)
    return params, optimizer, FlatZero(optimizer)


def advance(params: dict[str, nn.Parameter], zero: FlatZero, steps: range) -> None:
    for step in steps:
        zero.step({id(params[key]): grad for key, grad in gradients(step).items()})


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_partitions_train_as_the_whole(name: str, world: int) -> None:
    expected = dense(name)

    def body() -> float:
        params, _, zero = wrapped(name)
        advance(params, zero, range(STEPS))
        found = zero.weights()
        return max(float((found[id(params[key])] - value).abs().max()) for key, value in expected.items())

    assert max(in_world(world, body)) < 1e-9


def test_schedules_reach_the_partitions() -> None:
    def body() -> bool:
        params, optimizer, zero = wrapped("galore")
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        advance(params, zero, range(2))
        found = zero.weights()
        return all(torch.equal(found[id(param)], param) for param in params.values())

    assert all(in_world(2, body))


def test_a_rank_resumes_from_its_own_state() -> None:
    def body() -> float:
        params, optimizer, zero = wrapped("fira")
        advance(params, zero, range(5))
        saved, pieces = optimizer.state_dict(), [piece.clone() for piece in zero.pieces]
        saved = {"state": {k: {n: v.clone() for n, v in held.items()} for k, held in saved["state"].items()}} | {
            "param_groups": saved["param_groups"]
        }
        assert all(type(v) is Tensor for held in saved["state"].values() for v in held.values())
        advance(params, zero, range(5, STEPS))
        others, resumed, again = wrapped("fira")
        for piece, value in zip(again.pieces, pieces, strict=True):
            piece.copy_(value)
        resumed.load_state_dict(saved)
        advance(others, again, range(5, STEPS))
        return max(float((a - b).abs().max()) for a, b in zip(zero.pieces, again.pieces, strict=True))

    assert max(in_world(2, body)) == 0.0


def test_state_of_another_number_of_ranks_is_refused() -> None:
    saved: dict[int, Any] = {}

    def save() -> None:
        params, optimizer, zero = wrapped("galore")
        advance(params, zero, range(1))
        saved[dist.get_rank()] = optimizer.state_dict()

    in_world(2, save)

    def load() -> None:
        with pytest.raises(ValueError, match="load it with as many ranks as have saved it"):
            wrapped("galore")[1].load_state_dict(saved[0])

    in_world(4, load)


def test_pieces_that_are_not_whole_rows_are_refused() -> None:
    def body() -> None:
        for shape in ((9, 8), (6, 3)):  # rows that do not divide; an odd piece, which DeepSpeed would pad
            param = nn.Parameter(torch.zeros(shape))
            with pytest.raises(ValueError, match=r"no whole rows.*param_groups\(model, exclude=\[\.\.\.\]\)"):
                ZeroOptimizer(GaLore, [{"params": [param], "rank": 2}])

    in_world(2, body)


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (Flora, {}, "got Flora, whose plain parameters"),
        (Adafactor, {}, "got Adafactor, whose plain parameters"),
        (GaLore, {"rule": "adafactor"}, "rule='adafactor' needs the shape"),
        (Frugal, {"projector": "blocks"}, "which Frugal cannot"),
    ],
)
def test_methods_that_flat_partitions_do_not_suit_are_refused(build: Any, options: Any, match: str) -> None:
    size = {} if build is Adafactor else {"rank": 1}
    with pytest.raises(ValueError, match=match):
        ZeroOptimizer(build, [{"params": [nn.Parameter(torch.zeros(8, 6))], **size}], **options)


def test_without_deepspeed_it_says_what_to_take() -> None:
    param = nn.Parameter(torch.zeros(8, 6))
    optimizer = ZeroOptimizer(GaLore, [{"params": [param], "rank": 2}])
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"need one flat partition.*stage 3.*fully_shard"):
        optimizer.step()


def cut(param: nn.Parameter) -> nn.Parameter:
    """What stage 3 leaves of a parameter: no data, its shape and number in attributes."""
    param.ds_id, param.ds_shape = 0, param.shape
    param.data = torch.empty(0)
    return param


@pytest.mark.parametrize("build", [GaLore, AdamW8bit])
def test_stage_3_is_refused_in_the_first_step(build: Any) -> None:
    """DeepSpeed has cut the parameters in the meantime, and hands over groups that are empty but for one."""

    def body() -> None:
        params = {"tall": parameters()["tall"]}
        groups = [{"params": [params["tall"]], "rank": 3}] if build is GaLore else [{"params": [params["tall"]]}]
        zero = FlatZero(ZeroOptimizer(build, groups))
        grads = {id(cut(params["tall"])): gradients(0)["tall"]}
        with pytest.raises(
            RuntimeError, match=r'stage 3 .*: set {"zero_optimization": {"stage": 2}}, or .*fully_shard'
        ):
            zero.step(grads)

    in_world(2, body)


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (GaLore, {"rank": 3}, r"a group with rank=3 has a \(12, 6\) parameter .*take ZeRO stage 1 or 2"),
        (Flora, {"rank": 3}, r"a group with rank=3 has a \(12, 6\) parameter"),
        (AdamW8bit, {}, r"a group with state_dtype='8bit' has a \(12, 6\) parameter"),
        (Adafactor, {}, r"a group with factored second moments .*without rows: shard with .*fully_shard"),
    ],
)
def test_parameters_of_stage_3_are_refused_where_rows_count(build: Any, options: dict[str, Any], match: str) -> None:
    """As models are that are built within `deepspeed.zero.Init`."""
    with pytest.raises(ValueError, match=match):
        build([{"params": [cut(parameters()["tall"])], **options}])
    if build is GaLore:
        with pytest.raises(ValueError, match=match):
            ZeroOptimizer(build, [{"params": [cut(parameters()["tall"])], **options}])
    AdamW8bit([cut(parameters()["tall"])], state_dtype="float32")  # entry by entry


def test_what_codes_or_factors_rows_is_not_handed_flat_partitions() -> None:
    """Moments would be in fp32 and second moments whole, unasked."""

    def body() -> None:
        for build, match in (
            (AdamW8bit, "state_dtype='8bit' has only vectors"),
            (Adafactor, "factored second moments"),
        ):
            params = parameters()
            zero = FlatZero(build([params["tall"]]))
            with pytest.raises(ValueError, match=match + r".*\(36,\).*fully_shard"):
                zero.step({id(params["tall"]): gradients(0)["tall"]})
        with pytest.raises(ValueError, match=r"codes rows, which a plain \(64, 256\) parameter loses.*'bfloat16'"):
            ZeroOptimizer(AdamW8bit, [nn.Parameter(torch.zeros(64, 256))])
        ZeroOptimizer(AdamW8bit, [nn.Parameter(torch.zeros(64, 256))], state_dtype="bfloat16")

    in_world(2, body)


@pytest.mark.parametrize("rank", ["of the group", "of all"])
def test_a_class_that_is_handed_flat_partitions_says_so(rank: str) -> None:
    """Otherwise a matrix would be stepped as a vector, and the state of hidden groups be dropped."""

    def body() -> None:
        params = parameters()
        own = {"rank": 3} if rank == "of the group" else {}
        matrices = {"params": [params["tall"], params["wide"]], **own}
        zero = FlatZero(GaLore([matrices, {"params": [params["bias"]]}], rank=3))
        with pytest.raises(ValueError, match=r"only vectors, the largest of shape \(116,\).*ZeroOptimizer"):
            advance(params, zero, range(1))
        plain = FlatZero(AdamW8bit([{"params": [params["tall"]]}, {"params": [params["bias"]]}], state_dtype="float32"))
        with pytest.raises(ValueError, match=r"replaced by a list of 1 of its 2 groups.*ZeroOptimizer"):
            advance(params, plain, range(1))

    in_world(2, body)


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_matrices_that_are_flattened_later_are_noticed(how: str) -> None:
    optimizer = GaLore([{"params": [nn.Parameter(torch.randn(12, 8))], "rank": 2}])
    if how == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = copy.deepcopy(optimizer)
    group = optimizer.param_groups[0]
    group["params"][0].data = group["params"][0].data.flatten()
    if how == "loaded":  # a state dict that arrives after it
        optimizer.load_state_dict(optimizer.state_dict())
    group["params"][0].grad = torch.randn(96)
    with pytest.raises(ValueError, match=r"rank=2 has only vectors, the largest of shape \(96,\)"):
        optimizer.step()


def test_groups_that_are_removed_and_added_are_no_others() -> None:
    optimizer = GaLore([{"params": [nn.Parameter(torch.randn(12, 8))]}], rank=2)
    for _ in range(300):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(12, 8))]})
        del optimizer.param_groups[1]
        optimizer.add_param_group({"params": [bias := nn.Parameter(torch.randn(4))]})
        bias.grad = torch.ones(4)
        optimizer.step()
        del optimizer.param_groups[1]


def test_a_rank_for_vectors_is_refused() -> None:
    bias = nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match=r"rank=8 has only vectors, the largest of shape \(16,\)"):
        GaLore([{"params": [bias], "rank": 8}])
    GaLore([{"params": [bias]}], rank=8)  # a group of biases beside others, none of which names a rank


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def layers(net: Any) -> list[dict[str, Any]]:
    return [{"params": [net[0].weight, net[2].weight], "rank": 4}, {"params": [net[0].bias, net[2].bias]}]


def inputs(step: int) -> Tensor:
    return randn(4, 16, seed=step)


def engine_steps(engine: Any, rank: int, world: int, steps: range) -> None:
    for step in steps:
        engine.backward(engine(inputs(step).chunk(world)[rank]).square().mean())
        engine.step()


def engine_of(net: nn.Module, optimizer: Any, rank: int, world: int, port: int, stage: int) -> Any:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
    environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": 0}
    os.environ.update({name: str(value) for name, value in environ.items()})
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {"train_micro_batch_size_per_gpu": 4 // world, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return deepspeed.initialize(model=net, optimizer=optimizer(net), config=config)[0]


def wrapper(net: Any) -> ZeroOptimizer:
    return ZeroOptimizer(GaLore, layers(net), lr=1e-2, update_proj_gap=4)


def third_stage(rank: int, world: int, port: int, wraps: bool) -> None:
    net = model()
    engine = engine_of(net, wrapper if wraps else lambda net: GaLore(layers(net)), rank, world, port, 3)
    with pytest.raises((RuntimeError, ValueError), match=r"stage 3 .*\"stage\": 2" if wraps else "ZeRO stage 1 or 2"):
        engine_steps(engine, rank, world, range(1))


def one_rank(rank: int, world: int, port: int, stage: int, out: str) -> None:
    net = model()
    engine = engine_of(net, wrapper, rank, world, port, stage)
    engine_steps(engine, rank, world, range(STEPS))
    weights = [param.detach().clone() for param in net.parameters()]
    engine.save_checkpoint(f"{out}/checkpoint")
    engine_steps(engine, rank, world, range(STEPS, STEPS + 4))
    gone_on = [param.detach().clone() for param in net.parameters()]
    engine.load_checkpoint(f"{out}/checkpoint")
    engine_steps(engine, rank, world, range(STEPS, STEPS + 4))
    assert all(torch.equal(a, b) for a, b in zip(gone_on, net.parameters(), strict=True))
    if rank == 0:
        torch.save(weights, f"{out}/weights.pt")
    dist.barrier()


def free_port() -> int:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("wraps", [False, True])
def test_deepspeed_stage_3_is_refused(wraps: bool) -> None:
    mp.spawn(third_stage, (2, free_port(), wraps), nprocs=2)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_trains_as_one_process_and_resumes_to_the_bit(stage: int, tmp_path: Path) -> None:
    mp.spawn(one_rank, (2, free_port(), stage, str(tmp_path)), nprocs=2)
    net = model()
    optimizer = GaLore(layers(net), lr=1e-2, update_proj_gap=4)
    for step in range(STEPS):
        net(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, expected in zip(torch.load(tmp_path / "weights.pt"), net.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
