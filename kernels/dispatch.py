"""Choice of an implementation by operation, device and request."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from . import moments, random, reference

BACKENDS = ("auto", "torch", "triton")


class Implementation(NamedTuple):
    """One way to run an operation, and the test whether it can run on a tensor."""

    name: str
    runs_on: Callable[[Tensor], bool]
    run: Callable[..., Any]


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed; importing it takes a while, which the first use pays."""
    return importlib.util.find_spec("triton") is not None


def _compiles(tensor: Tensor) -> bool:
    return tensor.is_cuda and has_triton()


def _interprets(tensor: Tensor) -> bool:
    """Triton's interpreter runs on a CPU: slow, and never chosen by itself."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not tensor.is_cuda and has_triton()


def _triton_basis(*args: Any) -> None:
    from . import triton_random

    triton_random.basis(*args)


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "adam": (
        Implementation("torch", moments.has_fused_adam, moments.adam),
        Implementation("torch", lambda _: True, reference.adam),
    ),
    "basis": (
        Implementation("triton", _compiles, _triton_basis),
        Implementation("torch", lambda _: True, random.basis),
        Implementation("triton", _interprets, _triton_basis),
    ),
}


def pick(op: str, tensor: Tensor, backend: str = "auto") -> Callable[..., Any]:
    """Return the fastest implementation of `op` that runs on `tensor`.

    Args:
        op: Name of the operation, a function of `lowmem.kernels.reference` or `lowmem.kernels.random`.
        tensor: A tensor that the operation will get; its device and dtype decide.
        backend: `"auto"`, or the name of the only backend that is acceptable.

    Raises:
        ValueError: No implementation of `op` by `backend` runs on this tensor.
    """
    for candidate in IMPLEMENTATIONS[op]:
        if backend in ("auto", candidate.name) and candidate.runs_on(tensor):
            return candidate.run
    if backend == "triton" and not has_triton():
        raise ValueError(f"backend='triton' has no {op!r}: Triton is not installed, pip install 'lowmem[triton]'")
    raise ValueError(
        f"backend={backend!r} has no {op!r} for {tensor.dtype} on {tensor.device.type}; pass backend='auto' or one of "
        f"{sorted({c.name for c in IMPLEMENTATIONS[op]})}"
    )
