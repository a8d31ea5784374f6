"""Metadata of a state tensor: state is described before it exists."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Axis = Literal["param", "m", "n", "kept", "basis", "projected", "entries", ""]
"""What the first dimension of a state tensor runs over, which decides how it is sharded beside its parameter:

    param        the same as the parameter's, and so on: a tensor of its shape
    m, n         the rows or the columns of the parameter as a matrix
    kept         the rows of R (a, r)
    basis        the rows of P (b, r), of which every rank may keep an even share (`shard_basis`)
    projected    the rows of P, sharded as the projected side is and never otherwise
    entries      single entries, dealt out evenly wherever they lie in the parameter
    ""           nothing that is sharded: every rank has all of it
"""


class Spec(NamedTuple):
    """Metadata of a state tensor.

    Args:
        shape: Its shape, that of the whole where it is sharded.
        dtype: Its dtype.
        device: Its device.
        form: Name of the 8-bit format of a coded moment; None for plain numbers.
        axis: What its first dimension runs over; see `Axis`.
        meaning: What its numbers stand for where the shape does not tell: a rule, a side, a kind of basis.
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
