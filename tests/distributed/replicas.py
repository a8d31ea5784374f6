"""Replicas as ranks run them: R sent instead of gradients, gradients released, and what makes replicas differ."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lowmem.optim import Fira, GaLore, SubspaceReduction, check_replicas, enable_gradient_release
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import randn

STEPS = 20
METHODS: dict[str, Any] = {
    "galore": lambda params: GaLore(params, lr=1e-2, rank=4, update_proj_gap=6),
    "fira": lambda params: Fira(params, lr=1e-2, rank=4, update_proj_gap=6),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12)).double()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def batch(step: int, rank: int) -> Tensor:
    return randn(6, 24, seed=10 * step + rank, dtype=torch.float64)


def arrays(model: nn.Module) -> dict[str, Any]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


class Counting:
    """Counts the elements of every all-reduce of this process."""

    def __enter__(self) -> list[int]:
        self.run, sent = dist.all_reduce, []

        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            sent.append(tensor.numel())
            return self.run(tensor, *args, **options)

        dist.all_reduce = counted
        return sent

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self.run


def reduced(steps: int) -> tuple[dict[str, Any], list[int]]:
    """Train with SubspaceReduction: weights, and the elements that every backward pass sent."""
    model = DistributedDataParallel(net())
    optimizer = GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)
    model.register_comm_hook(SubspaceReduction(optimizer), SubspaceReduction.reduce)
    elements = []
    for step in range(steps):
        with Counting() as sent:
            loss_of(model, batch(step, dist.get_rank())).backward()
        elements.append(sum(sent))
        optimizer.step()
        optimizer.zero_grad()
    return arrays(model.module), elements


class Branches(nn.Module):
    """Two layers of which a batch may use one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.ModuleList(nn.Linear(24, 12) for _ in range(2)).double()

    def forward(self, x: Tensor, used: int) -> Tensor:
        return sum(branch(x) for branch in self.both[:used])


def branches(reduces: bool, unused: list[bool]) -> dict[str, Any]:
    """Train where this rank leaves the second branch out in every other step, or never does."""
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=5, weight_decay=0.1)
    if reduces:
        model.register_comm_hook(SubspaceReduction(optimizer), SubspaceReduction.reduce)
    for step in range(9):
        used = 1 if step % 2 and unused[dist.get_rank()] else 2
        (model(batch(step, dist.get_rank()), used) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return arrays(model.module)


def data_parallel(name: str, max_norm: float | None = None) -> dict[str, Any]:
    """Train with DistributedDataParallel."""
    model = DistributedDataParallel(net())
    optimizer = METHODS[name](model.parameters())
    for step in range(STEPS):
        loss_of(model, batch(step, dist.get_rank())).backward()
        if max_norm is not None:
            for param in model.parameters():
                nn.utils.clip_grad_norm_(param, max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return arrays(model.module)


def released(name: str, max_norm: float | None = None) -> tuple[dict[str, Any], int]:
    """Train replicas with gradient release: weights, and the largest number of gradients after a backward pass."""
    model = net()
    optimizer = METHODS[name](model.parameters())
    enable_gradient_release(model, optimizer, max_norm=max_norm, clip_by="matrix", replicas=dist.group.WORLD)
    kept = 0
    for step in range(STEPS):
        loss_of(model, batch(step, dist.get_rank())).backward()
        kept = max(kept, sum(param.grad is not None for param in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    check_replicas(optimizer)
    return arrays(model), kept


def accumulated(release: bool) -> tuple[dict[str, Any], list[int]]:
    """Train on two micro-batches a step: weights, and the elements that every step sent."""
    model = net()
    optimizer = METHODS["galore"](model.parameters())
    if release:
        enable_gradient_release(model, optimizer, accumulation_steps=2, replicas=dist.group.WORLD)
    else:
        model = DistributedDataParallel(model)
    elements = []
    for step in range(STEPS):
        with Counting() as sent:
            for half in range(2):
                (loss_of(model, batch(2 * step + half, dist.get_rank())) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        elements.append(sum(sent))
    return arrays(getattr(model, "module", model)), elements


def checked(name: str, where: tuple[int, str, int] | None, replicas: bool = False) -> str:
    """Train, change the (parameter, state) of a rank by one bit, and return what `check_replicas` says."""
    model = DistributedDataParallel(net())
    optimizer = METHODS[name](model.named_parameters())
    if replicas:
        optimizer.replicas = dist.group.WORLD
    for step in range(3):
        loss_of(model, batch(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    if where is not None and dist.get_rank() == where[2]:
        _tamper(list(model.parameters())[where[0]], optimizer, where[1])
    return _said(optimizer)


def _tamper(param: Tensor, optimizer: torch.optim.Optimizer, name: str) -> None:
    if name == "missing":
        del optimizer.state[param]["exp_avg"]
    elif name == "order":  # which sums of bits do not see
        first = optimizer.state[param]["basis"].view(-1)[:2]
        first.copy_(first.flip(0))
    else:
        value = param.data if name == "weight" else optimizer.state[param][name]
        flat = value.view(-1)
        flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1)


def _said(optimizer: torch.optim.Optimizer, group: Any = None) -> str:
    try:
        check_replicas(optimizer, group)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "equal"


def hybrid(tampered: bool) -> tuple[str, str]:
    """What is said of hybrid shards, without a group, and with that of the copies."""
    from .layouts import _fully as fully
    from .layouts import local, mesh, model, train

    over = mesh(2, 2)
    made = fully(model(), over)
    optimizer = METHODS["galore"](made.parameters())
    train(made, optimizer, range(2), "hsdp")
    if tampered and dist.get_rank() == 3:
        local(optimizer.state[made.head.weight]["exp_avg"]).view(-1)[0] += 1
    return _said(optimizer), _said(optimizer, over["replicas"].get_group())


def starting_apart() -> str:
    """What release says to replicas with other weights."""
    model = net()
    if dist.get_rank() == 1:
        model[0].weight.data += 1
    try:
        enable_gradient_release(model, METHODS["galore"](model.parameters()), replicas=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    return "enabled"
