"""Adafactor's whitened gradient `U = G / sqrt(V)` as Flora uses it: bad gradients count as zero."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...kernels.tiles import row_blocks, tiles
from . import adafactor, factored
from .apply import move_
from .bucket import Bucket
from .codec import State
from .target import writing
from .together import Make, Recipe


def whiten(b: Bucket, counts: Sequence[int], o: adafactor.Options) -> list[Recipe]:
    """Update V; return recipes for every `U = G / sqrt(V)`, (m, n) or of the shape of a plain parameter.

    A gradient that is not finite, or whose squares overflow, counts as zero and leaves V as it is.
    """
    grads = b.grads if b.plan.view is None else [b.natural(index) for index in range(len(b.params))]
    second = [{name: value for name, value in held.items() if name.startswith("exp_avg_sq")} for held in b.states]
    before = [{name: value.clone() for name, value in held.items()} for held in second]
    eps1 = o.eps1(b.params[0].dtype)
    white = adafactor.whiten(grads, second, counts, o, eps1, b.layout.natural)
    white = [make if isinstance(make, factored.Whitened) else Recipe(make, keep=b.layout.alone) for make in white]
    finite = torch.stack([_is_finite(make, held) for make, held in zip(white, second, strict=True)])
    fine = (b.layout.max_all((~finite).int()) == 0).unbind()  # only where every piece is finite
    for held, old, good in zip(second, before, fine, strict=True):
        if _may_be_bad(good):
            for name, value in held.items():
                value.copy_(torch.where(good, value, old[name]))
    made = (partial(_sound, make, good, negative=o.maximize) for make, good in zip(white, fine, strict=True))
    return [Recipe(make, keep=b.layout.alone) for make in made]


def _is_finite(white: Make, second: State) -> Tensor:
    """Whether U and V are finite. A factored U is not made for that: it is finite if V and its two factors are."""
    parts = (white.left, white.right) if isinstance(white, factored.Whitened) else (white(),)
    return torch.stack([part.sum() for part in (*parts, *second.values())]).isfinite().all()


def _may_be_bad(fine: Tensor) -> bool:
    return fine.device.type != "cpu" or not fine  # asking a GPU would synchronise


def _sound(white: Make, fine: Tensor, *, negative: bool) -> Tensor:
    """U, zero where it is not `fine`."""
    update = white()
    if _may_be_bad(fine):
        update.masked_fill_(~fine, 0.0)
    return update.neg_() if negative else update


def blend_(update: Tensor, past: Tensor, old: Tensor, beta1: float) -> None:
    """`U <- (1 - b1) U + b1 C P^T`, the product in the dtype of its factors."""
    if past.dtype == update.dtype:
        update.addmm_(past, old.T, beta=1 - beta1, alpha=beta1)
    elif update.stride(0) < update.stride(1):  # the transpose is in row-major order
        blend_(update.T, old, past, beta1)
    else:
        for rows in row_blocks(update):
            update[rows].lerp_((past[rows] @ old.T).to(update.dtype), beta1)


def move_whitened(b: Bucket, index: int, update: Tensor, size: adafactor.StepSize, o: adafactor.Options) -> None:
    """Clip Ubar in place, `W <- (1 - alpha wd) W - alpha Ubar`, tile by tile."""
    alpha, clip = size
    decay = 1 - o.weight_decay * alpha if o.weight_decay else 1.0
    for target in writing(b.params[index], b.states[index], o, b.positions[index], box=b.layout.box):
        whole = update.reshape(target.weight.shape)
        for rows, cols in tiles(whole):
            part = whole[rows, cols] if clip is None else whole[rows, cols].div_(clip)
            move_(target.part(rows, cols), part.mul_(alpha), decay)
