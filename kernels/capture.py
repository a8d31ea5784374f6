"""Whether a CUDA graph is being captured, and constants for it: nothing may be copied from the host meanwhile."""

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
    """Context of a capture in which `constant` makes equal constants only once."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def constant(words: tuple[int, ...], device: torch.device) -> Tensor:
    """Make an int32 tensor of these words on the device by fills, which a graph can hold; it may be shared."""
    if _kept is not None and (device, words) in _kept:
        return _kept[device, words]
    made = torch.zeros(len(words), dtype=torch.int32, device=device)
    for index, word in enumerate(words):
        if word:
            made[index].fill_(word)
    if _kept is not None:
        _kept[device, words] = made
    return made
