"""FRUGAL's state-free part: a memoryless rule on what the subspace leaves of a gradient.

    E = A - R P^T,  F = free(E)                              "ambient" space
    F <- F - F P P^T                                         "complement": what lies inside the subspace is taken out
    W <- (1 - lr wd) W - lr s_p (N P^T + s_f F)

A choice of entries leaves all others as they are: E is A there. Nothing of the size of a weight is made: the weight is
walked over in tiles, rounded once, and two cases fold into the low-rank direction:

    sgd           N P^T + s_f (A - R P^T)   = (N - s_f R) P^T + s_f A
    complement    N P^T + s_f (F - F P P^T) = (N - s_f F P) P^T + s_f F
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .apply import count_step, move_, rates
from .basis import INDEX
from .bucket import Bucket
from .plain import plain_
from .tiles import Factors, Residual, product, tiles
from .verbs import project_back_

FREE_RULES = ("signsgd", "sgd", "none", "freeze")
"""Values of the option `free_rule`."""
FREE_SPACES = ("ambient", "complement")
"""Values of the option `free_space`."""


@dataclass(frozen=True, slots=True)
class Free:
    """What is done with the state-free part.

    Args:
        rule: "signsgd", "sgd", "none", or "freeze" for whole tensors that do not even decay.
        scale: s_f.
        complement: Take out what the rule puts into the subspace.
    """

    rule: str
    scale: float
    complement: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Free:
        """Read it from the options of a group."""
        return cls(group["free_rule"], group["free_scale"], group["free_space"] == "complement")


def silence_(b: Bucket, low: Tensor) -> Tensor:
    """Zero R (k, a, r) of every matrix whose gradient is not finite anywhere, or whose square overflows.

    Returns:
        Which gradients are sound (k,).
    """
    sound = sound_gradients(b)
    low.masked_fill_(~sound[:, None, None], 0.0)
    return sound


def sound_gradients(b: Bucket) -> Tensor:
    """Tell which gradients have a finite norm (k,), without a synchronisation."""
    norms = [torch.linalg.vector_norm(grad, dtype=b.dtype) for grad in b.grads]
    return torch.stack(norms).isfinite()


def undivided_(b: Bucket, free: Free) -> bool:
    """Step matrices that are state-full or state-free as a whole; tell whether these are.

    Everything: the plain rule with the rate `lr s_p`, where decay keeps `lr`. Nothing: the free rule on A.
    """
    if b.view.rank == b.view.b:
        scale, hyper = b.hyper.scale, b.hyper
        if scale != 1.0:
            hyper = replace(hyper, lr=hyper.lr * scale, weight_decay=hyper.weight_decay / scale)
        plain_(replace(b, hyper=hyper))
    elif b.view.rank == 0:
        count_step(b)
        if free.rule != "freeze":
            _free_(b, free)
    return b.view.rank in (0, b.view.b)


def _free_(b: Bucket, free: Free) -> None:
    """`W <- (1 - lr wd) W - lr s_p s_f free(A)`."""
    sound = sound_gradients(b)
    for index, weight in enumerate(b.weights()):
        lr, decay = rates(b, index)
        if free.rule == "none":
            weight.mul_(decay)
            continue
        residual = Residual(b.matrix(index), sound[index], free.rule, b.hyper.maximize, b.dtype)
        _walk_(weight, residual, decay, lr * b.hyper.scale * free.scale)


def descend_(b: Bucket, step: Tensor, low: Tensor, sound: Tensor, free: Free) -> None:
    """Move the weights, `W <- (1 - lr wd) W - lr s_p (N P^T + s_f free(A - R P^T))`.

    Args:
        b: The bucket.
        step: N (k, a, r), overwritten.
        low: R (k, a, r).
        sound: Which gradients are finite (k,).
        free: The free rule.
    """
    if free.rule == "none":
        project_back_(b, step)
        return
    for index, weight in enumerate(b.weights()):
        residual = Residual(b.matrix(index), sound[index], free.rule, b.hyper.maximize, b.dtype)
        if b.basis is INDEX:
            _choose_(b, index, weight, residual, step[index], free)
        else:
            _add_(b, index, weight, residual, (step[index], low[index]), free)


def _choose_(b: Bucket, index: int, weight: Tensor, residual: Residual, step: Tensor, free: Free) -> None:
    """Entries of an index basis follow N, all others the free rule."""
    lr, decay = rates(b, index)
    rate, chosen = lr * b.hyper.scale, b.states[index]["basis"].long()
    columns = weight.index_select(1, chosen).to(b.dtype).mul_(decay).sub_(step.mul_(rate))
    _walk_(weight, residual, decay, rate * free.scale)
    weight.index_copy_(1, chosen, columns.to(weight.dtype))


def _add_(b: Bucket, index: int, weight: Tensor, residual: Residual, split: tuple[Tensor, Tensor], free: Free) -> None:
    """`W <- decay W - lr s_p (N P^T + s_f F)` with a dense basis; `split` is N and R."""
    step, low = split
    lr, decay = rates(b, index)
    held = b.states[index]
    basis, left = b.basis.columns(held, b.view.b, b.gemm_dtype), held.get("basis_left")
    if free.rule == "sgd":
        step.sub_(low, alpha=free.scale)
    else:
        residual = replace(residual, factors=Factors.of(residual.matrix, _spread(left, low), basis))
        if free.complement:
            step.sub_(_inside(residual, basis, left, low.shape), alpha=free.scale)
    _walk_(weight, residual, decay, lr * b.hyper.scale, (free.scale, _spread(left, step), basis))


def _inside(residual: Residual, basis: Tensor, left: Tensor | None, shape: torch.Size) -> Tensor:
    """`F P` (a, r), for a full projection `Q^T F P` (r, r): what the free rule puts into the subspace."""
    inside = torch.zeros(shape, dtype=residual.dtype, device=basis.device)
    for rows, cols in tiles(residual.matrix):
        part = product(residual.tile(rows, cols), basis[cols], basis.dtype)
        if left is None:
            inside[rows] += part
        else:
            inside += product(left[rows].T, part, basis.dtype)
    return inside


def _walk_(
    weight: Tensor,
    residual: Residual,
    decay: float | Tensor,
    rate: float | Tensor,
    within: tuple[float, Tensor, Tensor] | None = None,
) -> None:
    """`W <- decay W - rate F`, or with (s_f, N, P) `W <- decay W - rate (N P^T + s_f F)`, each tile rounded once."""
    for rows, cols in tiles(weight):
        update = residual.tile(rows, cols)
        if within is not None:
            scale, step, basis = within
            update.mul_(scale).add_(product(step[rows], basis[cols].T, basis.dtype))
        move_(weight[rows, cols], update.mul_(rate), decay)


def _spread(left: Tensor | None, low: Tensor) -> Tensor:
    """`Q R` (a, r) for a full projection, else R."""
    return low if left is None else left.to(low.dtype) @ low
