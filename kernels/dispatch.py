"""Choice of an implementation by operation, device and request."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from . import moments, project_back, random, reference

BACKENDS = ("auto", "torch", "compile", "triton", "bitsandbytes")
"""Values of the option `backend`. "compile" is torch's operations, with 8-bit moments on a CPU by torch.compile."""


class Implementation(NamedTuple):
    """One way to run an operation, and the test whether it can run on a tensor."""

    name: str
    runs_on: Callable[[Tensor], bool]
    run: Callable[..., Any]


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed; importing it takes a while, which the first use pays."""
    return importlib.util.find_spec("triton") is not None


def _anywhere(_: Tensor) -> bool:
    return True


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _compiles(tensor: Tensor) -> bool:
    return tensor.is_cuda and has_triton()


def _interprets(tensor: Tensor) -> bool:
    """Triton's interpreter runs on a CPU: slow, and never chosen by itself."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not tensor.is_cuda and has_triton()


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is first used."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), name)(*args)

    return run


def _torch(run: Callable[..., Any]) -> tuple[Implementation, ...]:
    """One implementation, which nothing would be gained by compiling."""
    return Implementation("torch", _anywhere, run), Implementation("compile", _anywhere, run)


def _coded(torch_form: Callable[..., Any], name: str) -> tuple[Implementation, ...]:
    """Implementations of a rule on companded moments."""
    return (
        Implementation("torch", _anywhere, torch_form),
        Implementation("compile", _on_cpu, _later("compiled", name)),
        Implementation("compile", _anywhere, torch_form),
    )


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "adam": (
        Implementation("torch", moments.has_fused_adam, moments.adam),
        Implementation("torch", _anywhere, reference.adam),
        Implementation("compile", _anywhere, reference.adam),
    ),
    "adam_companded": _coded(moments.adam_blockwise, "adam_blockwise"),
    "adam_dynamic": _torch(moments.adam_blockwise),
    "adamw_companded": _coded(moments.adamw_blockwise_, "adamw_blockwise_"),
    "adamw_dynamic": _torch(moments.adamw_blockwise_),
    "lion_companded": _torch(moments.lion_blockwise),
    "lion_dynamic": _torch(moments.lion_blockwise),
    "project_back": _torch(project_back.project_back_),
    "basis": (
        Implementation("triton", _compiles, _later("triton_random", "basis")),
        Implementation("torch", _anywhere, random.basis),
        Implementation("compile", _anywhere, random.basis),
        Implementation("triton", _interprets, _later("triton_random", "basis")),
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
