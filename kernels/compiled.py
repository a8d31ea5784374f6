"""Coded moments on a CPU through torch.compile: one pass over the data instead of forty, after a compilation.

The compiled functions are the specifications themselves. Shapes are dynamic and numbers that change are tensors, so
that they compile for the first step (10 to 30 s) and a few times more for other layouts, never for another step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .blockwise import Blocks, Format, dequantise, quantise_
from .reference import Blockwise
from .rounding import Target


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[int],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adam_blockwise`."""
    step = _compiled(_adam_into)
    for grad, first, second, t, direction, seed in zip(grads, *moments, counts, out, how.seeds, strict=True):
        numbers, key = _numbers(t, how), _key(seed)
        for cols in _uniform(how.form, grad.shape[1]):
            parts = (blocks.part(slice(0, len(grad)), cols, how.form) for blocks in (first, second))
            step(grad[:, cols], *parts, direction[:, cols], numbers, key, cols.start, how.form)


def adamw_blockwise_(
    target: Target,
    grad: Tensor,
    moments: tuple[Blocks, Blocks],
    t: int,
    lr: float | Tensor,
    decay: float | Tensor,
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adamw_blockwise_`."""
    rates = torch.tensor([float(lr), float(decay)])
    keys = _numbers(t, how), _key(how.seeds[0]), rates, _key(target.seed)
    for cols in _uniform(how.form, grad.shape[1]):
        parts = (blocks.part(slice(0, len(grad)), cols, how.form) for blocks in moments)
        part = target.part(slice(0, len(grad)), cols)
        correction = part.correction if part.correction is not None else part.weight
        _compiled(_adamw)(part.weight, correction, grad[:, cols], *parts, *keys, part.col, part.mode, how.form)


def _adam(grad: Tensor, first: Blocks, second: Blocks, numbers: Tensor, key: Tensor, col: int, form: Format) -> Tensor:
    one_minus_b1, b2, one_minus_b2, c1, root_c2, eps = numbers.unbind()
    m, v = dequantise(first, form, signed=True), dequantise(second, form, signed=False)
    grad = grad.float()
    seen = torch.where((grad * grad).isfinite(), grad, 0.0)
    m = m + one_minus_b1 * (seen - m)
    v = v * b2 + seen * seen * one_minus_b2
    quantise_(first, m, form, signed=True)
    quantise_(second, v, form, signed=False, seed=key, first=(0, col))
    return m / c1 / (v.sqrt() / root_c2 + eps)


def _adam_into(
    grad: Tensor,
    first: Blocks,
    second: Blocks,
    out: Tensor,
    numbers: Tensor,
    key: Tensor,
    col: int,
    form: Format,
) -> None:
    out.copy_(_adam(grad, first, second, numbers, key, col, form))


def _adamw(
    weight: Tensor,
    correction: Tensor,
    grad: Tensor,
    first: Blocks,
    second: Blocks,
    numbers: Tensor,
    key: Tensor,
    rates: Tensor,
    dither: Tensor,
    col: int,
    mode: str,
    form: Format,
) -> None:
    step = _adam(grad, first, second, numbers, key, col, form)
    kept = correction if mode.startswith("compensated") and weight.dtype == torch.bfloat16 else None
    target = Target(weight, mode, kept, dither, 0, col)
    target.write(target.read() * rates[1] - step * rates[0])


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


def _numbers(t: int, how: Blockwise) -> Tensor:
    b1, b2 = how.betas
    root = (1 - b2**t) ** 0.5
    return torch.tensor([1 - b1, b2, 1 - b2, 1 - b1**t, root, how.eps / root if how.raw_eps else how.eps])


def _key(seed: int | Tensor) -> Tensor:
    return torch.tensor(int(seed), dtype=torch.int64).to(torch.int32)


def _uniform(form: Format, cols: int) -> Iterator[slice]:
    """Columns in whole blocks, then what is left."""
    whole = cols // form.block * form.block
    for start, stop in ((0, whole), (whole, cols)):
        if start < stop:
            yield slice(start, stop)
