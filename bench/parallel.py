"""A run on several processes: who reads which batches, how the model is shared out, what is reduced."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

PARALLEL = ("none", "ddp", "fsdp2", "hsdp", "tp")
START = "torchrun --nproc-per-node N -m lowmem.bench pretrain --parallel"
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; by default there is one.

    Args:
        mode: One of `PARALLEL`: `ddp` copies the model, `fsdp2` shards it over all ranks, `hsdp` over each half of
            them, `tp` splits its matrices, so that all ranks see the same batches.
        rank: Of this process.
        size: Number of processes.
    """

    mode: str = "none"
    rank: int = 0
    size: int = 1

    @property
    def device(self) -> torch.device:
        """Where this process computes: on several GPUs its own is the current one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def readers(self) -> int:
        """Number of ranks that read different batches."""
        return 1 if self.mode == "tp" else self.size

    def share(self, count: int) -> range:
        """Which of `count` micro-batches this rank reads."""
        return range(self.rank % self.readers, count, self.readers)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks."""
        if self.mode == "none":
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.size

    def most(self, *values: float) -> list[float]:
        """The largest over ranks of each value."""
        if self.mode == "none":
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        kept: list[float] = found.tolist()
        return kept

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank when all have come here, and return its result on all.

        Raises:
            UserError: `work` raises it on the first rank, and so on all.
        """
        if self.mode == "none":
            return work()
        dist.barrier()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except UserError as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result

    def put(self, build: Callable[[], nn.Module], projected: bool) -> nn.Module:
        """Build a model, the same on every rank, and share it out, by `kept_shard` where it will be projected."""
        if self.mode in ("none", "ddp"):
            model = build().to(self.device)
            # Buckets are the gradients: there is no second copy of them.
            copy = nn.parallel.DistributedDataParallel
            return copy(model, gradient_as_bucket_view=True) if self.mode == "ddp" else model
        from torch.distributed.device_mesh import init_device_mesh

        shape = (2, self.size // 2) if self.mode == "hsdp" else (self.size,)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        # Sharded where it was built, so that no device ever holds the whole of it.
        shared: nn.Module = _split(build(), mesh) if self.mode == "tp" else _shard(build(), mesh, projected)
        return shared.to(self.device)


@contextmanager
def started(mode: str) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, gloo on a CPU and NCCL on GPUs, and leave them at the end.

    Ranks of one machine fail alike, so that only the first of each says why.

    Raises:
        UserError: `mode` is unknown, or is not what the process was started for.
    """
    here = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        _check(mode, int(os.environ.get("WORLD_SIZE", "0")))
        yield Ranks() if mode == "none" else _join(mode, here)
    except UserError as error:
        if here == 0:
            raise
        # torchrun ends all processes as soon as one has failed: let the first speak.
        time.sleep(1)
        sys.exit(error.exit_code)
    finally:
        if mode != "none" and dist.is_initialized():
            dist.destroy_process_group()


def _join(mode: str, here: int) -> Ranks:
    backend, gpus = "gloo", torch.cuda.device_count()
    if gpus:
        if here >= gpus:
            raise UserError(f"process {here + 1} of this machine finds {gpus} GPUs: write --nproc-per-node {gpus}")
        torch.cuda.set_device(here)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    return Ranks(mode, dist.get_rank(), dist.get_world_size())


def _check(mode: str, size: int) -> None:
    if mode not in PARALLEL:
        raise UserError(f"--parallel is {mode}: it must be {', '.join(PARALLEL[:-1])} or {PARALLEL[-1]}")
    if mode == "none" and size > 1:
        raise UserError(f"{size} processes were started, which would all do the same: add --parallel ddp")
    if mode != "none" and not size:
        raise UserError(f"--parallel {mode} needs processes: {START} {mode}")
    if mode == "hsdp" and (size < 4 or size % 2):
        raise UserError(f"--parallel hsdp shards over each half of 4 or more ranks, got {size}: write --parallel fsdp2")


def deferred(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulate without a reduction, of which the last micro-batch does one for all.

    Only for copies: whoever shards a model has no room for whole gradients, and sums pieces after every micro-batch.
    """
    defer: AbstractContextManager[None] = getattr(model, "no_sync", nullcontext)()
    return defer


def clip(model: nn.Module, limit: float) -> float:
    """Clip gradients by the norm of all of them, wherever they lie, and return it."""
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _shard(model: Any, mesh: Any, projected: bool) -> Any:
    from torch.distributed.fsdp import fully_shard

    from ..optim import kept_shard

    size = mesh.size(-1)

    def place(param: Tensor) -> Any:
        """The side that projections keep, where FSDP2 can: it shards only the first dimension unevenly."""
        kept = kept_shard(param)
        return kept if param.shape[kept.dim] % size == 0 else None

    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=place if projected else None)
    return model


def _split(model: Any, mesh: Any) -> Any:
    """Attention by heads, feed-forward layers by their inner side; what is left is whole on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config, size = model.config, mesh.size()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise UserError(f"--parallel tp splits {name}, which is {getattr(config, name)}, into {size} equal parts")
    if config.tie_word_embeddings:
        raise UserError('--parallel tp unties embeddings and head: set "tie_word_embeddings": false, or use fsdp2')
    if getattr(config, "attention_dropout", 0):
        raise UserError('--parallel tp drops the same of all heads: set "attention_dropout": 0, or use fsdp2')

    def enter(_: nn.Module, inputs: Any, __: Any) -> Any:
        return tuple(DTensor.from_local(x, mesh, (Replicate(),), run_check=False) for x in inputs)

    def leave(_: nn.Module, output: Any, __: Any) -> Any:
        return output.to_local()

    plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS}
    plan |= {name: RowwiseParallel() for name in ROWS}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    for part in model.modules():
        own = list(part.parameters(recurse=False))
        if own and not any(isinstance(param, DTensor) for param in own):
            distribute_module(part, mesh, None, enter, leave)
    return model
