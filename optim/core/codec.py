"""How a state tensor is stored between steps."""

from __future__ import annotations

import torch
from torch import Tensor

STATE_DTYPES = ("float32", "bfloat16", "float64", "parameter")
"""Values of the option `state_dtype`; the last is the parameter's own dtype. In fp16 second moments would underflow."""


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which moments of a parameter are computed: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def storage_dtype(param: torch.dtype, state_dtype: str) -> torch.dtype:
    """The dtype in which moments of a parameter are stored; fp32 is widened to fp64 for fp64 parameters."""
    if state_dtype == "parameter":
        return param
    if state_dtype == "float32":
        return work_dtype(param)
    dtype: torch.dtype = getattr(torch, state_dtype)
    return dtype


def load(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a state tensor in the working dtype: the stored tensor itself where it has that dtype."""
    return stored.to(dtype)


def store(stored: Tensor, value: Tensor, seed: int | None = None) -> None:
    """Write a working tensor back to a state tensor of another dtype.

    Args:
        stored: The state tensor.
        value: The working tensor that `load` returned, since updated.
        seed: Round to bf16 stochastically with this seed. A second moment needs it: with beta2 = 0.999 it changes by
            less than bf16 resolves in a step, so that rounding to nearest would freeze it.
    """
    if seed is not None and stored.dtype == torch.bfloat16 and value.dtype == torch.float32:
        value = round_stochastically(value, seed)
    stored.copy_(value)


def round_stochastically(value: Tensor, seed: int) -> Tensor:
    """Round fp32 to a value that bf16 holds, up with the probability that makes the mean exact."""
    generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    rounded = (value.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return torch.where(value.isfinite(), rounded.view(torch.float32), value)
