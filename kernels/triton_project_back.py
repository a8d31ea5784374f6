"""Moving weights by Triton: one GEMM whose accumulator starts with the residual and whose epilogue moves the weight.

A program takes a tile of the weight. Its gradient is read before the product and its weight after it, each once, and
one accumulator lives at a time: the residual is made in it, of `E F^T` where it needs that, and `L R^T` is added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Move, Scaled, Signed
from .rounding import Target
from .triton_common import mode_of, number, pack, raw, read_weight, write_weight

NONE, SCALED, SIGN, REMAINDER = (tl.constexpr(kind) for kind in range(4))
"""Residuals: none, `s o G`, `c sign(G)`, `c sign(G - E F^T)`."""

SMALL, DEEPEST, TALLEST = 1 << 21, 64, 128
"""Entries of a weight that large tiles would not spread over a GPU; what the rank of operands is filled up to a
multiple of; rows and columns of the largest tile."""


class Tile(NamedTuple):
    """Rows and columns of a program's piece of the weight, depth of its step through a product, and launch options."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def tile(large: bool, gemm: torch.dtype | None, precision: str = "ieee", remainder: bool = False) -> Tile:
    """How a weight is cut, so that no register is spilled on the GPUs of the tests.

    Args:
        large: Whether the weight has more than `SMALL` entries, in aligned rows: others need registers for addresses.
        gemm: Dtype of the operands of products, None where there are none.
        precision: Of products of fp32, "ieee" or "tf32".
        remainder: Whether the residual has a product of its own.
    """
    if gemm is None:
        return Tile(32, 128, 16, 4, 1)
    depth = 32 if gemm == torch.float32 else 64
    exact = gemm == torch.float32 and precision == "ieee"
    if exact or not large:
        return Tile(64, 64, depth, 8 if exact else 4, 3)
    return Tile(128, 64 if remainder else 128, depth, 8, 3)


