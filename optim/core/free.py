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

from ...kernels.project_back import piece
from ...kernels.reference import Scaled, Signed
from ...kernels.reference import residual as remainder
from ...kernels.statistics import row_squares
from ...kernels.tiles import tiles
from . import linalg
from .apply import count_step
from .basis import DENSE
from .bucket import Bucket
from .plain import plain_
from .together import reduced
from .verbs import move_back_, scaled_rows

FREE_RULES = ("signsgd", "sgd", "none", "freeze")
"""Values of the option `free_rule`."""
NOISE = 2, 256
"""E = A - R P^T counts as zero up to so many roundings, in the dtypes of P and of R, of an average entry of its row."""

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
    if b.view.full:  # every rank has all of R
        sound = b.layout.max_all((~sound).int()) == 0
    if sound.device.type != "cpu" or not sound.all():  # asking a GPU would synchronise
        low.masked_fill_(~sound[:, None, None], 0.0)
    return sound


def sound_gradients(b: Bucket) -> Tensor:
    """Tell which gradients have a finite norm (k,), without a synchronisation.

    In bf16, whose range is that of fp32; torch would convert the whole gradient first.
    """
    dtype = None if b.params[0].dtype == torch.bfloat16 else b.dtype
    norms = [torch.linalg.vector_norm(grad, dtype=dtype) for grad in b.grads]
    return torch.stack(norms).isfinite()


def undivided_(b: Bucket, free: Free) -> bool:
    """Step the matrices of a bucket if they are state-full or state-free as a whole; return whether they are.

    Everything: the plain rule with the rate `lr s_p`, where decay keeps `lr`. Nothing: the free rule on A.
    """
    if b.whole.rank == b.whole.b:
        scale, hyper = b.hyper.scale, b.hyper
        if scale != 1.0:
            hyper = replace(hyper, lr=hyper.lr * scale, weight_decay=hyper.weight_decay / scale)
        plain_(replace(b, hyper=hyper))
    elif b.view.rank == 0:
        count_step(b)
        if free.rule != "freeze":
            _free_(b, free)
    return b.whole.rank in (0, b.whole.b)


def _free_(b: Bucket, free: Free) -> None:
    """`W <- (1 - lr wd) W - lr s_p s_f free(A)`."""
    sound = sound_gradients(b)
    for index, target in enumerate(b.targets()):
        move_back_(b, index, target, None, _of_gradient(b, index, sound[index], free))


def descend_(b: Bucket, step: Tensor, low: Tensor, sound: Tensor, free: Free) -> None:
    """Move the weights, `W <- (1 - lr wd) W - lr s_p (N P^T + s_f free(A - R P^T))`.

    Args:
        b: The bucket.
        step: N (k, a, r), overwritten.
        low: R (k, a, r).
        sound: Which gradients are finite (k,).
        free: The free rule.
    """
    if free.rule == "sgd":
        step.sub_(low, alpha=free.scale)
    if b.layout.dealt and b.basis.picks:  # whose residual is A
        step = b.layout.gather(step, b.view.a)
    elif b.layout.dealt:  # all rows of [N | R]
        step, low = b.layout.gather(torch.cat([step, low], dim=2), b.view.a).chunk(2, dim=2)
    norms = _row_norms(b, low.dtype) if free.rule == "signsgd" and not b.basis.picks else []
    for index, target in enumerate(b.targets()):
        if norms:
            residual: Scaled | Signed | None = _of_remainder(b, index, low[index], norms[index], sound[index], free)
        else:
            residual = _of_gradient(b, index, sound[index], free)
        if isinstance(residual, Signed) and free.complement and not b.basis.picks:
            step[index].sub_(_inside(b, index, residual))
        move_back_(b, index, target, step[index], residual)


def _of_gradient(b: Bucket, index: int, sound: Tensor, free: Free) -> Scaled | Signed | None:
    """The free rule on A itself: for index bases, whose entries are written afterwards, and rules that fold into N."""
    if free.rule == "none":
        return None
    if free.rule == "sgd":
        return scaled_rows(b, index, (sound.to(b.dtype) * free.scale)[None])
    return Signed(b.natural(index), sound, -free.scale if b.hyper.maximize else free.scale)


def _row_norms(b: Bucket, dtype: torch.dtype) -> list[Tensor]:
    """Norms of the rows (a,) of every gradient."""
    squares = [row_squares(b.matrix(index), dtype) for index in range(len(b.params))]
    return [total.sqrt_() for total in reduced(b.layout.sum_cols, squares)]


def _of_remainder(b: Bucket, index: int, low: Tensor, norms: Tensor, sound: Tensor, free: Free) -> Signed:
    """`s_f sign(A - R P^T)`; a sign of rounding errors would count as much as any other, and is left out."""
    held = b.states[index]
    basis = b.basis.columns(held, b.gemm_dtype)
    left = DENSE.left(held, low.dtype)
    if left is not None:
        low = left @ low  # (a, r)
    low = -low if b.hyper.maximize else low
    roundings = sum(n * torch.finfo(dtype).eps for n, dtype in zip(NOISE, (basis.dtype, low.dtype), strict=True))
    floor = norms * (roundings / b.whole.b**0.5)  # (a,)
    plain = _of_gradient(b, index, sound, free)
    assert isinstance(plain, Signed)
    if b.view.transposed:
        return plain._replace(left=basis, right=low, floor=floor[None, :])
    return plain._replace(left=low, right=basis, floor=floor[:, None])


def _inside(b: Bucket, index: int, residual: Signed) -> Tensor:
    """`F P` (a, r), for a full projection `Q^T F P` (r, r): what the free rule puts into the subspace."""
    held, gemm = b.states[index], b.gemm_dtype
    basis, left = b.basis.columns(held, gemm), DENSE.left(held, gemm)
    inside = torch.zeros(b.view.low_shape, dtype=b.dtype, device=basis.device)
    for rows, cols in tiles(residual.grad):
        free = remainder(piece(residual, rows, cols), b.dtype, gemm)
        assert isinstance(free, Tensor)
        if b.view.transposed:
            rows, cols, free = cols, rows, free.T
        part = linalg.product_in(gemm, free, basis[cols])
        if left is None:
            inside[rows] += part
        else:
            inside += linalg.product_in(gemm, left[rows].T, part)
    return b.layout.sum_cols(inside) if left is None else b.layout.sum_all(inside)
