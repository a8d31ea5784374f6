"""Choice of an implementation by operation, device and request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import moments, random, reference

BACKENDS = ("auto", "torch")


class Implementation(NamedTuple):
    """One way to run an operation, and the test whether it can run on a tensor."""

    name: str
    runs_on: Callable[[Tensor], bool]
    run: Callable[..., Any]


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "adam": (
        Implementation("torch", moments.has_fused_adam, moments.adam),
        Implementation("torch", lambda _: True, reference.adam),
    ),
    "basis": (Implementation("torch", lambda _: True, random.basis),),
}


def pick(op: str, tensor: Tensor, backend: str = "auto") -> Callable[..., Any]:
    """Return the fastest implementation of `op` that runs on `tensor`.

    Args:
        op: Name of the operation, a function of `lowmem.kernels.reference`.
        tensor: A tensor that the operation will get; its device and dtype decide.
        backend: `"auto"`, or the name of the only backend that is acceptable.

    Raises:
        ValueError: No implementation of `op` by `backend` runs on this tensor.
    """
    for candidate in IMPLEMENTATIONS[op]:
        if backend in ("auto", candidate.name) and candidate.runs_on(tensor):
            return candidate.run
    raise ValueError(
        f"backend={backend!r} has no {op!r} for {tensor.dtype} on {tensor.device.type}; pass backend='auto' or one of "
        f"{sorted({c.name for c in IMPLEMENTATIONS[op]})}"
    )
