"""bitsandbytes behind the interface of `reference`: its quantiser on a CPU, its fused 8-bit Adam on a GPU.

The library is optional, and imported by the first call that computes. Its blocks are runs of 256 entries of a flat
tensor, whatever its rows. They are those of our dynamic format where a matrix has a multiple of 256 columns or one row.

Its CPU quantiser (0.50) looks codes up in 2^16 cells of [-1, 1], so that an entry within 2^-16 of the border of two
codes, as a share of its block's scale, may get another than the nearest one. Zero is such an entry: it is decoded as
2e-5 (a first moment) or 1.6e-5 (a second one) of the scale. Its fused Adam moves a first moment's code by one where
rounding has changed the sign.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import moments as fused
from .blockwise import DYNAMIC, Blocks, Format, dynamic_map
from .reference import Blockwise
from .tiles import tiles

OLDEST = (0, 44)
"""The release in which blocks became 256 entries; they were 2048."""

TILE = 1 << 20
"""Elements of a tile on a CPU: threads meet after every call, which on busy cores takes longer than to compute."""

_INSTALL = "pip install 'bitsandbytes>=0.44'"
_DEVICES = frozenset({"cpu", "cuda"})
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def available() -> bool:
    """Tell whether a usable bitsandbytes is installed; does not import it."""
    version = _installed()
    return version is not None and _release(version) >= OLDEST


def coincides(shape: Sequence[int]) -> bool:
    """Tell whether our blocks and bitsandbytes' are the same ones in a tensor of this shape."""
    return not shape or shape[-1] % DYNAMIC.block == 0 or all(size == 1 for size in shape[-2:-1])


def runs_on(tensor: Tensor) -> bool:
    """Tell whether `adam_blockwise` takes gradients like this one: fp32 or less (rows, cols), on a CPU or a GPU."""
    fits = tensor.dtype in _DTYPES and tensor.device.type in _DEVICES
    return fits and coincides(tensor.shape) and available()


def dequantise(blocks: Blocks, form: Format, *, signed: bool) -> Tensor:
    """Decode a matrix into fp32 (rows, cols), as `blockwise.dequantise`.

    Raises:
        ValueError: The format is companded, or the blocks are not bitsandbytes'.
        ImportError: bitsandbytes is missing or too old.
    """
    _check(form, blocks.codes)
    out = blocks.scale.new_empty(blocks.codes.shape)
    for rows, cols in tiles(out, TILE):
        out[rows, cols] = _decode(blocks.part(rows, cols, form), signed)
    return out


def quantise_(blocks: Blocks, values: Tensor, form: Format, *, signed: bool, **_: object) -> None:
    """Code a matrix, as `blockwise.quantise_` of the dynamic format, whose seed and position change nothing.

    Args:
        blocks: The codes (rows, cols) and scales (rows, ceil(cols / 256)); written.
        values: fp32 (rows, cols).
        form: The dynamic format.
        signed: A first moment, which may be negative.

    Raises:
        ValueError: The format is companded, or the blocks are not bitsandbytes'.
        ImportError: bitsandbytes is missing or too old.
    """
    _check(form, values)
    for rows, cols in tiles(values, TILE):
        part = values[rows, cols]
        _code(blocks.part(rows, cols, form), torch.where(part.isfinite(), part, 0.0), signed)


def adam_blockwise(
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Blocks], Sequence[Blocks]],
    counts: Sequence[int],
    out: Sequence[Tensor],
    how: Blockwise,
) -> None:
    """Compute `reference.adam_blockwise` for the dynamic format, tile by tile.

    Args:
        grads: The gradients R, floating (rows, cols); computed with in fp32.
        moments: First and second moments, codes (rows, cols) and scales (rows, ceil(cols / 256)); updated.
        counts: Step count t of each matrix, from 1.
        out: Directions N, fp32 (rows, cols); written.
        how: The format, which must be dynamic, and Adam's numbers.

    Raises:
        ValueError: The format is companded, or the blocks of a matrix are not bitsandbytes'.
        ImportError: bitsandbytes is missing or too old.
    """
    for grad in grads:
        _check(how.form, grad)
    for grad, first, second, t, direction in zip(grads, *moments, counts, out, strict=True):
        for rows, cols in tiles(grad, TILE):
            part, target = grad[rows, cols].float(), direction[rows, cols]
            seen = torch.where(part.square().isfinite(), part, 0.0).contiguous()
            state = first.part(rows, cols, how.form), second.part(rows, cols, how.form)
            inplace = all(tensor.is_contiguous() for tensor in (target, *state[0], *state[1]))
            if seen.is_cuda and inplace and target.dtype == torch.float32 and has_fused_adam():
                fused_adam(seen, state, t, target, how)
            else:
                _coded_adam(seen, state, t, target, how)


