"""Stacks of experts: every matrix of a parameter (E, m, n) trains as a parameter of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.optim import (
    Adafactor,
    Apollo,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
    SubspaceAccumulator,
    convert_state,
    enable_gradient_release,
    matched,
    param_groups,
)
from lowmem.optim.plan import plan
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.helpers import randn
from tests.test_sharding import in_world

Build = Callable[..., torch.optim.Optimizer]
E, M, N, STEPS = 5, 12, 9, 8
RANK = {"rank": 3}

OPTIMIZERS: dict[str, tuple[Build, dict[str, Any]]] = {
    "galore": (GaLore, {"update_proj_gap": 3}),
    "galore-staggered": (GaLore, {"update_proj_gap": 3, "projector": "random", "stagger": True}),
    "galore-lazy": (GaLore, {"update_proj_gap": 2, "lazy": 0.5, "carry": "reset", "proj_type": "reverse_std"}),
    "galore-full": (GaLore, {"update_proj_gap": 3, "proj_type": "full"}),
    "galore-norm": (GaLore, {"update_proj_gap": 3, "weight_norm": True}),
    "galore-adafactor": (GaLore, {"update_proj_gap": 3, "rule": "adafactor"}),
    "galore-plain": (GaLore, {"rank": 64}),
    "galore-plain-adafactor": (GaLore, {"rank": 64, "rule": "adafactor"}),
    "track": (GaLore, {"update_proj_gap": 2, "projector": "track"}),
    "dct": (GaLore, {"update_proj_gap": 3, "projector": "dct"}),
    "fira": (Fira, {"update_proj_gap": 3}),
    "apollo": (Apollo, {"update_proj_gap": 3}),
    "online": (OnlineSubspaceDescent, {}),
    "frugal": (Frugal, {"update_proj_gap": 3}),
    "frugal-randk": (Frugal, {"update_proj_gap": 3, "projector": "randk"}),
    "frugal-dense": (Frugal, {"density": 1.0}),
    "frugal-free": (Frugal, {"density": 0.0}),
    "flora": (Flora, {"update_proj_gap": 30}),
    "channel": (LowRank, {"update_proj_gap": 3, "residual": "channel"}),
    "signs": (LowRank, {"update_proj_gap": 3, "residual": "signsgd"}),
    "adafactor": (Adafactor, {"beta1": 0.9}),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def gradient(step: int, dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = (E, M, N)) -> Tensor:
    """Expert 3 gets no token in the first two steps, so that its refreshes come later than the others'."""
    grad = randn(*shape, seed=step, dtype=torch.float64).to(dtype)
    if step < 2:
        grad[3] = 0
    return grad


def start(dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = (E, M, N)) -> Tensor:
    return randn(*shape, seed=99, dtype=torch.float64).to(dtype)


def build(name: str, params: list[Any], **options: Any) -> Any:
    """The optimizer with these parameters in one group, and a bias in another, after them."""
    cls, own = OPTIMIZERS[name]
    own = {**RANK, **own}
    size = {key: own.pop(key) for key in ("rank", "density") if key in own and cls is not Adafactor}
    own.pop("rank", None)
    if "density" in size:
        size.pop("rank")
    bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    bias.grad = torch.ones_like(bias)
    return cls([{"params": params, **size, **options}, {"params": [bias]}], lr=1e-2, **own)


def train(optimizer: Any, param: Tensor, steps: range, place: Callable[[Tensor], Tensor] = torch.clone) -> None:
    for step in steps:
        param.grad = place(gradient(step))
        optimizer.step()


@every
def test_a_stack_trains_as_its_matrices_bit_for_bit(name: str) -> None:
    stacked, matrices = nn.Parameter(start()), [nn.Parameter(matrix) for matrix in start()]
    whole, apart = build(name, [stacked], stacked=True), build(name, matrices)
    for step in range(STEPS):
        stacked.grad = gradient(step)
        for matrix, grad in zip(matrices, gradient(step), strict=True):
            matrix.grad = grad
        whole.step()
        apart.step()
    assert not torch.equal(stacked, start())
    assert torch.equal(stacked.detach(), torch.stack([matrix.detach() for matrix in matrices]))
    assert whole.skipped_refreshes() == apart.skipped_refreshes()
    for key, value in whole.state[stacked].items():
        assert torch.equal(value, torch.stack([apart.state[matrix][key] for matrix in matrices])), key
    assert whole.summary().state_bytes == apart.summary().state_bytes


