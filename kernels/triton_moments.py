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

from .blockwise import COMPANDED, Blocks, borders, dynamic_map
from .reference import Blockwise
from .rounding import Target
from .triton_common import EXACT, mode_of, noise, number, pack, raw, read_weight, write_weight

ON_GPU, ON_CPU = 1024, 1 << 15
"""Entries of a program: the interpreter's cost is by program, whatever its size."""

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _decode(codes, offset, scale, table, mask, SIGNED: tl.constexpr, DYNAMIC: tl.constexpr):
    code = tl.load(codes + offset, mask=mask, other=0).to(tl.int32)
    if DYNAMIC:
        unit = tl.load(table + code)
    elif SIGNED:
        root = code.to(tl.float32) * (1 / 127)
        unit = tl.abs(root) * root
    else:
        root = code.to(tl.float32) * (1 / 255)
        unit = (root * root) * (root * root)
    return unit * scale


@triton.jit
def _nearest(unit, edges, SIGNED: tl.constexpr):
    """The code of the nearest value of a dynamic map: its decade and cell, then one step by the exact borders."""
    a = tl.abs(unit)
    power = tl.where(a >= 0.1, 6, tl.where(a >= 1e-2, 5, tl.where(a >= 1e-3, 4, tl.where(a >= 1e-4, 3, tl.where(
        a >= 1e-5, 2, tl.where(a >= 1e-6, 1, 0))))))  # fmt: skip
    scale = tl.where(a >= 0.1, 1.0, tl.where(a >= 1e-2, 10.0, tl.where(a >= 1e-3, 1e2, tl.where(a >= 1e-4, 1e3,
        tl.where(a >= 1e-5, 1e4, tl.where(a >= 1e-6, 1e5, 1e6))))))  # fmt: skip
    if SIGNED:
        cells = tl.full((), 1, tl.int32) << power
    else:
        cells = tl.full((), 2, tl.int32) << power
    cell = tl.floor((a * scale - 0.1) * cells.to(tl.float32) * (1 / 0.9)).to(tl.int32)
    cell = tl.minimum(tl.maximum(cell, -1), cells - 1)
    if SIGNED:
        place = cells + cell  # 2^j cells lie below decade j, zero among them
        code = tl.where(unit < 0, 127 - place, 127 + place)
    else:
        code = cells - 1 + cell
    code = tl.minimum(tl.maximum(code, 0), 255)
    code += (unit > tl.load(edges + code)).to(tl.int32)
    below = tl.load(edges + tl.maximum(code - 1, 0))
    return tl.where((code > 0) & (unit <= below), code - 1, code)


@triton.jit
def _encode(value, scale, edges, row, col, seed, SIGNED: tl.constexpr, DYNAMIC: tl.constexpr):
    unit = value / tl.maximum(scale, TINY)
    if DYNAMIC:
        code = _nearest(unit, edges, SIGNED)
    elif SIGNED:
        root = tl.floor(tl.sqrt(tl.abs(unit)) * 127.0 + 0.5)
        code = tl.where(unit < 0, -root, root).to(tl.int32)
    else:
        low = tl.floor(tl.sqrt(tl.sqrt(unit)) * 255.0)
        fourth = (low * low) * (low * low)
        gap = ((low * low + low) * 2.0 + 1.0) * (low * 2.0 + 1.0)
        share = (unit * 4228250625.0 - fourth) / gap
        up = tl.floor(low + share + noise(row, col, seed).to(tl.float32) * (1 / 65536) + 0.5)
        code = tl.where(unit > 0, tl.minimum(tl.maximum(up, 1.0), 255.0), 0.0).to(tl.int32)
    return code


