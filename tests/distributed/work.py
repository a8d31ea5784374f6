"""What ranks do for a test: functions that are sent to them by name, and return numbers and arrays."""

from __future__ import annotations

from typing import Any

import lowmem.optim as optim
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from .layouts import Build, model, shard, train, weights

RANK, GAP, LR = 4, 4, 1e-2
STEPS = 10
"""Three refreshes."""

METHODS: dict[str, Build] = {
    "galore": lambda m: optim.GaLore(m.parameters(), rank=RANK, update_proj_gap=GAP, lr=LR, scale=1.0),
    "galore svd": lambda m: optim.GaLore(m.parameters(), rank=RANK, update_proj_gap=GAP, lr=LR, projector="svd"),
    "galore auto": lambda m: optim.GaLore(m.parameters(), rank="auto", energy=0.9, update_proj_gap=GAP, lr=LR),
    "fira": lambda m: optim.Fira(m.parameters(), rank=RANK, update_proj_gap=GAP, lr=LR),
    "frugal": lambda m: optim.Frugal(m.parameters(), rank=RANK, update_proj_gap=GAP, lr=LR, projector="svd"),
    "frugal columns": lambda m: optim.Frugal(m.parameters(), density=0.25, update_proj_gap=GAP, lr=LR),
    "online": lambda m: optim.OnlineSubspaceDescent(m.parameters(), rank=RANK, lr=LR),
    "flora": lambda m: optim.Flora(m.parameters(), rank=RANK, lr=LR, update_proj_gap=GAP, beta1=0.5),
    "adafactor": lambda m: optim.Adafactor(m.parameters(), lr=LR, beta1=0.9),
    "apollo": lambda m: optim.Apollo(m.parameters(), rank=RANK, update_proj_gap=GAP, lr=LR),
    "adamw": lambda m: optim.AdamW8bit(m.parameters(), lr=LR, state_dtype="float32"),
    "adamw 8bit": lambda m: optim.AdamW8bit(m.parameters(), lr=LR),
    "galore 8bit": lambda m: optim.GaLore(
        m.parameters(), rank=16, update_proj_gap=GAP, lr=LR, scale=1.0, state_dtype="8bit"
    ),
}


def trained(name: str, layout: str, sizes: dict[str, int] | None, dtype: torch.dtype, steps: int = STEPS) -> Any:
    """Train, and return all weights of rank 0."""
    made = shard(model(sizes, dtype), layout)
    optimizer = METHODS[name](made)
    train(made, optimizer, range(steps), layout)
    found = weights(made)
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


def llama(layout: str, steps: int) -> Any:
    """Train transformers' LLaMA, all ranks on the same batch, clipped by its whole norm."""
    from tests.tiny import batch
    from tests.tiny import llama as build

    made = build(dtype=torch.float64)
    if layout == "fsdp":
        for layer in made.model.layers:
            fully_shard(layer)
        fully_shard(made)
    groups = optim.param_groups(made, rank=RANK, update_proj_gap=GAP, weight_decay_exclude=True)
    optimizer = optim.GaLore(groups, lr=LR)
    for step in range(steps):
        made(**batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(made)


def replicas(name: str, sizes: dict[str, int] | None, steps: int) -> list[int]:
    """Train replicas, and count the weights and state in which each differs from the first, of how many."""
    made = shard(model(sizes, torch.float32), "ddp")
    optimizer = METHODS[name](made)
    train(made, optimizer, range(steps), "ddp")
    held = [value for state in optimizer.state.values() for value in state.values()]
    every = torch.cat([t.detach().reshape(-1).double() for t in (*made.parameters(), *held)])
    first = every.clone()
    dist.broadcast(first, 0)
    return [int((every != first).sum()), len(every)]