@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"rounding": "stochastic"}, {"rounding": "compensated"}])
def test_stacks_in_few_bits_train_as_their_matrices(options: dict[str, Any]) -> None:
    shape = (E, 300, 40)
    stacked = nn.Parameter(start(torch.bfloat16, shape))
    matrices = [nn.Parameter(matrix) for matrix in start(torch.bfloat16, shape)]
    whole = GaLore([{"params": [stacked], "rank": 16, "stacked": True}], update_proj_gap=2, **options)
    apart = GaLore([{"params": matrices, "rank": 16}], update_proj_gap=2, **options)
    for step in range(4):
        stacked.grad = gradient(step, torch.bfloat16, shape)
        for matrix, grad in zip(matrices, stacked.grad.clone(), strict=True):
            matrix.grad = grad
        whole.step()
        apart.step()
    assert torch.equal(stacked.detach(), torch.stack([matrix.detach() for matrix in matrices]))


@pytest.mark.parametrize("projector", ["sketch", "random", "columns"])
def test_experts_with_one_gradient_have_bases_of_their_own(projector: str) -> None:
    """Sketches and random bases are drawn anew for every expert."""
    param = nn.Parameter(torch.zeros(E, 30, 20))
    param.grad = randn(30, 20, seed=0).expand(E, 30, 20).clone()
    optimizer = GaLore([{"params": [param], "rank": 4, "stacked": True}], projector=projector)
    optimizer.step()
    bases = optimizer.state[param]["basis"]
    assert all(not torch.equal(bases[i], bases[j]) for i in range(E) for j in range(i))


def test_state_is_what_the_summary_and_the_formula_say() -> None:
    param = nn.Parameter(torch.zeros(8, 64, 32))
    param.grad = randn(8, 64, 32, seed=0)
    optimizer = GaLore([{"params": [param], "rank": 4, "stacked": True}])
    assert optimizer.summary().state_bytes == 8 * (32 * 4 + 2 * 64 * 4) * 4
    optimizer.step()
    held = optimizer.state[param]
    assert {key: tuple(value.shape) for key, value in held.items() if value.ndim > 1} == {
        "basis": (8, 32, 4),
        "exp_avg": (8, 64, 4),
        "exp_avg_sq": (8, 64, 4),
    }
    assert sum(value.nbytes for value in held.values() if value.ndim > 1) == optimizer.summary().state_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_of_a_stack_is_that_of_its_matrices(device: str) -> None:
    """Mixtral's experts, 8 x (28672, 4096), without data: state and what a step allocates."""
    experts = nn.Parameter(torch.empty(8, 28672, 4096, device="meta", dtype=torch.bfloat16))
    matrices = [nn.Parameter(torch.empty_like(matrix)) for matrix in experts.detach()]
    stacked = plan(GaLore([{"params": [experts], "rank": 1024, "stacked": True}]), device)
    apart = plan(GaLore([{"params": matrices, "rank": 1024}]), device)
    assert stacked.bases == 8 * 4096 * 1024 * 2
    assert stacked.moments == 8 * 2 * 28672 * 1024 * 4
    assert (stacked.state, stacked.step) == (apart.state, apart.step)