def fused_adam(grad: Tensor, moments: tuple[Blocks, Blocks], t: int, out: Tensor, how: Blockwise) -> None:
    """Adam by bitsandbytes' kernel; a zero parameter, lr = -1 and no decay leave the direction N itself.

    Args:
        grad: R, finite fp32 (rows, cols) whose blocks coincide; contiguous like every tensor here.
        moments: First and second moments, codes (rows, cols) and scales (rows, ceil(cols / 256)); updated.
        t: Step count.
        out: N, fp32 (rows, cols); written.
        how: Adam's numbers.
    """
    device = str(grad.device)
    _functional().optimizer_update_8bit_blockwise(
        optimizer_name="adam",
        g=grad,
        p=out.zero_(),
        state1=moments[0].codes,
        state2=moments[1].codes,
        beta1=how.betas[0],
        beta2=how.betas[1],
        beta3=0.0,
        alpha=0.0,
        eps=_eps(how, t),
        step=t,
        lr=-1.0,
        qmap1=dynamic_map(True, device),
        qmap2=dynamic_map(False, device),
        absmax1=moments[0].scale.view(-1),
        absmax2=moments[1].scale.view(-1),
        weight_decay=0.0,
        gnorm_scale=1.0,
        skip_zeros=False,
    )


@cache
def has_fused_adam() -> bool:
    """Tell whether this release takes the arguments of `fused_adam` by keyword, and needs no others."""
    update = getattr(_functional(), "optimizer_update_8bit_blockwise", None)
    if update is None:
        return False
    names = ["optimizer_name", "g", "p", "beta1", "beta2", "beta3", "alpha", "eps", "step", "lr"]
    names += [f"{kind}{number}" for kind in ("state", "qmap", "absmax") for number in (1, 2)]
    try:
        inspect.signature(update).bind(**dict.fromkeys([*names, "weight_decay", "gnorm_scale", "skip_zeros"]))
    except TypeError:
        return False
    return True


def _coded_adam(grad: Tensor, moments: tuple[Blocks, Blocks], t: int, out: Tensor, how: Blockwise) -> None:
    """Adam between a decoding and a coding by bitsandbytes."""
    first, second = _decode(moments[0], True), _decode(moments[1], False)
    step = out if out.is_contiguous() and out.dtype == torch.float32 else torch.empty_like(grad)
    fused.adam([grad], ([first], [second]), [t], [step], how.betas, how.eps, raw_eps=how.raw_eps)
    if step is not out:
        out.copy_(step)
    _code(moments[0], first, True)
    _code(moments[1], second, False)


def _eps(how: Blockwise, t: int) -> float:
    return how.eps / (1 - how.betas[1] ** t) ** 0.5 if how.raw_eps else how.eps


def _decode(blocks: Blocks, signed: bool) -> Tensor:
    values: Tensor = _functional().dequantize_blockwise(
        A=blocks.codes.contiguous(),
        absmax=blocks.scale.reshape(-1),
        code=dynamic_map(signed, str(blocks.codes.device)),
        blocksize=DYNAMIC.block,
    )
    return values


def _code(blocks: Blocks, values: Tensor, signed: bool) -> None:
    # A copy of the table: releases before 0.50 write to the one that they are given, on a CPU.
    table = dynamic_map(signed, str(values.device)).clone()
    codes, state = _functional().quantize_blockwise(A=values.contiguous(), code=table, blocksize=DYNAMIC.block)
    blocks.codes.copy_(codes.view(values.shape))
    blocks.scale.copy_(state.absmax.view(blocks.scale.shape))


def _check(form: Format, matrix: Tensor) -> None:
    if form != DYNAMIC:
        raise ValueError(f"bitsandbytes has no {form.name!r} format: choose state_dtype='bnb8', the dynamic one")
    if not coincides(matrix.shape):
        raise ValueError(
            f"bitsandbytes' blocks run across the rows of a {tuple(matrix.shape)} matrix: it needs a multiple of "
            f"{DYNAMIC.block} columns, or one row; choose another backend for this one"
        )


@cache
def _installed() -> str | None:
    try:
        return metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@cache
def _functional() -> Any:
    """The module `bitsandbytes.functional`.

    Raises:
        ImportError: It is missing or too old.
    """
    version = _installed()
    if version is None:
        raise ImportError(f"bitsandbytes is not installed: {_INSTALL}")
    if _release(version) < OLDEST:
        raise ImportError(f"bitsandbytes {version} is installed, whose blocks are not of 256 entries: {_INSTALL}")
    import bitsandbytes.functional as functional

    module: ModuleType = functional
    return module
