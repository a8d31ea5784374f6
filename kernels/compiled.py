"""Companded moments on a CPU through torch.compile: one pass over the data instead of forty, after a compilation.

What is compiled sees matrices of one block a row, and numbers that change as tensors: it is compiled in the first step
(a few seconds for every length, dtype and rounding that occurs) and never for another step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import random
from .blockwise import COMPANDED, Blocks, decode, encode
from .reference import Blockwise
from .rounding import Target, join, round_stochastically, split

TINY = torch.finfo(torch.float32).tiny
VARIANTS = 256
"""Most compilations of one function."""


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[int],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adam_blockwise` for companded moments."""
    for grad, first, second, t, direction, seed in zip(grads, *moments, counts, out, how.seeds, strict=True):
        numbers = _numbers(t, how)
        for cols in _uniform(grad):
            m, v = _coded_lines(first, cols), _coded_lines(second, cols)
            step = _compiled(_adam)(_lines(grad, cols), *m, *v, *_places(seed, (0, 0), grad, cols), numbers)
            direction[:, cols] = step.view(len(grad), -1)
            _put_back(first, m, cols)
            _put_back(second, v, cols)


def adamw_blockwise_(
    target: Target,
    grad: Tensor,
    moments: tuple[Blocks, Blocks],
    t: int,
    lr: float | Tensor,
    decay: float | Tensor,
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adamw_blockwise_` for companded moments."""
    numbers = torch.cat([_numbers(t, how), torch.tensor([float(lr), float(decay)])])
    mode = "nearest" if target.exact else target.mode
    for cols in _uniform(grad):
        m, v = (_coded_lines(blocks, cols) for blocks in moments)
        weights = [tensor for tensor in (target.weight, target.correction) if tensor is not None]
        lines = [_lines(tensor, cols) for tensor in weights]
        places = _places(how.seeds[0], (0, 0), grad, cols), _places(target.seed, (target.row, target.col), grad, cols)
        _compiled(_adamw)(lines, _lines(grad, cols), [*m, *v], *places, numbers, mode)
        _put_back(moments[0], m, cols)
        _put_back(moments[1], v, cols)
        for whole, changed in zip(weights, lines, strict=True):
            if whole[:, cols].data_ptr() != changed.data_ptr():
                whole[:, cols] = changed.view(len(grad), -1)


def _adam(
    grad: Tensor, m8: Tensor, m_scale: Tensor, v8: Tensor, v_scale: Tensor, key: Tensor, col: Tensor, numbers: Tensor
) -> Tensor:
    """Adam on blocks (N, block), with places (N, 1); codes and scales are written, the direction is returned."""
    fresh1, b2, fresh2, c1, root_c2, eps = numbers[:6].unbind()
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
    mode: str,
) -> None:
    """The same, and the weight moves: `weights` is the weight, and its correction where there is one."""
    weight, correction = weights[0], weights[1] if len(weights) > 1 else None
    m8, m_scale, v8, v_scale = coded
    step = _adam(grad, m8, m_scale, v8, v_scale, *place, numbers)
    value = weight.float() if correction is None else join(weight, correction)
    value = value * numbers[7] - step * numbers[6]
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
    """Compile with room for every length, dtype and rounding; torch's own limit is 8."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options: dict[str, Any] = {"recompile_limit": VARIANTS}
        return torch.compile(function, fullgraph=True, dynamic=True, **options)
    run = torch.compile(function, fullgraph=True, dynamic=True)
    return torch._dynamo.config.patch(recompile_limit=VARIANTS)(run)  # type: ignore[no-any-return]


def _numbers(t: int, how: Blockwise) -> Tensor:
    b1, b2 = how.betas
    root = (1 - b2**t) ** 0.5
    return torch.tensor([1 - b1, b2, 1 - b2, 1 - b1**t, root, how.eps / root if how.raw_eps else how.eps])


def _uniform(matrix: Tensor) -> Iterator[slice]:
    """Columns in whole blocks, then what is left."""
    cols = matrix.shape[1] if len(matrix) else 0
    whole = cols // COMPANDED.block * COMPANDED.block
    for start, stop in ((0, whole), (whole, cols)):
        if start < stop:
            yield slice(start, stop)


def _block(cols: slice) -> int:
    width: int = cols.stop - cols.start
    return min(COMPANDED.block, width)


def _lines(matrix: Tensor, cols: slice) -> Tensor:
    """Some columns of a matrix with one block a line: a view where the memory allows it, otherwise a copy."""
    return matrix[:, cols].reshape(-1, _block(cols))


def _coded_lines(blocks: Blocks, cols: slice) -> list[Tensor]:
    part = blocks.part(slice(0, len(blocks.codes)), cols, COMPANDED)
    return [part.codes.reshape(-1, _block(cols)), part.scale.reshape(-1, 1)]


def _put_back(blocks: Blocks, lines: Sequence[Tensor], cols: slice) -> None:
    """Write lines that were copied back to where they came from."""
    part = blocks.part(slice(0, len(blocks.codes)), cols, COMPANDED)
    for whole, changed in zip(part, lines, strict=True):
        if whole.data_ptr() != changed.data_ptr():
            whole.copy_(changed.view(whole.shape))


def _places(seed: int, first: tuple[int, int], matrix: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Of every line the key of its row and the number of its first column, int32 (N, 1)."""
    starts = torch.arange(cols.start, cols.stop, _block(cols), dtype=torch.int32) + first[1]
    keys = random.row_keys(seed, range(first[0], first[0] + len(matrix)))  # (rows, 1)
    return keys.repeat_interleave(len(starts), 0), starts.repeat(len(matrix))[:, None]
