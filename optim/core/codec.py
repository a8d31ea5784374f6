"""How a moment is stored between steps: in a floating dtype, or in 8-bit codes with a scale a block.

    "float32", "bfloat16", "float64"     that dtype, fp32 widened to fp64 for fp64 parameters
    "parameter"                          the parameter's own
    "8bit", "bnb8"                       codes of the moment's shape, and in fp32 `<name>_scale` (rows, cols / block)

Only `exp_avg` (signed) and `exp_avg_sq` (not) are coded. Statistics of rows and columns, vectors, tensors of fewer than
`SMALL` elements and those whose rows are shorter than `SHORT` stay in fp32. The shape of the whole tensor decides, so
that all shards agree. Vectors are never coded because they are one row, whose blocks any sharding would cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...kernels import random
from ...kernels.blockwise import FORMATS, Blocks, Format, dequantise, quantise_
from ...kernels.rounding import round_stochastically
from .spec import Axis, Spec
from .view import matrix_shape

STATE_DTYPES = ("float32", "bfloat16", "float64", "parameter", *FORMATS)
"""Values of the option `state_dtype`. In fp16 second moments would underflow."""

SCALE = "_scale"
"""Suffix of the scales of a coded moment."""

SMALL, SHORT = 4096, 16
"""Least elements of a coded tensor, as in bitsandbytes, and least length of its rows."""

State = dict[str, Tensor]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which moments of a parameter are computed: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def storage_dtype(param: torch.dtype, state_dtype: str) -> torch.dtype:
    """The dtype in which moments of a parameter are stored where they are not coded."""
    if state_dtype == "parameter":
        return param
    if state_dtype == "float32" or state_dtype in FORMATS:
        return work_dtype(param)
    dtype: torch.dtype = getattr(torch, state_dtype)
    return dtype


def form_of(name: str, shape: Sequence[int], state_dtype: str) -> Format | None:
    """The format in which a moment of this name and shape is coded; None where it is not."""
    rows, cols = rows_and_columns(shape)
    small = len(shape) < 2 or rows * cols < SMALL or cols < SHORT
    return None if small or not name.endswith(("exp_avg", "exp_avg_sq")) else FORMATS.get(state_dtype)


def specs(name: str, shape: tuple[int, ...], param: Tensor, state_dtype: str, axis: Axis = "param") -> dict[str, Spec]:
    """Describe a moment: one tensor, or codes and scales; `axis` is what its first dimension runs over, see `Spec`."""
    form = form_of(name, shape, state_dtype)
    if form is None:
        return {name: Spec(shape, storage_dtype(param.dtype, state_dtype), param.device, axis=axis)}
    rows, cols = rows_and_columns(shape)
    return {
        name: Spec(shape, form.code_dtype(signed=_signed(name)), param.device, form.name, axis),
        name + SCALE: Spec(
            (rows, form.scales(cols)), torch.float32, param.device, axis="m" if axis == "param" else axis
        ),
    }


def coded(held: State, name: str) -> Blocks | None:
    """A coded moment as a matrix; None where it is not coded."""
    return Blocks(matrix(held[name]), held[name + SCALE]) if name + SCALE in held else None


def load(held: State, name: str, state_dtype: str, dtype: torch.dtype) -> Tensor:
    """Return a moment in the working dtype: the stored tensor itself where it has that dtype."""
    blocks = coded(held, name)
    if blocks is None:
        return held[name].to(dtype)
    return dequantise(blocks, FORMATS[state_dtype], signed=_signed(name)).view(held[name].shape).to(dtype)


def store(held: State, name: str, value: Tensor, state_dtype: str, seed: random.Seed | None = None) -> None:
    """Write a moment back.

    Args:
        held: The state.
        name: Name of the moment.
        value: What `load` returned, since updated.
        state_dtype: How it is stored.
        seed: Of stochastic rounding, which a second moment needs: with b2 = 0.999 it changes by less in a step than
            bf16 or 8 bits resolve, so that rounding to nearest would freeze it.
    """
    blocks = coded(held, name)
    if blocks is not None:
        quantise_(
            blocks, matrix(value).float(), FORMATS[state_dtype], signed=_signed(name), seed=0 if seed is None else seed
        )
        return
    if seed is not None and held[name].dtype == torch.bfloat16 and value.dtype == torch.float32:
        flat = matrix(value)
        noise = random.noise(seed, range(len(flat)), range(flat.shape[1]), value.device)
        value = round_stochastically(flat, noise).view(value.shape)
    held[name].copy_(value)


def part(held: State, names: Iterable[str], state_dtype: str, rows: slice, cols: slice) -> State:
    """Some rows and columns of moments as matrices; columns start where a block does."""
    found = {}
    for name in names:
        blocks = coded(held, name)
        if blocks is None:
            found[name] = matrix(held[name])[rows, cols]
        else:
            found[name], found[name + SCALE] = blocks.part(rows, cols, FORMATS[state_dtype])
    return found


def zero_(held: State, name: str) -> None:
    """Set a moment to zero."""
    for key in {name, name + SCALE} & held.keys():
        held[key].zero_()


def matrix(tensor: Tensor) -> Tensor:
    """View a tensor as rows: (first dimension, rest), and a vector or a number as one row."""
    return tensor.reshape(rows_and_columns(tensor.shape))


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of `matrix`."""
    return matrix_shape(shape) if len(shape) >= 2 else (1, shape[0] if shape else 1)


def _signed(name: str) -> bool:
    return name.endswith("exp_avg")
