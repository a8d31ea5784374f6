"""What Triton kernels share: the hash of `lowmem.kernels.random`, the writing of weights, numbers on the device.

bf16 is handled as the 16 bits that it is: weights are passed as int16, and rounded by integer operations, which are the
same on every GPU and under the interpreter (whose casts to bf16 truncate).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .capture import capturing, constant
from .random import Seed, as_int32
from .rounding import Target

EXACT, NEAREST, STOCHASTIC, COMPENSATED, COMPENSATED8, HALF = range(6)
"""Ways to write a weight: fp32, four to bf16, and fp16."""

_MODES = {"nearest": NEAREST, "stochastic": STOCHASTIC, "compensated": COMPENSATED, "compensated8": COMPENSATED8}


@triton.jit
def finalise(x):
    """The 32-bit finaliser of lowbias32, on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def bits(row, col, seed):
    """`random.bits`, uint32."""
    keyed = finalise(row.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32) + seed.to(tl.uint32))
    return finalise(keyed ^ (col.to(tl.uint32) * tl.full((), 0x85EBCA6B, tl.uint32)))


@triton.jit
def noise(row, col, seed):
    """`random.noise`, int32 in [-2^15, 2^15)."""
    word = bits(row, col >> 1, seed)
    half = ((word >> ((col & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)
    return tl.where(half >= 32768, half - 65536, half)


@triton.jit
def number(scalars, index):
    """A float among the numbers of `pack`."""
    return tl.load(scalars + index).to(tl.float32, bitcast=True)


@triton.jit
def read_weight(weight, correction, offset, corrected, mask, MODE: tl.constexpr):
    """The value of a weight, corrections included, in fp32."""
    stored = tl.load(weight + offset, mask=mask, other=0)
    if MODE == 0 or MODE == 5:
        value = stored.to(tl.float32)
    else:
        whole = stored.to(tl.int32) << 16
        if MODE == 3:
            whole += tl.load(correction + corrected, mask=mask, other=0).to(tl.int32)
        if MODE == 4:
            whole += tl.load(correction + corrected, mask=mask, other=0).to(tl.int32) << 8
        value = whole.to(tl.float32, bitcast=True)
    return value


@triton.jit
def write_weight(weight, correction, offset, corrected, value, row, col, seed, mask, MODE: tl.constexpr):
    """Write a value in fp32; `row` and `col` are those of the whole weight."""
    if MODE == 0:
        tl.store(weight + offset, value, mask=mask)
    elif MODE == 5:
        tl.store(weight + offset, value.to(tl.float16), mask=mask)
    else:
        whole = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        if MODE == 1:
            upper = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
        elif MODE == 2:
            upper = (whole + noise(row, col, seed) + 0x8000) >> 16
        else:
            if MODE == 4:
                whole = (whole + (noise(row, col, seed) & 0xFF)) & -256
            upper = (whole + 0x8000) >> 16
            rest = whole - (upper << 16)
            if MODE == 3:
                tl.store(correction + corrected, rest.to(tl.int16), mask=mask)
            else:
                tl.store(correction + corrected, (rest >> 8).to(tl.int8), mask=mask)
        tl.store(weight + offset, upper.to(tl.int16), mask=mask)


def mode_of(target: Target) -> int:
    """How a target is written.

    Raises:
        ValueError: Its dtype has no kernel.
    """
    dtype = target.weight.dtype
    if dtype == torch.float32:
        return EXACT
    if dtype == torch.float16 and target.mode == "nearest":
        return HALF
    if dtype == torch.bfloat16:
        return _MODES[target.mode]
    raise ValueError(
        f"got {dtype} weights, rounding={target.mode!r}: Triton kernels are for fp32, bf16 and fp16, pass "
        "backend='torch'"
    )


def raw(weight: Tensor) -> Tensor:
    """A weight as kernels take it: bf16 as int16."""
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight


def pack(device: torch.device, numbers: Sequence[float | Tensor], words: Sequence[Seed] = ()) -> Tensor:
    """Put numbers and 32-bit words into one int32 tensor on the device, without a synchronisation.

    What is a tensor on the device stays there. While a CUDA graph is captured the others are constants of it.
    """
    floats = [0.0 if isinstance(x, Tensor) else x for x in numbers]
    whole = [0 if isinstance(word, Tensor) else as_int32(word) for word in words]
    known = torch.tensor(floats, dtype=torch.float32, device="cpu").view(torch.int32)
    packed = torch.cat([known, torch.tensor(whole, dtype=torch.int32, device="cpu")])
    there = {index: x for index, x in enumerate((*numbers, *words)) if isinstance(x, Tensor)}
    if device.type == "cuda" and capturing():
        packed = constant(tuple(packed.tolist()), device)
        packed = packed.clone() if there else packed
    elif device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    for index, value in there.items():
        if index < len(numbers):
            packed[index] = value.detach().to(device, torch.float32).view(torch.int32)
        else:
            packed[index] = value.to(device, torch.int32)
    return packed
