"""What ranks do for a test: functions that are sent to them by name, and return numbers and arrays."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import lowmem.optim as optim
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from .layouts import HEADS, Build, Family, backward, model, shard, train, weights

RANK, GAP, LR = 4, 4, 1e-2
STEPS = 10
"""Three refreshes."""
LONG, LONG_GAP = 20, 8
"""The same in a longer run."""


def _plain(cls: Callable[..., Any], **options: Any) -> Build:
    return lambda made, gap=GAP: cls(made.parameters(), **{"lr": LR, **options})


def _low(cls: Callable[..., Any], **options: Any) -> Build:
    """A method with a schedule of refreshes."""
    options = {"lr": LR, **options} if "density" in options else {"lr": LR, "rank": RANK, **options}
    return lambda made, gap=GAP: cls(made.parameters(), update_proj_gap=gap, **options)


def _heads(made: nn.Module, gap: int = GAP) -> torch.optim.Optimizer:
    """GaLore+, queries and keys by heads; the entries of its residual are chosen after three steps."""
    named = list(made.named_parameters())
    heads = [param for name, param in named if name.endswith(("q.weight", "k.weight")) and param.ndim > 1]
    rest = [param for _, param in named if all(param is not head for head in heads)]
    groups = [{"params": heads, "num_heads": HEADS, "rank": RANK}, {"params": rest, "rank": RANK}]
    return optim.GaLorePlus(groups, update_proj_gap=gap, lr=LR, residual_warmup=3, residual_density=0.05)


METHODS: dict[str, Build] = {
    "galore": _low(optim.GaLore, scale=1.0),
    "galore auto": _low(optim.GaLore, rank="auto", energy=0.9, projector="svd", rule="rmsprop", eps=1e-4),
    "galore track": _low(optim.GaLore, projector="track"),
    "galore lion": _low(optim.GaLore, projector="random", rule="lion", carry="reset", proj_type="reverse_std", lr=1e-3),
    "galore sgd": _low(optim.GaLore, projector="columns", rule="sgd", stagger=True, lr=1e-1),
    "galore adafactor": _low(optim.GaLore, projector="svd", rule="adafactor"),
    "galore full": _low(optim.GaLore, projector="svd", proj_type="full"),
    "galore dct": _low(optim.GaLore, projector="dct", weight_norm=True),
    "galore plus": _heads,
    "fira": _low(optim.Fira, projector="svd"),
    "low rank": _low(optim.LowRank, projector="svd", residual="norm", scale_mode="matrix"),
    "apollo": _low(optim.Apollo),
    "apollo mini": _low(optim.Apollo.mini, rank=1),
    "frugal": _low(optim.Frugal, projector="svd"),
    "frugal columns": _low(optim.Frugal, density=0.25),
    "frugal complement": _low(optim.Frugal, projector="random", free_space="complement", free_rule="sgd"),
    "frugal blocks": _low(optim.Frugal, projector="blocks", rank=2),
    "badam": _low(optim.BAdam, density=0.5, block_by="tensor"),
    "online": _plain(optim.OnlineSubspaceDescent, rank=RANK),
    "flora": _low(optim.Flora, beta1=0.5),
    "adafactor": _plain(optim.Adafactor, beta1=0.9),
    "adamw": _plain(optim.AdamW8bit, state_dtype="float32"),
    "adamw 8bit": _plain(optim.AdamW8bit),
    "galore 8bit": _low(optim.GaLore, rank=16, scale=1.0, state_dtype="8bit"),
}


def trained(name: str, layout: str, sizes: dict[str, int] | None, dtype: torch.dtype, steps: int = STEPS) -> Any:
    """Train, and return all weights of rank 0."""
    made = shard(model(sizes, dtype), layout)
    optimizer = METHODS[name](made)
    train(made, optimizer, range(steps), layout)
    found = weights(made)
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


def together(names: Sequence[str], layout: str, sizes: dict[str, int] | None, dtype: torch.dtype, steps: int) -> Any:
    """Train a model by each of the methods: the weights of each, or what it raised on this rank."""
    made = shard(Family([model(sizes, dtype) for _ in names]), layout)
    members = dict(zip(names, getattr(made, "module", made).models, strict=True))
    optimizers: dict[str, torch.optim.Optimizer] = {}
    failed: dict[str, str] = {}
    for step in range(steps):
        made.zero_grad()
        backward(made, step, layout)
        for name in names:
            try:
                if name not in optimizers:
                    optimizers[name] = METHODS[name](members[name], LONG_GAP)
                if name not in failed:
                    optimizers[name].step()
            except Exception:
                failed[name] = traceback.format_exc()
    return {name: failed.get(name) or weights(members[name]) for name in names}


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


def replicas(names: Sequence[str], sizes: dict[str, int] | None, steps: int) -> dict[str, tuple[int, int]]:
    """Train replicas by each of the methods: in how many entries of how many they differ from the first."""
    made = shard(Family([model(sizes, torch.float32) for _ in names]), "ddp")
    members = dict(zip(names, made.module.models, strict=True))
    optimizers = {name: METHODS[name](member) for name, member in members.items()}
    for step in range(steps):
        made.zero_grad()
        backward(made, step, "ddp")
        for optimizer in optimizers.values():
            optimizer.step()
    found = {}
    for name, optimizer in optimizers.items():
        held = [value for state in optimizer.state.values() for value in state.values()]
        every = torch.cat([t.detach().reshape(-1).double() for t in (*members[name].parameters(), *held)])
        first = every.clone()
        dist.broadcast(first, 0)
        found[name] = (int((every != first).sum()), len(every))
    return found
