"""Moments by torch's operations: Adam on a list of matrices in one launch, and coded moments tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import blockwise, reference
from .blockwise import Blocks, dequantise, quantise_
from .random import Seed
from .reference import Blockwise, Count
from .rounding import Target
from .tiles import tiles

ROOT = torch.finfo(torch.float32).max ** 0.5
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def has_fused_adam(tensor: Tensor) -> bool:
    """Tell whether torch's fused Adam runs on this tensor."""
    return tensor.device.type in _FUSED_DEVICES and tensor.is_floating_point()


def adam(
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    counts: Sequence[Count],
    out: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    *,
    raw_eps: bool = False,
) -> None:
    """Compute `lowmem.kernels.reference.adam`: one fused pass over all tensors of equal step count.

    The kernel updates a parameter by `-lr N`; a zero parameter and lr = -1 leave the direction N itself.

    Raises:
        ValueError: `raw_eps` with counts on the device, for the kernel takes a number.
    """
    for chosen, steps, t in _launches(counts, out):
        directions = [out[i].zero_() for i in chosen]
        torch._fused_adamw_(
            directions,
            [grads[i] for i in chosen],
            [moments[0][i] for i in chosen],
            [moments[1][i] for i in chosen],
            [],
            steps,
            lr=-1.0,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps / (1 - betas[1] ** _number(t)) ** 0.5 if raw_eps else eps,
            amsgrad=False,
            maximize=False,
        )


def _launches(counts: Sequence[Count], out: list[Tensor]) -> Iterator[tuple[list[int], list[Tensor], Count]]:
    """Tensors that share a launch, with their counts on the device, where the kernel reads them."""
    known = [count for count in counts if isinstance(count, Tensor)]
    if known:
        yield list(range(len(counts))), known, known[0]
        return
    for t in set(counts):
        chosen = [i for i, count in enumerate(counts) if count == t]
        # full() gets it there without a synchronisation.
        count = torch.full((), float(t), dtype=torch.float32, device=out[chosen[0]].device)
        yield chosen, [count] * len(chosen), t


def _number(t: Count) -> int:
    if isinstance(t, Tensor):
        raise ValueError("got step counts on a device, whose eps is not a number: pass numbers, or raw_eps=False")
    return t


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[Count],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adam_blockwise` in pieces that stay in the cache."""
    for grad, first, second, t, direction, seed in zip(grads, *moments, counts, out, how.seeds, strict=True):
        for rows, cols in tiles(grad):
            part = direction[rows, cols]
            blocks = first.part(rows, cols, how.form), second.part(rows, cols, how.form)
            at = rows.start, cols.start
            part.copy_(_adam_tile(grad[rows, cols], blocks, (t, seed, at), how))


def adamw_blockwise_(
    target: Target,
    grad: Tensor,
    moments: tuple[Blocks, Blocks],
    t: Count,
    lr: float | Tensor,
    decay: float | Tensor,
    how: Blockwise,
    adam: Callable[..., None] | None = None,
) -> None:
    """Compute `lowmem.kernels.reference.adamw_blockwise_` in pieces that stay in the cache.

    `adam` takes the place of our `adam_blockwise`; it must round nothing at random.
    """
    for rows, cols in tiles(grad):
        blocks = moments[0].part(rows, cols, how.form), moments[1].part(rows, cols, how.form)
        part = target.part(rows, cols)
        if adam is None:
            step = _adam_tile(grad[rows, cols], blocks, (t, how.seeds[0], (rows.start, cols.start)), how)
        else:
            step = torch.empty(part.weight.shape, dtype=torch.float32, device=part.weight.device)
            adam([grad[rows, cols]], ([blocks[0]], [blocks[1]]), [t], [step], how)
        part.write(part.edit(decay).sub_(step.mul_(lr)))


def _adam_tile(
    grad: Tensor, moments: tuple[Blocks, Blocks], when: tuple[Count, Seed, tuple[int, int]], how: Blockwise
) -> Tensor:
    """One tile: the direction, in a tensor of its own."""
    t, seed, at = when
    m, v = dequantise(moments[0], how.form, signed=True), dequantise(moments[1], how.form, signed=False)
    seen, direction = _finite(grad.float()).contiguous(), torch.empty_like(m)
    step = adam if has_fused_adam(m) else reference.adam
    step([seen], ([m], [v]), [t], [direction], how.betas, how.eps, raw_eps=how.raw_eps)
    quantise_(moments[0], m, how.form, signed=True)
    quantise_(moments[1], v, how.form, signed=False, seed=seed, first=at)
    return direction


def lion_blockwise(grads: Sequence[Tensor], moments: Sequence[Blocks], out: Sequence[Tensor], how: Blockwise) -> None:
    """Compute `lowmem.kernels.reference.lion_blockwise` in pieces that stay in the cache."""
    for grad, moment, direction in zip(grads, moments, out, strict=True):
        for rows, cols in tiles(grad):
            blocks = moment.part(rows, cols, how.form)
            m, step = dequantise(blocks, how.form, signed=True), torch.empty_like(grad[rows, cols], dtype=torch.float32)
            reference.lion(_finite(grad[rows, cols].float()), m, step, how.betas)
            direction[rows, cols] = step
            quantise_(blocks, m, how.form, signed=True)


def _finite(grad: Tensor) -> Tensor:
    """Entries whose squares are not finite count as zero."""
    if grad.device.type in blockwise.ASKED and torch.linalg.vector_norm(grad) < ROOT:
        return grad
    return torch.where(grad.square().isfinite(), grad, 0.0)
