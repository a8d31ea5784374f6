"""Other routes to a distributed optimizer: gradient release, Accelerate's exchange of parameters, ZeRO-1, FSDP1."""

from __future__ import annotations

from typing import Any
from unittest import mock

import lowmem.optim as optim
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from .layouts import backward, local, loss, mesh, model, shard, share, train, weights, whole
from .saving import all_state
from .work import GAP, LR, METHODS, RANK


def released(name: str, layout: str, options: dict[str, Any], steps: int) -> tuple[dict[str, Any], list[float]]:
    """Train with gradient release: weights, and the norm of the gradients of every step."""
    made = model()
    for block in made.blocks:  # within local heads, whose gradients are sums that come too late
        block.norm_q.requires_grad_(False)
        block.norm_k.requires_grad_(False)
    made = shard(made, layout)
    optimizer = METHODS[name](made)
    handle = optim.enable_gradient_release(made, optimizer, **options)
    norms = []
    for step in range(steps):
        loss(made, step, share(layout)).backward()
        if (step + 1) % options.get("accumulation_steps", 1) == 0:
            assert all(param.grad is None for param in made.parameters())
            norms.append(float(whole(handle.grad_norm)))
            optimizer.step()
            optimizer.zero_grad()
    return weights(made), norms


def offloaded(name: str, steps: int) -> tuple[dict[str, Any], set[str]]:
    """Train shards that are kept on the CPU: weights, and where weights, gradients and state are."""
    made = shard(model(), "offload")
    optimizer = METHODS[name](made)
    train(made, optimizer, range(steps), "offload")
    held = [value for state in optimizer.state.values() for value in state.values()]
    grads = [param.grad for param in made.parameters() if param.grad is not None]
    return weights(made), {local(tensor).device.type for tensor in (*made.parameters(), *grads, *held)}


def exchanged(name: str, steps: int) -> dict[str, Any]:
    """Train an optimizer made before its model was sharded, with parameters exchanged as by `Accelerator.prepare`."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    made = model()
    optimizer = METHODS[name](made)
    optimizer.load_state_dict(optimizer.state_dict())  # as its optimizer does when it is made
    old = {key: param.data_ptr() for key, param in made.named_parameters()}
    for group in optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            group["params"][index] = torch.empty(1, dtype=param.dtype)
            group["params"][index].data_ptr = param.data_ptr()
    shard(made, "fsdp")
    new = dict(made.named_parameters())
    fsdp2_switch_optimizer_parameters(optimizer, {old[key]: new[key] for key in new})
    train(made, optimizer, range(steps), "fsdp")
    held = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert all(isinstance(value, DTensor) for value in held)
    assert set(optimizer.state) == set(made.parameters())
    return weights(made)


OPTIONS: dict[str, dict[str, Any]] = {
    "GaLore": {"rank": RANK, "update_proj_gap": GAP, "projector": "svd"},
    "Fira": {"rank": RANK, "update_proj_gap": GAP, "projector": "svd"},
    "Flora": {"rank": RANK, "update_proj_gap": GAP, "beta1": 0.5},
    "Adafactor": {"beta1": 0.9},
    "AdamW8bit": {"state_dtype": "float32"},
}


def zero(cls: str, steps: int) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """Train with ZeRO-1: weights, the consolidated state of rank 0, and how many parameters this rank has state of."""
    made = DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(made.parameters(), optimizer_class=getattr(optim, cls), lr=LR, **OPTIONS[cls])
    train(made, optimizer, range(steps), "ddp")
    optimizer.consolidate_state_dict(to=0)
    kept = sum(1 for held in optimizer.optim.state.values() if held)
    state = None
    if dist.get_rank() == 0:
        twin = getattr(optim, cls)(model().parameters(), lr=LR, **OPTIONS[cls])
        twin.load_state_dict(optimizer.state_dict())
        state = all_state(twin)
    return weights(made), state, kept


def zero_dense(cls: str, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same in one process."""
    made = model()
    optimizer = getattr(optim, cls)(made.parameters(), lr=LR, **OPTIONS[cls])
    train(made, optimizer, range(steps))
    return weights(made), all_state(optimizer)


def zero_resumes(cls: str, middle: int, steps: int) -> bool:
    """A state dict of ZeRO-1 goes on as the run that wrote it, to the bit."""
    runs = []
    for again in (False, True):
        made = DistributedDataParallel(model())
        options = {"lr": LR, **OPTIONS[cls]}
        optimizer = ZeroRedundancyOptimizer(made.parameters(), optimizer_class=getattr(optim, cls), **options)
        train(made, optimizer, range(middle), "ddp")
        if again:
            optimizer.consolidate_state_dict(to=0)
            saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(saved, 0)
            optimizer = ZeroRedundancyOptimizer(made.parameters(), optimizer_class=getattr(optim, cls), **options)
            optimizer.load_state_dict(saved[0])
        train(made, optimizer, range(middle, steps), "ddp")
        runs.append(weights(made))
    return all(runs[0][key].tobytes() == runs[1][key].tobytes() for key in runs[0])


def fsdp1(original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    made = FullyShardedDataParallel(nn.Linear(12, 10), use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = optim.GaLore(made.parameters(), rank=2)
    made(torch.ones(3, 12)).sum().backward()
    optimizer.step()


def partial() -> None:
    weight = nn.Parameter(DTensor.from_local(torch.ones(8, 6), mesh(dist.get_world_size()), [Partial()]))
    weight.grad = torch.zeros_like(weight)
    optim.GaLore([weight], rank=2).step()


def columns(state_dtype: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.ones(64, 96), mesh(dist.get_world_size()), [Shard(1)]))
    weight.grad = torch.ones_like(weight)
    optim.AdamW8bit([weight], state_dtype=state_dtype).step()


def long_vector(state_dtype: str) -> tuple[bool, str]:
    """Step a norm's weight of 5000 elements: whether its gathered value is that of one process, and its state."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for sharded in (False, True):
        norm = nn.RMSNorm(5000)
        if sharded:
            fully_shard(norm, mesh=mesh(dist.get_world_size()))
        optimizer = optim.AdamW8bit(norm.parameters(), state_dtype=state_dtype, lr=1e-2)
        for seed in range(3):
            x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(seed))
            norm(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((whole(norm.weight.detach()), optimizer.state[norm.weight]["exp_avg"].dtype))
    return torch.allclose(found[0][0], found[1][0], rtol=1e-6, atol=0.0), str(found[1][1])


def elsewhere(name: str, steps: int) -> tuple[dict[str, Any], set[str]]:
    """Train shards that lie elsewhere than on the device of their mesh, as offloaded ones, while they are stepped."""
    made = shard(model(), "offload")
    optimizer = METHODS[name](made)
    for step in range(steps):
        made.zero_grad()
        backward(made, step, "offload")
        with mock.patch.object(DeviceMesh, "device_type", "meta"):
            optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    return weights(made), {local(tensor).device.type for tensor in held}
