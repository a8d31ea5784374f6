"""Replicas, as under DistributedDataParallel: sending R for gradients, averaging released ones, checking equality."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..kernels import random
from .core.accumulation import OwnBasis
from .core.lifecycle import Lifecycle
from .core.released import Clip, Cycle
from .core.sharding import is_dtensor, local

CHUNK = 1 << 20
"""Words of a tensor that are summed at a time."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number, the integer dtype that reads its bits."""


class SubspaceReduction:
    """A communication hook of DistributedDataParallel that sends `R = G P` (a x r) where GaLore needs nothing else.

        model = DistributedDataParallel(model)
        model.register_comm_hook(SubspaceReduction(optimizer), SubspaceReduction.reduce)

    The mean over replicas is linear, `mean(G_i P) = mean(G_i) P`, so that the step is the same as with whole gradients
    up to rounding. Vectors, other plain parameters, and matrices whose refresh is due are reduced whole. A projected
    matrix sends `max(m, n) r` elements in the working dtype instead of `m n`. What stays in its `param.grad` is this
    replica's own gradient: the norm of all gradients, and clipping by it, are not those of the whole batch.

    Args:
        optimizer: One of this package that uses nothing of a gradient but G P between two refreshes, on every replica
            with the same state.
        group: The process group of the model; None is the default one.

    Raises:
        ValueError: The optimizer, or one of its groups, needs whole gradients.
    """

    def __init__(self, optimizer: Lifecycle, group: dist.ProcessGroup | None = None) -> None:
        self._compression = OwnBasis(optimizer)
        self._group = group
        optimizer.register_step_pre_hook(self._forget_unused)

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket of gradients over the replicas; pass this method to `register_comm_hook`."""
        if bucket.index() == 0:
            self._compression.release()
            self._compression.begin()
        params, grads = bucket.parameters(), bucket.gradients()
        lows = {i: low for i, p in enumerate(params) if (low := self._project(p, grads[i])) is not None}
        whole = [grad for i, grad in enumerate(grads) if i not in lows]
        sent = _packed([*lows.values(), *whole], bucket.buffer())
        work: Any = dist.all_reduce(sent.div_(dist.get_world_size(self._group)), group=self._group, async_op=True)

        def unpack(_: Any) -> Tensor:
            for tensor, part in zip([*lows.values(), *whole], _parts(sent, [*lows.values(), *whole]), strict=True):
                tensor.copy_(part)
            for index, low in lows.items():
                self._compression.deliver(0, params[index], low, 0)
            buffer: Tensor = bucket.buffer()
            return buffer

        done: torch.futures.Future[Tensor] = work.get_future().then(unpack)
        return done

    def _forget_unused(self, *_: Any) -> None:
        """Weights that no replica used have no gradient, which their bucket does not tell: they stand still."""
        for param in [param for param in self._compression.optimizer._low_grads if param.grad is None]:
            del self._compression.optimizer._low_grads[param]

    @torch.no_grad()
    def _project(self, param: Tensor, grad: Tensor) -> Tensor | None:
        return self._compression.low(param, grad.view(param.shape))


# DistributedDataParallel compares the annotations of a hook with types, and postponed ones are text.
_types = {"bucket": getattr(dist, "GradBucket", None), "return": torch.futures.Future[Tensor]}
SubspaceReduction.reduce.__annotations__ |= _types


def _packed(tensors: list[Tensor], like: Tensor) -> Tensor:
    """All tensors in one vector, in their dtype, or if dtypes differ in fp32 or wider."""
    dtype = (
        torch.promote_types(like.dtype, torch.float32) if any(t.dtype != like.dtype for t in tensors) else like.dtype
    )
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]) if tensors else like.new_zeros(0)


def _parts(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of a packed vector in the shapes of the tensors."""
    parts: tuple[Tensor, ...] = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class AveragedCycle(Cycle):
    """A cycle of gradient release in which gradients are averaged over replicas, one at a time, before they are used.

    What was summed up in the subspace is averaged there: R instead of G.

    Args:
        optimizer: The optimizer.
        compression: Sums gradients in the optimizer's subspace; None where every backward pass is a step.
        clip: How gradients are clipped.
        steps: Backward passes in a step.
        group: The replicas.
    """

    def __init__(
        self, optimizer: Lifecycle, compression: OwnBasis | None, clip: Clip, steps: int, group: dist.ProcessGroup
    ) -> None:
        super().__init__(optimizer, compression, clip, steps)
        self._group = group

    @torch.no_grad()
    def step(self, param: Tensor) -> None:
        """Average what has come of a parameter, step it, and free it."""
        grad = self._sums.get(param, param.grad)
        if grad is not None and not grad.is_sparse:
            dist.all_reduce(grad.mul_(1.0 / dist.get_world_size(self._group)), group=self._group)
        super().step(param)