@pytest.mark.parametrize("name", ["galore-lazy", "fira", "flora", "online"])
def test_a_checkpoint_resumes_to_the_bit(name: str) -> None:
    param = nn.Parameter(start())
    optimizer = build(name, [param], stacked=True)
    train(optimizer, param, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    twin = nn.Parameter(param.detach().clone())
    resumed = build(name, [twin], stacked=True)
    resumed.load_state_dict(saved)
    train(optimizer, param, range(4, STEPS))
    train(resumed, twin, range(4, STEPS))
    assert torch.equal(param, twin)


def test_a_checkpoint_converts_to_another_rank_matrix_by_matrix() -> None:
    stacked, matrices = nn.Parameter(start()), [nn.Parameter(matrix) for matrix in start()]
    pairs = []
    for params, extra in (([stacked], {"stacked": True}), (matrices, {})):
        old = GaLore([{"params": params, "rank": 3, **extra}], lr=1e-2)
        for step in range(3):
            grads = [gradient(step)] if extra else gradient(step)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            old.step()
        new = GaLore([{"params": params, "rank": 5, **extra}], lr=1e-2)
        new.load_state_dict(convert_state(old.state_dict(), new))
        pairs.append(new)
    for key, value in pairs[0].state[stacked].items():
        assert torch.equal(value, torch.stack([pairs[1].state[matrix][key] for matrix in matrices])), key


def test_gradient_release_steps_a_stack() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(start())
    twin = nn.Parameter(start())
    optimizer = GaLore([{"params": [model.experts], "rank": 3, "stacked": True}])
    other = GaLore([{"params": [twin], "rank": 3, "stacked": True}])
    handle = enable_gradient_release(model, optimizer)
    for step in range(3):
        (model.experts * gradient(step)).sum().backward()
        optimizer.step()
        twin.grad = gradient(step)
        other.step()
    handle.remove()
    assert torch.equal(model.experts, twin)


def sharded(name: str, placements: tuple[Placement, ...], mesh: tuple[int, ...]) -> None:
    """Compare with the dense run in a world of threads."""
    dense = nn.Parameter(start())
    train(build(name, [dense], stacked=True), dense, range(STEPS))

    def body() -> float:
        device_mesh = init_device_mesh("cpu", mesh)

        def place(tensor: Tensor) -> Tensor:
            return distribute_tensor(tensor.clone(), device_mesh, placements)

        param = nn.Parameter(place(start()))
        optimizer = build(name, [param], stacked=True)
        train(optimizer, param, range(STEPS), place)
        held = optimizer.state[param]
        assert all(value.shape[0] == E for value in held.values())
        if placements == (Shard(0),):
            assert all(value.placements == placements for value in held.values())
        return float((param.detach().full_tensor() - dense.detach()).abs().max())

    assert max(in_world(math.prod(mesh), body)) <= (1e-12 if placements == (Shard(0),) else 1e-7)


@every
def test_stacks_sharded_by_experts_train_as_the_dense_one(name: str) -> None:
    sharded(name, (Shard(0),), (3,))


@pytest.mark.parametrize("world", [1, 2, 7])
def test_worlds_that_leave_uneven_and_no_experts(world: int) -> None:
    sharded("galore", (Shard(0),), (world,))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "frugal-randk"])
@pytest.mark.parametrize("dim", [1, 2])
def test_stacks_sharded_within_their_matrices_train_as_the_dense_one(name: str, dim: int) -> None:
    sharded(name, (Shard(dim),), (5,))


@pytest.mark.parametrize("count", [8, 5])
def test_expert_parallelism_under_fsdp(count: int) -> None:
    """Experts are dealt out by expert parallelism first and cut again by FSDP2, as its strided shards say."""
    shape = (count, M, N)
    dense = nn.Parameter(start(shape=shape))
    options = {"projector": "random", "update_proj_gap": 2}
    optimizer = GaLore([{"params": [dense], **RANK, "stacked": True}], **options)
    for step in range(4):
        dense.grad = gradient(step, shape=shape)
        optimizer.step()

    def body() -> bool:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
        fsdp, expert = mesh.get_coordinate()
        placements = [_StridedShard(0, split_factor=2), Shard(0)]

        def place(tensor: Tensor) -> Tensor:
            piece = tensor.chunk(2)[expert].chunk(2)[fsdp].clone()
            return DTensor.from_local(
                piece, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )

        param = nn.Parameter(place(start(shape=shape)))
        sharded = GaLore([{"params": [param], **RANK, "stacked": True}], **options)
        for step in range(4):
            param.grad = place(gradient(step, shape=shape))
            sharded.step()
        return torch.equal(param.to_local(), place(dense.detach()).to_local())

    assert all(in_world(4, body))


def test_single_entries_of_stacks_that_are_sharded_within_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="projector='randk' has single entries"):
        sharded("frugal-randk", (Shard(1),), (2,))


@pytest.mark.parametrize("dim", [1, 2])
def test_experts_dealt_out_and_sharded(dim: int) -> None:
    sharded("fira", (Shard(0), Shard(dim)), (2, 2))
    sharded("galore", (Replicate(), Shard(dim)), (2, 2))


