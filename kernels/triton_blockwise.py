"""8-bit codes by Triton: the rule of `lowmem.kernels.blockwise`, for whole matrices and inside of other kernels.

A program takes some blocks of 128 or 256 entries (less where rows are shorter), so that their scales are found among
its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blockwise import Blocks, Format, borders, dynamic_map
from .random import as_int32
from .triton_common import noise

ON_GPU, ON_CPU = 1024, 1 << 15
"""Entries of a program: the interpreter's cost is by program, whatever its size."""

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def decode(codes, offset, scale, table, mask, SIGNED: tl.constexpr, DYNAMIC: tl.constexpr):
    """The values of codes, `table` the dynamic map."""
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
def encode(value, scale, edges, row, col, seed, SIGNED: tl.constexpr, DYNAMIC: tl.constexpr):
    """The codes of finite values, int32; `edges` are the borders of the dynamic map."""
    unit = value * (1 / tl.maximum(scale, TINY))  # one division a block
    if DYNAMIC:
        code = _nearest(unit, edges, SIGNED)
    elif SIGNED:
        root = (tl.sqrt(tl.abs(unit)) * 127.0 + 0.5).to(tl.int32)
        code = tl.where(unit < 0, -root, root)
    else:
        low = tl.floor(tl.sqrt(tl.sqrt(unit)) * 255.0)
        fourth = (low * low) * (low * low)
        gap = ((low * low + low) * 2.0 + 1.0) * (low * 2.0 + 1.0)
        slope = tl.rsqrt(gap)  # cheaper than a division, and more exact than the 16 bits that it is rounded with
        share = (unit * 4228250625.0 - fourth) * (slope * slope)
        up = (low + share + noise(row, col, seed).to(tl.float32) * (1 / 65536) + 0.5).to(tl.int32)
        code = tl.where(unit > 0, tl.minimum(tl.maximum(up, 1), 255), 0)
    return code


@triton.jit
def place(rows, cols, blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Block number, row, column and mask of the entries of a program, (LINES,) and (LINES, WIDTH)."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inner = tl.arange(0, WIDTH)[None, :]
    col = (line % blocks)[:, None] * BLOCK + inner
    return line, (line // blocks)[:, None], col, (line < rows * blocks)[:, None] & (col < cols) & (inner < BLOCK)


@triton.jit(do_not_specialize=["seed", "top", "left"])
def code_blocks(
    values, codes, scale, edges, rows, cols, blocks, seed, top, left,
    value_row, value_col, code_row, code_col, scale_row, scale_col,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, SIGNED: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Codes and scales of `LINES` blocks; `top` and `left` are the first row and column in the whole matrix."""
    line, row, col, mask = place(rows, cols, blocks, BLOCK, WIDTH, LINES)
    far, wide = row.to(tl.int64), col.to(tl.int64)
    value = tl.load(values + far * value_row + wide * value_col, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(tl.abs(value) < float("inf"), value, 0.0)  # false for NaN too
    largest = tl.max(tl.abs(value), axis=1)
    code = encode(value, largest[:, None], edges, row + top, col + left, seed, SIGNED, DYNAMIC)
    at = (line // blocks).to(tl.int64) * scale_row + (line % blocks) * scale_col
    tl.store(scale + at, largest, mask=line < rows * blocks)
    if SIGNED and not DYNAMIC:
        tl.store(codes + far * code_row + wide * code_col, code.to(tl.int8), mask=mask)
    else:
        tl.store(codes + far * code_row + wide * code_col, code.to(tl.uint8), mask=mask)


@triton.jit
def decode_blocks(
    codes, scale, out, table, rows, cols, blocks, code_row, code_col, scale_row, scale_col,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, SIGNED: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Values (rows, cols) of `LINES` blocks."""
    line, row, col, mask = place(rows, cols, blocks, BLOCK, WIDTH, LINES)
    far, wide = row.to(tl.int64), col.to(tl.int64)
    at = (line // blocks).to(tl.int64) * scale_row + (line % blocks) * scale_col
    largest = tl.load(scale + at, mask=line < rows * blocks, other=0.0)[:, None]
    value = decode(codes, far * code_row + wide * code_col, largest, table, mask, SIGNED, DYNAMIC)
    tl.store(out + far * cols + wide, value, mask=mask)


def dequantise(blocks: Blocks, form: Format, *, signed: bool) -> Tensor:
    """Compute `lowmem.kernels.blockwise.dequantise` in one launch, for codes of any strides."""
    out = blocks.scale.new_empty(blocks.codes.shape)
    if out.numel():
        table = tables(str(out.device))[0 if signed else 256 :]
        decode_blocks[_grid(out, form)](
            *blocks, out, table, *_sizes(out, form), *blocks.codes.stride(), *blocks.scale.stride(),
            SIGNED=signed, DYNAMIC=form.name == "dynamic", **cut(out, form), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def quantise_(
    blocks: Blocks,
    values: Tensor,
    form: Format,
    *,
    signed: bool,
    seed: int = 0,
    first: tuple[int, int] = (0, 0),
) -> None:
    """Compute `lowmem.kernels.blockwise.quantise_` in one launch, for values of any dtype and strides."""
    if values.numel() == 0:
        return
    edges = tables(str(values.device))[512 if signed else 768 :]
    code_blocks[_grid(values, form)](
        values, *blocks, edges, *_sizes(values, form), as_int32(seed), *first,
        *values.stride(), *blocks.codes.stride(), *blocks.scale.stride(),
        SIGNED=signed, DYNAMIC=form.name == "dynamic", **cut(values, form), enable_fp_fusion=True,
    )  # fmt: skip


def cut(matrix: Tensor, form: Format) -> dict[str, int]:
    """Sizes of a program: BLOCK entries share a scale, WIDTH (a power of two) holds those of a row, LINES blocks."""
    width = triton.next_power_of_2(min(form.block, matrix.shape[1]))
    return {"BLOCK": form.block, "WIDTH": width, "LINES": max(1, (ON_GPU if matrix.is_cuda else ON_CPU) // width)}


def _sizes(matrix: Tensor, form: Format) -> tuple[int, int, int]:
    return *matrix.shape, form.scales(matrix.shape[1])


def _grid(matrix: Tensor, form: Format) -> tuple[int]:
    rows, _, blocks = _sizes(matrix, form)
    return (triton.cdiv(rows * blocks, cut(matrix, form)["LINES"]),)


def tables(device: str) -> Tensor:
    """The dynamic maps, signed and not, and the borders between their codes, (1024,)."""
    if device not in _CACHE:
        signed = (True, False)
        maps, edges = [dynamic_map(s, device) for s in signed], [borders(s, device)[0] for s in signed]
        _CACHE[device] = torch.cat([*maps, *edges])
    return _CACHE[device]


_CACHE: dict[str, Tensor] = {}
