"""Pretended ranks, of which this process is the first, and how parameters are sharded over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..optim import kept_shard
from ..optim.core.sharding import Sharding
from .errors import UserError

PARALLEL = ("fsdp2", "hsdp", "ddp")


@dataclass(frozen=True)
class World:
    """Ranks, and how parameters lie on them.

    Args:
        size: Ranks.
        parallel: "fsdp2" shards every parameter over all ranks, "hsdp" over `shard` of them, "ddp" not at all.
        shard: Ranks that share one copy, for "hsdp".
        kept: Shard the longer side of every matrix (`shard_placement_fn=kept_shard`), not the first dimension.
        replicas: Copies of "ddp" share the search for bases (`replicas=` of the optimizer).

    Raises:
        UserError: An option does not go with the others.
    """

    size: int
    parallel: str = "fsdp2"
    shard: int | None = None
    kept: bool = False
    replicas: bool = False

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise UserError(f"--parallel {self.parallel}: it must be {', '.join(PARALLEL)}")
        if (self.parallel == "hsdp") != (self.shard is not None):
            raise UserError("--shard goes with --parallel hsdp, as the ranks of one copy: --parallel hsdp --shard 8")
        if self.shard is not None and (self.shard < 1 or self.size % self.shard):
            raise UserError(f"--shard {self.shard}: it must divide --world {self.size}")
        if self.kept and self.parallel == "ddp":
            raise UserError("--kept chooses what is sharded, and ddp shards nothing: --parallel fsdp2 --kept")
        if self.replicas and self.parallel != "ddp":
            raise UserError("--replicas is for copies of whole parameters: --parallel ddp --replicas")

    @property
    def shards(self) -> int:
        """Pieces of a parameter."""
        return {"fsdp2": self.size, "hsdp": self.shard or 1, "ddp": 1}[self.parallel]

    def placements(self, param: Tensor) -> tuple[Any, ...]:
        """Where FSDP2 puts a parameter.

        Raises:
            UserError: Pieces of another dimension than the first would be uneven, which FSDP2 refuses.
        """
        from torch.distributed.tensor import Replicate, Shard

        shard = kept_shard(param) if self.kept else Shard(0)
        if shard.dim and param.shape[shard.dim] % self.shards:
            raise UserError(
                f"--kept: fully_shard needs dimension {shard.dim} of a {tuple(param.shape)} parameter to be a multiple "
                f"of {self.shards} ranks; leave --kept out, or --parallel hsdp --shard with a divisor"
            )
        return (Replicate(), shard) if self.parallel == "hsdp" else (shard,)


@dataclass(frozen=True)
class Cost:
    """What steps send and compute on a rank.

    Args:
        elements: Elements that collectives move: the whole of what is gathered, scattered or broadcast, and twice that
            of all-reduces. A ring of W ranks sends (W - 1) / W of them.
        bytes: The same in bytes.
        calls: Collectives.
        flops: Floating-point operations of matrix products.
    """

    elements: int = 0
    bytes: int = 0
    calls: int = 0
    flops: int = 0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """The sum, or with `times=-1` the difference."""
        return Cost(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(Cost)))


def own(world: World, elements: int, size: int) -> tuple[Cost, Cost]:
    """What the wrapper sends in a step for so many elements and bytes of weights, and what without resharding.

    fully sharded     all-gather W twice, reduce-scatter G       3 x weights a step
                      (`reshard_after_forward=False`)            2 x weights
    hybrid            and all-reduce G between the copies        2 x weights / ranks of a copy more
    replicated        all-reduce G                               2 x weights
    """
    if world.parallel == "ddp":
        times = 2 if world.size > 1 else 0
        both = Cost(times * elements, times * size)
        return both, both
    copies = 0 if world.shards == world.size else 2
    shared = 1 if world.shards > 1 else 0
    parts = [shared * times * n + copies * n // world.shards for times in (3, 2) for n in (elements, size)]
    return Cost(*parts[:2]), Cost(*parts[2:])


@contextmanager
def pretended(world: World) -> Iterator[Any]:
    """A device mesh of that size, whose collectives send nothing.

    Raises:
        UserError: This process is a rank of a real world.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a plan of many ranks pretends to be one of them: leave the process group first")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    try:
        shape = (world.size // world.shards, world.shards) if world.parallel == "hsdp" else (world.size,)
        yield init_device_mesh("meta", shape)
    finally:
        dist.destroy_process_group()


def place(model: nn.Module, mesh: Any, world: World) -> None:
    """Put sharded parameters without data in the place of a model's own, as `fully_shard` would."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and id(param) not in made:
                sharding = Sharding(mesh, world.placements(param), tuple(param.shape), param.device)
                piece = sharding.zeros(sharding.shape, param.dtype, sharding.placements)
                made[id(param)] = nn.Parameter(piece, requires_grad=param.requires_grad)
            if param is not None:
                module._parameters[name] = made[id(param)]


def refuse_together(context: Any, world: int) -> None:
    """Refuse flags of a plan of one GPU beside --world, and those of ranks without it.

    Args:
        context: What the command line parser knows.
        world: --world, 0 for one GPU.

    Raises:
        UserError: One was given.
    """
    single = ("batch_size", "length", "checkpointing", "release", "budget")
    for name in single if world else ("parallel", "shard", "kept", "replicas"):
        source, flag = context.get_parameter_source(name), "--" + name.replace("_", "-")
        if source is not None and source.name == "COMMANDLINE":
            ways = "leave it out" if world else "leave it out, or say --world 64"
            raise UserError(f"{flag} is for plans {'of one GPU' if world else 'of many ranks'}: {ways}")