@pytest.mark.parametrize("name", ["galore-lazy", "flora", "frugal-free"])
def test_counters_that_are_copied_to_the_host_are_written_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU those of a sharded stack lie there with the rest of its state; here every copy is another tensor."""
    dense = nn.Parameter(start())
    optimizer = build(name, [dense], stacked=True)
    train(optimizer, dense, range(STEPS))
    expected = {key: value for key, value in optimizer.state[dense].items() if value.ndim == 1}
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)

    def body() -> bool:
        mesh = init_device_mesh("cpu", (2,))

        def place(tensor: Tensor) -> Tensor:
            return distribute_tensor(tensor.clone(), mesh, [Shard(0)])

        param = nn.Parameter(place(start()))
        sharded = build(name, [param], stacked=True)
        train(sharded, param, range(STEPS), place)
        return all(torch.equal(sharded.state[param][key].full_tensor(), value) for key, value in expected.items())

    assert all(in_world(2, body))


def test_a_checkpoint_moves_between_worlds() -> None:
    """State is sharded as the stack is; a whole one is cut again."""
    dense = nn.Parameter(start())
    optimizer = build("galore-lazy", [dense], stacked=True)
    train(optimizer, dense, range(4))
    saved, weight = copy.deepcopy(optimizer.state_dict()), dense.detach().clone()
    train(optimizer, dense, range(4, STEPS))

    def body() -> float:
        mesh = init_device_mesh("cpu", (3,))

        def place(tensor: Tensor) -> Tensor:
            return distribute_tensor(tensor.clone(), mesh, [Shard(0)])

        param = nn.Parameter(place(weight))
        resumed = build("galore-lazy", [param], stacked=True)
        resumed.load_state_dict(copy.deepcopy(saved))
        for value in resumed.state[param].values():
            assert value.placements == (Shard(0),)
        train(resumed, param, range(4, STEPS), place)
        return float((param.detach().full_tensor() - dense.detach()).abs().max())

    assert max(in_world(3, body)) <= 1e-12


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((8, 6), {"rank": 2}, r"needs parameters \(experts, m, n\), got one of shape \(8, 6\)"),
        ((4, 8, 6, 3), {"rank": 2}, r"got one of shape \(4, 8, 6, 3\)"),
        ((4, 8, 6), {"rank": "auto", "energy": 0.9}, "rank='auto' of GaLore"),
        ((4, 8, 6), {"rank": 2, "stacked": "yes"}, "Invalid stacked: 'yes'"),
    ],
)
def test_what_is_no_stack_is_refused(shape: tuple[int, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GaLore([{"params": [nn.Parameter(torch.zeros(shape))], "stacked": True, **options}])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda groups: GaLorePlus(groups), "residual='exact' of GaLorePlus"),
        (lambda groups: LowRank(groups, residual="additive"), "residual='additive' of LowRank"),
        (lambda groups: Frugal(groups, projector="blocks"), "projector='blocks' of Frugal"),
    ],
)
def test_methods_that_take_whole_parameters_refuse_stacks(make: Callable[..., Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        make([{"params": [nn.Parameter(torch.zeros(4, 8, 6))], "rank": 2, "stacked": True}])
    assert "param_groups(model, exclude=['experts'])" in str(error.value)


def test_gradients_of_stacks_are_not_accumulated_in_their_bases() -> None:
    optimizer = GaLore([{"params": [nn.Parameter(torch.zeros(4, 8, 6))], "rank": 2, "stacked": True}])
    with pytest.raises(ValueError, match="GaLore has stacks of matrices"):
        SubspaceAccumulator(optimizer)


def test_experts_of_transformers_are_recognised_and_train() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    groups = param_groups(model, rank=8)
    stacks = matched(model, groups).names("rank 8, stacked")
    assert [name.rpartition(".")[2] for name in stacks] == ["gate_up_proj", "down_proj"]
    optimizer = GaLore(groups, lr=1e-2)
    tokens, losses = torch.arange(16).view(2, 8), []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("build", [GaLore, Fira, Adafactor], ids=lambda cls: cls.__name__)
def test_a_stack_without_experts_is_stepped_beside_others(build: Any) -> None:
    params = [nn.Parameter(torch.ones(size, 12, 8)) for size in (0, 2)]
    options = {} if build is Adafactor else {"rank": 3}
    optimizer = build([{"params": params, "stacked": True, **options}], lr=1e-2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(params[1], torch.ones(2, 12, 8))


def test_gradients_beside_a_plain_stack_are_accumulated() -> None:
    matrix, stack = nn.Parameter(torch.ones(12, 8)), nn.Parameter(torch.ones(2, 12, 8))
    groups = [{"params": [stack], "rank": None, "stacked": True}, {"params": [matrix], "rank": 3}]
    accumulator = SubspaceAccumulator(GaLore(groups, lr=1e-2))
    for param in (matrix, stack):
        param.grad = torch.ones_like(param)
    accumulator.accumulate()
    accumulator.step()
    assert float(stack.detach().max()) < 1
