"""Gradients of replicas, reduced in the subspace: R instead of G between two refreshes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .core.accumulation import Own
from .core.lifecycle import Lifecycle


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
        self._way = Own(optimizer)
        self._group = group

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket of gradients over the replicas, what `register_comm_hook` calls."""
        if bucket.index() == 0:
            self._way.release()
            self._way.begin()
        params, grads = bucket.parameters(), bucket.gradients()
        lows = {i: low for i, p in enumerate(params) if (low := self._project(p, grads[i])) is not None}
        whole = [grad for i, grad in enumerate(grads) if i not in lows]
        sent = _packed([*lows.values(), *whole], bucket.buffer())
        work: Any = dist.all_reduce(sent.div_(dist.get_world_size(self._group)), group=self._group, async_op=True)

        def unpack(_: Any) -> Tensor:
            for tensor, part in zip([*lows.values(), *whole], _parts(sent, [*lows.values(), *whole]), strict=True):
                tensor.copy_(part)
            for index, low in lows.items():
                self._way.deliver(0, params[index], low, 0)
            buffer: Tensor = bucket.buffer()
            return buffer

        done: torch.futures.Future[Tensor] = work.get_future().then(unpack)
        return done

    @torch.no_grad()
    def _project(self, param: Tensor, grad: Tensor) -> Tensor | None:
        return self._way.low(param, grad.view(param.shape))


# DistributedDataParallel compares the annotations of a hook with types, and postponed ones are text.
_types = {"bucket": getattr(dist, "GradBucket", None), "return": torch.futures.Future[Tensor]}
SubspaceReduction.reduce.__annotations__ |= _types


def _packed(tensors: list[Tensor], like: Tensor) -> Tensor:
    dtype = (
        torch.promote_types(like.dtype, torch.float32) if any(t.dtype != like.dtype for t in tensors) else like.dtype
    )
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]) if tensors else like.new_zeros(0)


def _parts(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts: tuple[Tensor, ...] = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
