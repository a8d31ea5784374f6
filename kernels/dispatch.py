"""Choice of an implementation by operation, device and request."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import bnb, moments, project_back, random, reference, statistics

EVERYWHERE = ("auto", "torch", "triton")
"""Backends that have every operation."""
ADDITIONS = ("compile", "bitsandbytes")
"""Backends for 8-bit Adam alone ("8bit" by torch.compile on a CPU, "bnb8" by bitsandbytes); all else is torch's."""
BACKENDS = (*EVERYWHERE, *ADDITIONS)
"""Values of the option `backend`, which chooses the implementations of moments, bases and products."""


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
    return tensor.is_cuda and tensor.dtype != torch.float64 and has_triton()


def _interprets(tensor: Tensor) -> bool:
    """Whether Triton's interpreter runs on this tensor: slow, and chosen only by `backend="triton"`, as in tests."""
    fits = not tensor.is_cuda and tensor.dtype != torch.float64
    return fits and os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function that imports its module when it is first called."""

    def run(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), name)(*args, **options)

    return run


def _coded(torch_form: Callable[..., Any], *others: Implementation) -> tuple[Implementation, ...]:
    """Implementations of a rule on coded moments."""
    in_triton = _later("triton_moments", torch_form.__name__)
    return (
        Implementation("triton", _compiles, in_triton),
        Implementation("torch", _anywhere, torch_form),
        *others,
        Implementation("triton", _interprets, in_triton),
    )


_statistics = _later("triton_statistics", "square_means")

IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "adam": (
        Implementation("torch", moments.has_fused_adam, moments.adam),
        Implementation("torch", _anywhere, reference.adam),
        *(Implementation("triton", runs_on, _later("triton_moments", "adam")) for runs_on in (_compiles, _interprets)),
    ),
    "adam_companded": _coded(
        moments.adam_blockwise, Implementation("compile", _on_cpu, _later("compiled", "adam_blockwise"))
    ),
    "adamw_companded": _coded(
        moments.adamw_blockwise_, Implementation("compile", _on_cpu, _later("compiled", "adamw_blockwise_"))
    ),
    "adam_dynamic": _coded(moments.adam_blockwise, Implementation("bitsandbytes", bnb.runs_on, bnb.adam_blockwise)),
    "adamw_dynamic": _coded(
        moments.adamw_blockwise_,
        Implementation("bitsandbytes", bnb.runs_on, partial(moments.adamw_blockwise_, adam=bnb.adam_blockwise)),
    ),
    "lion_companded": _coded(moments.lion_blockwise),
    "lion_dynamic": _coded(moments.lion_blockwise),
    "project_back": (
        Implementation("triton", _compiles, _later("triton_project_back", "project_back_")),
        Implementation("torch", _anywhere, project_back.project_back_),
        Implementation("triton", _interprets, _later("triton_project_back", "project_back_")),
    ),
    "square_means": (
        Implementation("triton", lambda tensor: _compiles(tensor) and tensor.ndim == 2, _statistics),
        Implementation("torch", _anywhere, statistics.square_means),
        Implementation("triton", lambda tensor: _interprets(tensor) and tensor.ndim == 2, _statistics),
    ),
    "basis": (
        Implementation("triton", _compiles, _later("triton_random", "basis")),
        Implementation("torch", _anywhere, random.basis),
        Implementation("triton", _interprets, _later("triton_random", "basis")),
    ),
    "sketch": (
        Implementation("triton", _compiles, _later("triton_sketch", "sketch")),
        Implementation("torch", _anywhere, reference.sketch),
        Implementation("triton", _interprets, _later("triton_sketch", "sketch")),
    ),
}


def pick(op: str, tensor: Tensor, backend: str = "auto") -> Callable[..., Any]:
    """Return the fastest implementation of `op` that runs on `tensor`.

    Args:
        op: Name of the operation, a function of `lowmem.kernels.reference` or `lowmem.kernels.random`.
        tensor: A tensor that the operation will get; its device and dtype decide.
        backend: `"auto"`, or the name of the only backend that is acceptable.

    Returns:
        The first of the operation's implementations that runs on the tensor. "auto" chooses none that is slower than
        torch, and none that torch.compile has to compile.

    Raises:
        ValueError: No implementation of `op` by `backend` runs on this tensor.
    """
    candidates = [c for c in IMPLEMENTATIONS[op] if backend in ("auto", c.name)]
    if not candidates and backend in ADDITIONS:
        candidates = [c for c in IMPLEMENTATIONS[op] if c.name == "torch"]
    for candidate in candidates:
        if candidate.runs_on(tensor):
            return candidate.run
    if backend == "triton" and not has_triton():
        raise ValueError(f"backend='triton' has no {op!r}: Triton is not installed, pip install 'lowmem[triton]'")
    raise ValueError(
        f"backend={backend!r} has no {op!r} for {tensor.dtype} on {tensor.device.type}; pass backend='auto' or one of "
        f"{sorted({c.name for c in IMPLEMENTATIONS[op]})}"
    )