@triton.jit
def _product(
    total, left, right, row, col, rank, left_row, right_row, row_mask, col_mask,
    DEPTH: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`total + L R^T` of a tile, of adjacent entries of rows; the rank is a multiple of the depth."""
    inner = tl.arange(0, DEPTH)
    a = left + row * left_row + inner[None, :]
    b = right + col * right_row + inner[:, None]
    for _ in range(0, rank, DEPTH):
        x = tl.load(a, mask=row_mask, other=0.0)
        y = tl.load(b, mask=col_mask, other=0.0)
        if WIDEN:  # exact; the interpreter cannot multiply bf16
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a += DEPTH
        b += DEPTH
    return total


@triton.jit
def _residual(total, grad, bound, sound, scale, mask, KIND: tl.constexpr):
    """The residual of a tile; `total` is `E F^T`, `bound` the factors of G or the floor of the difference."""
    g = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
    if KIND == SCALED:
        found = tl.where(bound == 0, 0.0, g * bound)
    else:
        rest = tl.where(tl.load(sound) != 0, g, 0.0) - total
        found = tl.where(rest > bound, scale, tl.where(rest < -bound, -scale, 0.0))
    return found


@triton.jit(do_not_specialize_on_alignment=["sound", "scalars"])
def move_weight(
    weight, correction, grad, bound, sound, left, right, other_left, other_right, scalars,
    m, n, rank, other_rank, weight_row, weight_col, correction_row, correction_col, grad_row, grad_col, bound_step,
    left_row, right_row, other_left_row, other_right_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRODUCT: tl.constexpr, KIND: tl.constexpr,
    BY_COL: tl.constexpr, FLIPPED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """`W <- decay W + alpha (L R^T + residual)` of a tile.

    Numbers: decay, alpha, scale of signs; words: seed, first row and first column of the weight.
    """
    top, start = _place(tl.program_id(0), m, n, ROWS, COLS)
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    row_mask, col_mask = row < m - top, col < n - start
    mask = row_mask & col_mask
    far_row, far_col = top.to(tl.int64), start.to(tl.int64)  # offsets of tiles may need more than 32 bits
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    if KIND == REMAINDER:
        total = _product(
            total, other_left + far_row * other_left_row, other_right + far_col * other_right_row, row, col,
            other_rank, other_left_row, other_right_row, row_mask, col_mask, DEPTH, WIDEN, PRECISION,
        )  # fmt: skip
    if KIND != NONE:
        limit = 0.0
        if KIND != SIGN:
            if BY_COL:
                limit = tl.load(bound + (far_col + col) * bound_step, mask=col_mask, other=0.0).to(tl.float32)
            else:
                limit = tl.load(bound + (far_row + row) * bound_step, mask=row_mask, other=0.0).to(tl.float32)
        at = grad + far_row * grad_row + far_col * grad_col + row * grad_row + col * grad_col
        total = _residual(total, at, limit, sound, number(scalars, 2), mask, KIND)
    if PRODUCT:
        total = _product(
            total, left + far_row * left_row, right + far_col * right_row, row, col,
            rank, left_row, right_row, row_mask, col_mask, DEPTH, WIDEN, PRECISION,
        )  # fmt: skip
    weight += far_row * weight_row + far_col * weight_col
    correction += far_row * correction_row + far_col * correction_col
    at, beside = row * weight_row + col * weight_col, row * correction_row + col * correction_col
    value = read_weight(weight, correction, at, beside, mask, MODE)
    value = value * number(scalars, 0) + total * number(scalars, 1)
    line, cell, seed = row + top + tl.load(scalars + 4), col + start + tl.load(scalars + 5), tl.load(scalars + 3)
    if FLIPPED:
        line, cell = cell, line
    write_weight(weight, correction, at, beside, value, line, cell, seed, mask, MODE)


@triton.jit
def _place(program, m, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row and column of a program's tile: columns of 8 tiles, so that operands are in the cache when reused."""
    tall, wide = tl.cdiv(m, ROWS), tl.cdiv(n, COLS)
    first = program // (8 * wide) * 8
    height = tl.minimum(tall - first, 8)
    within = program % (8 * wide)
    return (first + within % height) * ROWS, within // height * COLS


def project_back_(target: Target, left: Tensor | None, right: Tensor | None, move: Move) -> None:
    """Compute `lowmem.kernels.reference.project_back_` in one launch: the weight, its correction and G are read once.

    Products are accumulated in fp32, on top of the residual, and are not rounded before they are applied. Products of
    fp32 are in TF32 where `torch.set_float32_matmul_precision` allows it.

    Raises:
        ValueError: Something is in fp64, or the target is a selection or too wide for 32-bit offsets.
    """
    _check(target, left, right, move)
    if target.weight.numel() == 0:
        return
    flipped = target.weight.stride(0) == 1 and target.weight.stride(1) != 1
    if flipped:
        target, left, right, move = _transposed(target, left, right, move)
    _launch(target, _pair(left, right, move.gemm, target.weight), move, flipped)


def _launch(target: Target, product: tuple[Tensor, Tensor, int], move: Move, flipped: bool) -> None:
    weight, rest = target.weight, move.residual
    correction = weight if target.correction is None else target.correction
    scale, sound = (rest.scale, rest.sound.view(torch.uint8)) if isinstance(rest, Signed) else (0.0, None)
    scalars = pack(weight.device, [move.decay, move.alpha, scale], [target.seed, target.row, target.col])
    kind, bound, other_left, other_right = _parts(rest)
    bound = scalars[:1, None] if bound is None else bound
    by_col = bound.shape[1] > 1
    left, right, rank = product
    other_left, other_right, other_rank = _pair(other_left, other_right, move.gemm, weight)
    precision = "tf32" if move.gemm == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
    (m, n), grad = weight.shape, weight if rest is None else rest.grad
    large = m * n > SMALL and all(_aligned(x) for x in (weight, correction, grad))
    how = tile(large, move.gemm if rank + other_rank else None, precision, other_rank > 0)
    move_weight[(triton.cdiv(m, how.rows) * triton.cdiv(n, how.cols),)](
        raw(weight), raw(correction), grad, bound, scalars if sound is None else sound,
        left, right, other_left, other_right, scalars, m, n, rank, other_rank,
        *weight.stride(), *correction.stride(), *grad.stride(), 0 if bound.numel() == 1 else bound.stride(int(by_col)),
        left.stride(0), right.stride(0), other_left.stride(0), other_right.stride(0),
        ROWS=how.rows, COLS=how.cols, DEPTH=how.depth, PRODUCT=rank > 0, KIND=kind, BY_COL=by_col, FLIPPED=flipped,
        WIDEN=not weight.is_cuda, PRECISION=precision, MODE=mode_of(target),
        num_warps=how.warps, num_stages=how.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _transposed(
    target: Target, left: Tensor | None, right: Tensor | None, move: Move
) -> tuple[Target, Tensor | None, Tensor | None, Move]:
    """The same for the transpose of the weight."""
    correction, rest = target.correction, move.residual
    correction = None if correction is None else correction.T
    target = replace(target, weight=target.weight.T, correction=correction, row=target.col, col=target.row)
    if isinstance(rest, Scaled):
        rest = Scaled(rest.grad.T, rest.factors.T)
    elif rest is not None:
        floor = None if rest.floor is None else rest.floor.T
        rest = rest._replace(grad=rest.grad.T, left=rest.right, right=rest.left, floor=floor)
    return target, right, left, move._replace(residual=rest)


def _pair(left: Tensor | None, right: Tensor | None, gemm: torch.dtype, other: Tensor) -> tuple[Tensor, Tensor, int]:
    """Operands of a product and its rank; zero with something to point at where there is none."""
    if left is None or right is None or left.shape[1] == 0:
        return other, other, 0
    left, right = _operand(left, gemm), _operand(right, gemm)
    return left, right, left.shape[1]


def _operand(factor: Tensor, gemm: torch.dtype) -> Tensor:
    """A factor in rows of adjacent entries, aligned and filled up with zeros to a multiple of every depth."""
    rows, rank = factor.shape
    if rank % DEEPEST == 0:
        factor = factor.to(gemm)
        if factor.stride(1) == 1 and _aligned(factor):
            return factor
    filled = factor.new_zeros(rows, triton.cdiv(rank, DEEPEST) * DEEPEST, dtype=gemm)
    filled[:, :rank] = factor
    return filled


def _aligned(matrix: Tensor) -> bool:
    """Whether it has a dimension of adjacent entries, and 16 bytes are read at a time."""
    return min(matrix.stride()) == 1 and max(matrix.stride()) % 16 == 0 and matrix.data_ptr() % 16 == 0


def _parts(rest: Scaled | Signed | None) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
    """Kind of a residual, its factors or floor, E and F."""
    if rest is None:
        return NONE.value, None, None, None
    if isinstance(rest, Scaled):
        return SCALED.value, rest.factors, None, None
    if rest.left is None or rest.right is None or rest.floor is None:
        return SIGN.value, None, None, None
    return REMAINDER.value, rest.floor, rest.left, rest.right


def _check(target: Target, left: Tensor | None, right: Tensor | None, move: Move) -> None:
    weight, rest = target.weight, move.residual
    tensors = [weight, left, right, *(rest or ())]
    if move.gemm == torch.float64 or any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tensors):
        raise ValueError("got fp64: Triton kernels compute in fp32, pass backend='torch'")
    pairs = [pair for x in (weight, rest.grad if rest else weight) for pair in zip(x.shape, x.stride(), strict=True)]
    spans = [(min(size, TALLEST) - 1) * step for size, step in pairs]  # of offsets inside a tile
    if target.cells is not None or max(spans) >= 1 << 31:
        raise ValueError(f"got a selection, or strides {weight.stride()} too wide; pass backend='torch'")
