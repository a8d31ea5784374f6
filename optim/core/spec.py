"""Metadata of a state tensor: state is described before it exists."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Spec(NamedTuple):
    """Metadata of a state tensor; `form` names the code of those that are coded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    form: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def counter(device: torch.device | str = "cpu") -> Spec:
    """Metadata of a counter: fp32, as torch stores step counts."""
    return Spec((), torch.float32, torch.device(device))
