"""What code that runs while a CUDA graph is captured must know: nothing may be copied from the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_kept: dict[tuple[torch.device, tuple[int, ...]], Tensor] | None = None


def capturing() -> bool:
    """Tell whether a graph is captured on the current stream."""
    found: bool = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
    return found


@contextmanager
def sharing() -> Iterator[None]:
    """While a graph is captured within, constants that are equal are one tensor of it."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def constant(words: tuple[int, ...], device: torch.device) -> Tensor:
    """Put 32-bit words on the device by filling; the tensor may be shared."""
    if _kept is not None and (device, words) in _kept:
        return _kept[device, words]
    made = torch.zeros(len(words), dtype=torch.int32, device=device)
    for index, word in enumerate(words):
        if word:
            made[index].fill_(word)
    if _kept is not None:
        _kept[device, words] = made
    return made
