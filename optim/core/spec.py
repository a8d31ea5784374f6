"""Metadata of a state tensor: state is described before it exists."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Axis = Literal["param", "m", "n", "kept", "basis", "projected", "entries", ""]
"""What the rows of a state are: `param` all dimensions of the parameter, `m` and `n` its rows and columns as a matrix,
`kept` the rows of R, `basis` the rows of P, which may be spread, `projected` what has those rows and is not, `entries`
single entries, dealt out evenly wherever they lie, and nothing of it where every rank has all."""


class Spec(NamedTuple):
    """Metadata of a state tensor.

    Args:
        shape: Its shape, of the whole where it is sharded.
        dtype: Its dtype.
        device: Its device.
        form: Name of the code of one that is coded.
        meaning: What its numbers stand for beside their shape: a rule, a side, a kind of basis.
        axis: What its rows are, where they lie if the parameter is sharded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    form: str | None = None
    axis: Axis = ""
    meaning: str = ""

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
