"""Moments by Triton in one pass: decode, update, emit the direction or move the weight, and code again.

A program takes some blocks of 128 or 256 entries (less where rows are shorter), so that their new scales are found
among its registers. Traffic of an entry: 2 or 4 bytes of gradient, 4 bytes of codes, and 4 of direction, or 4 of a bf16
weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blockwise import COMPANDED, Blocks
from .reference import Blockwise, Count, corrections
from .rounding import Target
from .triton_blockwise import ON_CPU, ON_GPU, cut, decode, encode, tables
from .triton_common import EXACT, mode_of, number, pack, raw, read_weight, write_weight


@triton.jit
def coded_moments(
    grad, first, first_scale, second, second_scale, out, correction, tables, scalars,
    rows, cols, blocks, grad_row, grad_col, code_row, out_row, out_col, correction_row, correction_col,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, DYNAMIC: tl.constexpr, LION: tl.constexpr,
    WRITES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adam or Lion on `LINES` blocks; `out` is the direction, or where it writes the weight.

    Numbers: 1-b1, b2, 1-b2, 1/c1, 1/root(c2), eps, lr, decay; words: two seeds, first row and column of the weight.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    row, block = (line // blocks)[:, None], (line % blocks)[:, None]
    far = row.to(tl.int64)  # offsets of rows may need more than 32 bits
    inner = tl.arange(0, WIDTH)[None, :]
    col = block * BLOCK + inner
    wide = col.to(tl.int64)  # and of columns, in a transposed matrix
    mask = (line < rows * blocks)[:, None] & (col < cols) & (inner < BLOCK)
    alive = line < rows * blocks
    g = tl.load(grad + far * grad_row + wide * grad_col, mask=mask, other=0.0).to(tl.float32)
    square = g * g
    g = tl.where(square < float("inf"), g, 0.0)  # false for NaN too
    at = far * code_row + col
    m_scale = tl.load(first_scale + line, mask=alive, other=0.0)[:, None]
    m = decode(first, at, m_scale, tables, mask, True, DYNAMIC)
    fresh1 = number(scalars, 0)
    if LION:
        mixed = m + (g - m) * fresh1
        step = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, 0.0))
        m = m + (g - m) * number(scalars, 2)
    else:
        m = m + (g - m) * fresh1
        v_scale = tl.load(second_scale + line, mask=alive, other=0.0)[:, None]
        v = decode(second, at, v_scale, tables + 256, mask, False, DYNAMIC)
        v = v * number(scalars, 1) + g * g * number(scalars, 2)
        step = m * number(scalars, 3) / (tl.sqrt(v) * number(scalars, 4) + number(scalars, 5))
        largest = tl.max(tl.where(mask, v, 0.0), axis=1)
        seed = tl.load(scalars + 8)
        code = encode(v, largest[:, None], tables + 768, row, col, seed, False, DYNAMIC)
        tl.store(second_scale + line, largest, mask=alive)
        tl.store(second + at, code.to(tl.uint8), mask=mask)
    largest = tl.max(tl.where(mask, tl.abs(m), 0.0), axis=1)
    code = encode(m, largest[:, None], tables + 512, row, col, 0, True, DYNAMIC)
    tl.store(first_scale + line, largest, mask=alive)
    if DYNAMIC:
        tl.store(first + at, code.to(tl.uint8), mask=mask)
    else:
        tl.store(first + at, code.to(tl.int8), mask=mask)
    place = far * out_row + wide * out_col
    if WRITES:
        beside = far * correction_row + wide * correction_col
        value = read_weight(out, correction, place, beside, mask, MODE)
        value = value * number(scalars, 7) - step * number(scalars, 6)
        dither, top, left = tl.load(scalars + 9), tl.load(scalars + 10), tl.load(scalars + 11)
        write_weight(out, correction, place, beside, value, row + top, col + left, dither, mask, MODE)
    else:
        tl.store(out + place, step, mask=mask)


@triton.jit
def dense_adam(grad, first, second, out, scalars, count, BLOCK: tl.constexpr):
    """Adam on fp32 moments; numbers as in `coded_moments`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(grad + at, mask=mask, other=0.0)
    m, v = tl.load(first + at, mask=mask, other=0.0), tl.load(second + at, mask=mask, other=0.0)
    m = m + (g - m) * number(scalars, 0)
    v = v * number(scalars, 1) + g * g * number(scalars, 2)
    step = m * number(scalars, 3) / (tl.sqrt(v) * number(scalars, 4) + number(scalars, 5))
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    tl.store(out + at, step, mask=mask)


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
    """Compute `lowmem.kernels.reference.adam` in fp32, one launch a tensor.

    Raises:
        ValueError: A tensor is not fp32 and contiguous.
    """
    how = Blockwise(COMPANDED, [], betas, eps, raw_eps)
    for grad, first, second, t, direction in zip(grads, *moments, counts, out, strict=True):
        _launch_dense((grad, first, second, direction), _adam_numbers(t, how))


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[Count],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adam_blockwise`, one launch a matrix."""
    for grad, first, second, t, direction, seed in zip(grads, *moments, counts, out, how.seeds, strict=True):
        scalars = pack(grad.device, [*_adam_numbers(t, how), 0.0, 1.0], [seed, 0, 0, 0])
        _launch(grad, first, second, Target(direction), scalars, how, writes=False)


def adamw_blockwise_(
    target: Target,
    grad: Tensor,
    moments: tuple[Blocks, Blocks],
    t: Count,
    lr: float | Tensor,
    decay: float | Tensor,
    how: Blockwise,
) -> None:
    """Compute `lowmem.kernels.reference.adamw_blockwise_`: the weight moves in the same pass."""
    words = [how.seeds[0], target.seed, target.row, target.col]
    scalars = pack(grad.device, [*_adam_numbers(t, how), lr, decay], words)
    _launch(grad, *moments, target, scalars, how, writes=True)


def lion_blockwise(grads: Sequence[Tensor], moments: Sequence[Blocks], out: Sequence[Tensor], how: Blockwise) -> None:
    """Compute `lowmem.kernels.reference.lion_blockwise`, one launch a matrix."""
    b1, b2 = how.betas
    for grad, moment, direction in zip(grads, moments, out, strict=True):
        scalars = pack(grad.device, [1 - b1, 0.0, 1 - b2, *[1.0] * 5], [0, 0, 0, 0])
        _launch(grad, moment, None, Target(direction), scalars, how, writes=False)


def _adam_numbers(t: Count, how: Blockwise) -> list[float | Tensor]:
    (b1, b2), (c1, c2) = how.betas, corrections(t, how.betas)
    root = c2**0.5
    return [1 - b1, b2, 1 - b2, 1 / c1, 1 / root, how.eps / root if how.raw_eps else how.eps]


def _launch_dense(tensors: tuple[Tensor, ...], numbers: Sequence[float | Tensor]) -> None:
    if not all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
        raise ValueError(f"got {[x.dtype for x in tensors]}: need contiguous fp32, pass backend='auto'")
    block, count, device = ON_GPU if tensors[0].is_cuda else ON_CPU, tensors[0].numel(), tensors[0].device
    if count:
        grid, scalars = (triton.cdiv(count, block),), pack(device, numbers)
        dense_adam[grid](*tensors, scalars, count, BLOCK=block, enable_fp_fusion=True)


def _launch(
    grad: Tensor, first: Blocks, second: Blocks | None, target: Target, scalars: Tensor, how: Blockwise, *, writes: bool
) -> None:
    rows, cols = grad.shape
    if grad.numel() == 0:
        return
    if grad.dtype == torch.float64:
        raise ValueError("got fp64 gradients: Triton kernels compute in fp32, pass backend='torch'")
    pair = second or first
    for codes, scale in (first, pair):
        if codes.stride(1) != 1 or codes.stride(0) != first.codes.stride(0) or not scale.is_contiguous():
            raise ValueError(f"got codes of strides {codes.stride()}: need rows of adjacent entries and scales")
    blocks, sizes = how.form.scales(cols), cut(grad, how.form)
    correction = target.correction if target.correction is not None else target.weight
    dynamic = how.form.name == "dynamic"
    coded_moments[(triton.cdiv(rows * blocks, sizes["LINES"]),)](
        grad, *first, *pair, raw(target.weight), raw(correction), tables(str(grad.device)), scalars,
        rows, cols, blocks, *grad.stride(), first.codes.stride(0), *target.weight.stride(), *correction.stride(),
        **sizes, DYNAMIC=dynamic, LION=second is None, WRITES=writes,
        MODE=mode_of(target) if writes else EXACT, enable_fp_fusion=True,
    )  # fmt: skip
