"""Companded moments on a CPU through torch.compile: one pass over the data instead of forty, after a compilation.

Compiled functions get contiguous matrices with one block in each row, and numbers that change from step to step as
tensors. So they are compiled in the first step (a few seconds for every dtype and mode of rounding, and again for
matrices of a single block or with blocks of one entry), and never again for another size or step. Large matrices are
cut into pieces, so that temporaries stay small.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes

from . import random
from .blockwise import COMPANDED, Blocks, decode, encode
from .reference import Blockwise
from .rounding import Target, join, round_stochastically, split
from .tiles import tiles

TINY = torch.finfo(torch.float32).tiny
VARIANTS = 256
"""Most compilations of one function."""
PIECE = 1 << 20
"""Elements of what is compiled for: temporaries are bounded by it, and a call costs little beside the work."""


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[int],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adam_blockwise` for companded moments, in pieces of bounded size."""
    for grad, first, second, t, direction, seed in zip(grads, *moments, counts, out, how.seeds, strict=True):
        numbers = _numbers(t, how)
        for rows, cols in _pieces(grad):
            with _lines(grad[rows, cols], *_coded(first, second, rows, cols)) as lines:
                step = _compiled(_adam)(*lines, *_places(seed, rows, cols), numbers)
            part = direction[rows, cols]
            part.copy_(step.view(part.shape))


def adamw_blockwise_(
    target: Target,
    grad: Tensor,
    moments: tuple[Blocks, Blocks],
    t: int,
    lr: float | Tensor,
    decay: float | Tensor,
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adamw_blockwise_` for companded moments, in pieces of bounded size."""
    numbers, rates = _numbers(t, how), torch.tensor([float(lr), float(decay)], dtype=target.work, device="cpu")
    target.check()
    mode = "nearest" if target.exact else target.mode
    for rows, cols in _pieces(grad):
        part = target.part(rows, cols)
        weights = [tensor for tensor in (part.weight, part.correction) if tensor is not None]
        places = _places(how.seeds[0], rows, cols), _places(target.seed, rows, cols, (target.row, target.col))
        with _lines(grad[rows, cols], *_coded(*moments, rows, cols), *weights) as lines:
            _compiled(_adamw)(lines[5:], lines[0], lines[1:5], *places, numbers, rates, mode)


def _adam(
    grad: Tensor, m8: Tensor, m_scale: Tensor, v8: Tensor, v_scale: Tensor, key: Tensor, col: Tensor, numbers: Tensor
) -> Tensor:
    """Adam on blocks (N, block), with places (N, 1); codes and scales are written, the direction is returned."""
    fresh1, b2, fresh2, c1, root_c2, eps = numbers.unbind()
    m = decode(m8, COMPANDED, signed=True) * m_scale
    v = decode(v8, COMPANDED, signed=False) * v_scale
    grad = grad.float()
    seen = torch.where((grad * grad).isfinite(), grad, 0.0)
    m = m + fresh1 * (seen - m)
    v = v * b2 + seen * seen * fresh2
    m_scale.copy_(m.abs().amax(1, keepdim=True))
    v_scale.copy_(v.amax(1, keepdim=True))
    m8.copy_(encode(m / m_scale.clamp(min=TINY), COMPANDED, signed=True, noise=key))
    v8.copy_(encode(v / v_scale.clamp(min=TINY), COMPANDED, signed=False, noise=_noise(grad, key, col)))
    return m / c1 / (v.sqrt() / root_c2 + eps)


def _adamw(
    weights: list[Tensor],
    grad: Tensor,
    coded: list[Tensor],
    place: tuple[Tensor, Tensor],
    dither: tuple[Tensor, Tensor],
    numbers: Tensor,
    rates: Tensor,
    mode: str,
) -> None:
    """`_adam`, after which the weight moves: `weights` is the weight, and its correction where there is one.

    `rates` are the factors of the direction and of the weight, in the dtype of the weight's values.
    """
    weight, correction = weights[0], weights[1] if len(weights) > 1 else None
    m8, m_scale, v8, v_scale = coded
    step = _adam(grad, m8, m_scale, v8, v_scale, *place, numbers)
    value = weight.to(rates.dtype) if correction is None else join(weight, correction)
    value = value * rates[1] - step * rates[0]
    if mode == "nearest":
        weight.copy_(value)
    elif correction is None:
        weight.copy_(round_stochastically(value, _noise(value, *dither)))
    else:
        upper, rest = split(value, _noise(value, *dither) if mode == "compensated8" else None)
        weight.copy_(upper)
        correction.copy_(rest)


def _noise(like: Tensor, key: Tensor, col: Tensor) -> Tensor:
    across = torch.arange(like.shape[1], device=like.device, dtype=torch.int32)
    return random.half_words(key, col + across)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with room for every dtype and rounding, torch's own limit is 8, and for sizes that happen to be equal."""
    options: dict[str, Any] = {"recompile_limit": VARIANTS}
    unrelated = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return unrelated(torch.compile(function, fullgraph=True, dynamic=True, **options))  # type: ignore[no-any-return]
    run = torch.compile(function, fullgraph=True, dynamic=True)
    return unrelated(torch._dynamo.config.patch(**options)(run))  # type: ignore[no-any-return]


def _numbers(t: int, how: Blockwise) -> Tensor:
    b1, b2 = how.betas
    root = (1 - b2**t) ** 0.5
    numbers = [1 - b1, b2, 1 - b2, 1 - b1**t, root, how.eps / root if how.raw_eps else how.eps]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _pieces(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into pieces of bounded size: of every tile the columns in whole blocks, then what is left."""
    for rows, cols in tiles(matrix, PIECE):
        whole = cols.stop - (cols.stop - cols.start) % COMPANDED.block
        for start, stop in ((cols.start, whole), (whole, cols.stop)):
            if start < stop:
                yield rows, slice(start, stop)


def _coded(first: Blocks, second: Blocks, rows: slice, cols: slice) -> tuple[Tensor, ...]:
    """Codes and scales of a piece of either moment."""
    return *first.part(rows, cols, COMPANDED), *second.part(rows, cols, COMPANDED)


@contextmanager
def _lines(grad: Tensor, *written: Tensor) -> Iterator[list[Tensor]]:
    """Context that gives a piece with one block in each row, (N, block), and its scales as (N, 1).

    They are views where the memory allows it, else copies that are written back at the end.
    """
    blocks = COMPANDED.scales(grad.shape[1])
    shapes = [(len(grad) * blocks, tensor.shape[1] // blocks) for tensor in (grad, *written)]
    # Other strides, or views of a tensor of another shape (which `data` forgets), would each cause a compilation.
    lines = [t.reshape(shape).contiguous().data for t, shape in zip((grad, *written), shapes, strict=True)]
    yield lines
    for whole, changed in zip(written, lines[1:], strict=True):
        if whole.data_ptr() != changed.data_ptr():
            whole.copy_(changed.view(whole.shape))


def _places(seed: random.Seed, rows: slice, cols: slice, first: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """For every block of a piece, the random key of its row and the number of its first column, int32 (N, 1).

    `first` is the row and column of the whole weight where the matrix begins.
    """
    starts = torch.arange(cols.start, cols.stop, COMPANDED.block, dtype=torch.int32, device="cpu") + first[1]
    keys = random.row_keys(seed, range(first[0] + rows.start, first[0] + rows.stop))  # (rows, 1)
    return keys.repeat_interleave(len(starts), 0).data, starts[:, None].repeat(len(keys), 1)