@triton.jit
def coded_moments(
    grad, first, first_scale, second, second_scale, out, correction, tables, scalars,
    rows, cols, blocks, grad_row, grad_col, code_row, out_row, out_col, correction_row, correction_col,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, DYNAMIC: tl.constexpr, LION: tl.constexpr,
    WRITES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adam or Lion on `LINES` blocks; `out` is the direction, or where it writes the weight.

    Numbers: 1-b1, b2, 1-b2, c1, root(c2), eps, lr, decay; words: two seeds, first row and first column of the weight.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    row, block = (line // blocks)[:, None], (line % blocks)[:, None]
    far = row.to(tl.int64)  # offsets of rows may need more than 32 bits
    inner = tl.arange(0, WIDTH)[None, :]
    col = block * BLOCK + inner
    mask = (line < rows * blocks)[:, None] & (col < cols) & (inner < BLOCK)
    alive = line < rows * blocks
    g = tl.load(grad + far * grad_row + col * grad_col, mask=mask, other=0.0).to(tl.float32)
    square = g * g
    g = tl.where(square < float("inf"), g, 0.0)  # false for NaN too
    at = far * code_row + col
    m_scale = tl.load(first_scale + line, mask=alive, other=0.0)[:, None]
    m = _decode(first, at, m_scale, tables, mask, True, DYNAMIC)
    fresh1 = number(scalars, 0)
    if LION:
        mixed = m + (g - m) * fresh1
        step = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, 0.0))
        m = m + (g - m) * number(scalars, 2)
    else:
        m = m + (g - m) * fresh1
        v_scale = tl.load(second_scale + line, mask=alive, other=0.0)[:, None]
        v = _decode(second, at, v_scale, tables + 256, mask, False, DYNAMIC)
        v = v * number(scalars, 1) + g * g * number(scalars, 2)
        step = m / number(scalars, 3) / (tl.sqrt(v) / number(scalars, 4) + number(scalars, 5))
        largest = tl.max(tl.where(mask, v, 0.0), axis=1)
        seed = tl.load(scalars + 8)
        code = _encode(v, largest[:, None], tables + 768, row, col, seed, False, DYNAMIC)
        tl.store(second_scale + line, largest, mask=alive)
        tl.store(second + at, code.to(tl.uint8), mask=mask)
    largest = tl.max(tl.where(mask, tl.abs(m), 0.0), axis=1)
    code = _encode(m, largest[:, None], tables + 512, row, col, 0, True, DYNAMIC)
    tl.store(first_scale + line, largest, mask=alive)
    if DYNAMIC:
        tl.store(first + at, code.to(tl.uint8), mask=mask)
    else:
        tl.store(first + at, code.to(tl.int8), mask=mask)
    place = far * out_row + col * out_col
    if WRITES:
        beside = far * correction_row + col * correction_col
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
    step = m / number(scalars, 3) / (tl.sqrt(v) / number(scalars, 4) + number(scalars, 5))
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    tl.store(out + at, step, mask=mask)


def adam(
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    counts: list[int],
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
        tensors = (grad, first, second, direction)
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
            raise ValueError(f"got {[x.dtype for x in tensors]}: need contiguous fp32, pass backend='auto'")
        block, count = ON_GPU if grad.is_cuda else ON_CPU, grad.numel()
        if count:
            scalars = pack(grad.device, _adam_numbers(t, how))
            dense_adam[(triton.cdiv(count, block),)](*tensors, scalars, count, BLOCK=block)


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[int],
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
    t: int,
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


def _adam_numbers(t: int, how: Blockwise) -> list[float]:
    b1, b2 = how.betas
    root = (1 - b2**t) ** 0.5
    return [1 - b1, b2, 1 - b2, 1 - b1**t, root, how.eps / root if how.raw_eps else how.eps]


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
    block, blocks = how.form.block, how.form.scales(cols)
    width = triton.next_power_of_2(min(block, cols))
    lines = max(1, (ON_GPU if grad.is_cuda else ON_CPU) // width)
    correction = target.correction if target.correction is not None else target.weight
    dynamic = how.form.name == "dynamic"
    coded_moments[(triton.cdiv(rows * blocks, lines),)](
        grad, *first, *pair, raw(target.weight), raw(correction), _tables(str(grad.device)), scalars,
        rows, cols, blocks, *grad.stride(), first.codes.stride(0), *target.weight.stride(), *correction.stride(),
        BLOCK=block, WIDTH=width, LINES=lines, DYNAMIC=dynamic, LION=second is None, WRITES=writes,
        MODE=mode_of(target) if writes else EXACT,
    )  # fmt: skip


def _tables(device: str) -> Tensor:
    """The dynamic maps, signed and not, and the borders between their codes, (1024,)."""
    if device not in _CACHE:
        signed = (True, False)
        maps, edges = [dynamic_map(s, device) for s in signed], [borders(s, device)[0] for s in signed]
        _CACHE[device] = torch.cat([*maps, *edges])
    return _CACHE[device]


_CACHE: dict[str, Tensor] = {}
