"""Adafactor's whitened gradient around a compressed momentum: what Flora does to one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.tiles import row_blocks
from . import adafactor, factored
from .apply import move_
from .bucket import Bucket
from .target import writing


def whiten(b: Bucket, index: int, o: adafactor.Options) -> Tensor:
    """Count the step and return `U = G / sqrt(V)`, (m, n) or the shape of a plain parameter.

    A gradient that is not finite, or whose squares overflow, counts as zero and leaves V as it is.
    """
    held, grad, layout = b.states[index], b.grads[index].to(b.dtype), b.layout.natural
    if b.plan.view is not None:
        grad = grad.reshape(b.view.m, b.view.n)
    held["step"] += 1
    names = [name for name in held if name.startswith("exp_avg_sq")]
    before = [held[name].clone() for name in names]
    update = adafactor.precondition(grad, held, int(held["step"]), o, o.eps1(b.params[index].dtype), layout)
    sums = torch.stack([update.sum(), *(held[name].sum() for name in names)])
    fine = layout.max_all((~sums.isfinite().all()).int()) == 0  # on every piece
    if fine.device.type != "cpu" or not fine:  # asking a GPU would synchronise
        for name, old in zip(names, before, strict=True):
            held[name].copy_(torch.where(fine, held[name], old))
        update.masked_fill_(~fine, 0.0)
    return update.neg_() if o.maximize else update


def blend_(update: Tensor, past: Tensor, old: Tensor, beta1: float) -> None:
    """`U <- (1 - b1) U + b1 C P^T`, the product in the dtype of its factors."""
    for rows in row_blocks(update, past.dtype):
        if past.dtype == update.dtype:
            update[rows].addmm_(past[rows], old.T, beta=1 - beta1, alpha=beta1)
        else:
            update[rows].mul_(1 - beta1).add_(past[rows] @ old.T, alpha=beta1)


def move_whitened(b: Bucket, index: int, update: Tensor, o: adafactor.Options) -> None:
    """Clip Ubar, `W <- (1 - alpha wd) W - alpha Ubar`."""
    param = b.params[index]
    alpha = adafactor.step_size(param, int(b.states[index]["step"]), o, b.layout)
    factored.clip_(update, o.clip_threshold, b.layout).mul_(alpha)
    for target in writing(param, b.states[index], o, b.positions[index], box=b.layout.box):
        update = update.reshape(target.weight.shape)
        move_(target, update, 1 - o.weight_decay * alpha if o.weight_decay else 1.0)
