"""A LLaMA of uneven sizes, the ways to shard it, and training it on rows of one whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lowmem.optim import kept_shard
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

HEADS = 4
BATCH, LENGTH = 8, 6

Build = Callable[..., torch.optim.Optimizer]


class Block(nn.Module):
    """Attention with norms of queries and keys, and a feed-forward layer, here a bottleneck."""

    def __init__(self, hidden: int, head: int, inner: int) -> None:
        super().__init__()
        self.head = head
        self.norm, self.norm_2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.norm_q, self.norm_k = nn.RMSNorm(head), nn.RMSNorm(head)
        self.q, self.k, self.v = (nn.Linear(hidden, HEADS * head, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * head, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(-2))
        return x + self.down(functional.silu(self.up(self.norm_2(x))))


class Model(nn.Module):
    """Blocks between an embedding and a head: of 4 ranks some have no row of a norm or of the bottleneck."""

    def __init__(self, hidden: int = 30, head: int = 6, inner: int = 6, vocabulary: int = 51, depth: int = 1) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, head, inner) for _ in range(depth))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Family(nn.Module):
    """Models that are sharded, and run, as one: their weights and gradients travel together."""

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.vocabulary = models[0].vocabulary

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all models."""
        return [block for member in self.models for block in member.blocks]  # type: ignore[union-attr]

    def forward(self, tokens: Tensor) -> list[Tensor]:
        return [member(tokens) for member in self.models]


LARGE = {"hidden": 70, "head": 18, "inner": 258, "vocabulary": 83}
"""Sizes at which weights, and at rank 16 low-rank moments, are coded in 8 bits."""
EVEN = {"hidden": 32, "head": 8, "inner": 48, "vocabulary": 52}
"""Sizes that 4 ranks divide."""


def model(sizes: dict[str, int] | None = None, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    made = Model(**(sizes or {}))
    for param in made.parameters():
        if param.ndim == 1:
            nn.init.normal_(param, 0.8, 0.2)
    return made.to(dtype)


def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


ONE_MESH: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "kept": {"shard_placement_fn": kept_shard},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}
"""Layouts of FSDP2 over one dimension, and their options."""


def shard(made: Model | Family, layout: str) -> nn.Module:
    """Shard a model over all ranks: `dense`, `ddp`, `fsdp`, `offload`, `kept`, `hsdp`, `tp` or `fsdp tp`."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "ddp":
        return DistributedDataParallel(made)
    if layout in ONE_MESH:
        return _fully(made, mesh(world), **ONE_MESH[layout])
    if layout == "hsdp":
        return _fully(made, mesh(2, world // 2))
    if layout == "tp":
        return _parallel(made, mesh(world))
    if layout == "fsdp tp":
        both = mesh(world // 2, 2)
        return _fully(_parallel(made, both["shards"]), both["replicas"])
    return made


def _fully(made: nn.Module, over: DeviceMesh, **options: Any) -> nn.Module:
    fully_shard(list(made.blocks), mesh=over, **options)  # type: ignore[arg-type]
    return fully_shard(made, mesh=over, **options)


def _parallel(made: nn.Module, over: DeviceMesh) -> nn.Module:
    made.heads = over.get_group()  # type: ignore[assignment]
    first = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    for block in made.blocks:  # type: ignore[union-attr]
        parallelize_module(block, over, first | {name: RowwiseParallel() for name in ("o", "down")})
    return made


def share(layout: str) -> tuple[int, int]:
    """Which of how many parts of a batch this rank sees."""
    if layout == "dense":
        return 0, 1
    rank, world = dist.get_rank(), dist.get_world_size()
    return {"tp": (0, 1), "fsdp tp": (rank // 2, world // 2)}.get(layout, (rank, world))


def loss(made: nn.Module, step: int, part: tuple[int, int] = (0, 1)) -> Tensor:
    """Of this rank's rows of the batch of a step; of several models the sum."""
    vocabulary = getattr(made, "module", made).vocabulary
    tokens = torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step % 5))
    tokens = tokens.chunk(part[1])[part[0]]
    every = made(tokens)
    return sum(
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for logits in (every if isinstance(every, list) else [every])
    )


def train(made: nn.Module, optimizer: torch.optim.Optimizer, steps: range, layout: str = "dense") -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(made, step, layout)
        optimizer.step()


def backward(made: nn.Module, step: int, layout: str) -> None:
    """Find the gradients of a step."""
    loss(made, step, share(layout)).backward()
    if layout.endswith("tp"):
        _agree(made)


def _agree(made: nn.Module) -> None:
    """Norms within local heads have a part of their gradient: who parallelises a model by hand sums it."""
    names = ("norm_q.weight", "norm_k.weight")
    parts = [local(param.grad) for name, param in made.named_parameters() if name.endswith(names)]
    total = torch.cat(parts)
    dist.all_reduce(total, group=made.heads)
    for part, summed in zip(parts, total.split([len(part) for part in parts]), strict=True):
        part.copy_(summed)


def local(tensor: Any) -> Any:
    """This rank's piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever it lies."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(made: nn.Module) -> dict[str, Any]:
    """All weights, as arrays."""
    return {name.removeprefix("module."): whole(p.detach()).numpy().copy() for name, p in made.named_parameters()}