def check_replicas(optimizer: Optimizer, group: dist.ProcessGroup | None = None) -> None:
    """Raise an error unless all replicas have the same weights and state, to the bit.

        if step % 1000 == 0:
            check_replicas(optimizer)

    Replicas that each find bases by themselves agree as long as their linear algebra does, which other GPUs or
    libraries need not; singular vectors turn a rounding into another sign. A call reads weights and state once and
    sends 16 bytes a parameter; all replicas must call it.

    Args:
        optimizer: Any optimizer.
        group: The replicas; None is the default group. For hybrid shards, that of the mesh dimension of copies.

    Raises:
        RuntimeError: Replicas differ; the message names the first parameter, what of it, and on which ranks.
        ValueError: Parameters are sharded, and no group says which ranks hold copies.
    """
    every = [param for each in optimizer.param_groups for param in each["params"]]
    if group is None and any(is_dtensor(param) for param in every):
        raise ValueError(
            "got sharded parameters (DTensor), of which ranks hold different pieces: pass the ranks that hold copies, "
            "check_replicas(optimizer, mesh['replicas'].get_group())"
        )
    if not every:
        return
    sums = torch.stack([_folded(_checksums(optimizer, param)).to(every[0].device) for param in every])
    ends = torch.cat([sums, -sums])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    differing = (ends[: len(every)] != -ends[len(every) :]).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(_difference(optimizer, every, differing, group))


def _difference(
    optimizer: Optimizer, every: list[Tensor], differing: list[int], group: dist.ProcessGroup | None
) -> str:
    """The message: what differs in the first parameter that does, on which ranks, and what to do about it."""
    param, size = every[differing[0]], dist.get_world_size(group)
    found: list[dict[str, int]] = [{}] * size
    dist.all_gather_object(found, {name: int(s) for name, s in _checksums(optimizer, param).items()}, group=group)
    parts = sorted(name for name in set().union(*found) if len({of.get(name) for of in found}) > 1)
    ranks = [rank for rank, of in enumerate(found) if of != found[0]]
    names = [name for each in optimizer.param_groups for name in each.get("param_names", [None] * len(each["params"]))]
    label = names[differing[0]] or f"parameter {differing[0]}"
    shared = getattr(optimizer, "replicas", None) is not None
    remedy = "see that gradients are averaged before every step, and load one checkpoint on all of them" + (
        "" if shared or "basis" not in parts else f"; {type(optimizer).__name__}(..., replicas=group) shares the bases"
    )
    return (
        f"replicas differ in {', '.join(parts)} of {label} {tuple(param.shape)}: ranks {ranks} of {size} are not as "
        f"rank 0; {len(differing)} of {len(every)} parameters differ. {remedy[0].upper()}{remedy[1:]}"
    )


@torch.no_grad()
def _checksums(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    held = optimizer.state.get(param, {})
    tensors = {"weight": param, **{name: held[name] for name in sorted(held) if isinstance(held[name], Tensor)}}
    return {name: _checksum(local(tensor)) for name, tensor in tensors.items()}


def _checksum(tensor: Tensor) -> Tensor:
    """A number, int64 of 62 bits, that depends on every bit of a tensor and on its place."""
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in torch.split(words, CHUNK):
        total = total * random.mix(1) + (part * _keys(str(tensor.device))[: len(part)]).sum()  # int64 wraps
    return total & ((1 << 62) - 1)


def _folded(sums: dict[str, Tensor]) -> Tensor:
    """One checksum of several, and of their names."""
    device = sums["weight"].device
    parts = [value.to(device) ^ zlib.crc32(name.encode()) for name, value in sums.items()]
    return (torch.stack(parts) * _keys(str(device))[: len(parts)]).sum() & ((1 << 62) - 1)


@lru_cache(maxsize=8)
def _keys(device: str) -> Tensor:
    """Random odd factors of words: in a plain sum two changes, such as of two signs, could cancel."""
    return random.bits(0, range(1), CHUNK, device)[0] | 1
