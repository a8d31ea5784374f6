"""How a value in fp32 is written to a bf16 weight, in plain torch: the specification.

    nearest        the closest bf16 number
    stochastic     one of the two bf16 numbers around it, at random, so that the mean is the value
    compensated    the closest, and the rest in a correction of 16 bits: together they are the fp32 value exactly
    compensated8   the same with a correction of 8 bits: 24 bits of the value, its last 8 rounded stochastically

bf16 is the upper half of fp32, so all of this is arithmetic on the 32 bits of the value:

    h = (x + 2^15) >> 16        weight           c = x - (h << 16)        correction, in [-2^15, 2^15)

Random bits are a function of seed, row and column of the weight: the same on every device, rank and resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import choice, random

ROUNDINGS = ("nearest", "stochastic", "compensated", "compensated8")
CORRECTIONS = {"compensated": torch.int16, "compensated8": torch.int8}
"""Dtype of the correction, one a weight."""


@dataclass(frozen=True, slots=True)
class Target:
    """A weight that is written to, as a matrix in the order of its memory.

    Args:
        weight: The matrix (m, n).
        mode: One of `ROUNDINGS`; wider weights than bf16 are exact in all of them.
        correction: The corrections (m, n) of a compensated weight.
        seed: Of stochastic rounding.
        row: Number of its first row in the whole weight.
        col: Number of its first column.
        cells: For a selection of entries, the row and the column of each in the whole weight (shapes that broadcast).
    """

    weight: Tensor
    mode: str = "nearest"
    correction: Tensor | None = None
    seed: random.Seed = 0
    row: int = 0
    col: int = 0
    cells: tuple[Tensor, Tensor] | None = None

    @property
    def work(self) -> torch.dtype:
        """The dtype of the values that `read` returns and `write` takes: fp32, or fp64 for fp64 weights."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded, so that updating the weight in place is the same as `write`."""
        return self.weight.dtype == self.work

    def part(self, rows: slice, cols: slice = slice(None)) -> Target:
        """A piece of it."""
        correction = None if self.correction is None else self.correction[rows, cols]
        row, col = self.row + (rows.start or 0), self.col + (cols.start or 0)
        return replace(self, weight=self.weight[rows, cols], correction=correction, row=row, col=col)

    @property
    def draws(self) -> bool:
        """Whether its rounding needs random bits."""
        return self.mode in ("stochastic", "compensated8")

    def select(self, index: Tensor, dim: int) -> Target:
        """Copy some rows (dim 0) or columns (dim 1); `put` writes them back."""
        across = torch.arange(self.weight.shape[1 - dim], device=index.device)
        cells = (index[:, None], across) if dim == 0 else (across[:, None], index)
        return self._copy(lambda tensor: choice.select(tensor, index, dim), cells)

    def put(self, selection: Target, index: Tensor, dim: int) -> None:
        """Write back rows or columns that `select` has copied."""
        choice.put_(self.weight, index, dim, selection.weight)
        if self.correction is not None and selection.correction is not None:
            choice.put_(self.correction, index, dim, selection.correction)

    def take(self, index: Tensor) -> Target:
        """Copy the entries at flat indices (k,), as (1, k); `put_at` writes them back."""
        width = self.weight.shape[1]
        cells = (index // width, index % width) if self.draws else None
        return self._copy(lambda tensor: tensor.take(index)[None], cells)

    def put_at(self, selection: Target, index: Tensor) -> None:
        """Write back entries that `take` has copied."""
        choice.put_at_(self.weight, index, selection.weight[0])
        if self.correction is not None and selection.correction is not None:
            choice.put_at_(self.correction, index, selection.correction[0])

    def _copy(self, choose: Callable[[Tensor], Tensor], cells: tuple[Tensor, Tensor] | None) -> Target:
        correction = None if self.correction is None else choose(self.correction)
        moved = (cells[0] + self.row, cells[1] + self.col) if cells else None
        return replace(self, weight=choose(self.weight), correction=correction, cells=moved)

    def read(self) -> Tensor:
        """The value of the weight, corrections included, in a tensor of its own."""
        if self.correction is not None:
            return join(self.weight, self.correction)
        return self.weight.to(self.work, copy=True)

    def edit(self, decay: float | Tensor = 1.0) -> Tensor:
        """`decay` times the weight, to be changed in place and then written: the weight itself where it is exact."""
        value = self.weight if self.exact else self.read()
        return value.mul_(decay) if isinstance(decay, Tensor) or decay != 1.0 else value

    def write(self, value: Tensor) -> None:
        """Write a value in the working dtype; it may be overwritten. A mode that `check` refuses is an error."""
        self.check()
        if self.exact or self.mode == "nearest":
            self.weight.copy_(value)
        elif self.correction is None:
            self.weight.copy_(round_stochastically(value, self._noise()))
        else:
            eight = self.mode == "compensated8"
            weight, correction = split(value, self._noise() if eight else None)
            self.weight.copy_(weight)
            self.correction.copy_(correction)

    def check(self) -> None:
        """Refuse what cannot be written.

        Raises:
            ValueError: The mode is unknown, or a weight that is not exact lacks the correction of its mode or has one
                without need.
        """
        wrong = not self.exact and (self.mode in CORRECTIONS) != (self.correction is not None)
        if self.mode not in ROUNDINGS or wrong:
            raise ValueError(
                f"Invalid mode: {self.mode!r} {'without' if self.correction is None else 'with'} a correction; choose "
                f"one of {ROUNDINGS}, {tuple(CORRECTIONS)} with a correction, the others without"
            )

    def _noise(self) -> Tensor:
        if self.cells is not None:
            return random.noise_at(self.seed, *self.cells).view(self.weight.shape)
        rows, cols = self.weight.shape
        across = range(self.col, self.col + cols)
        return random.noise(self.seed, range(self.row, self.row + rows), across, self.weight.device)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 to bf16 with 16 random bits an entry (int16)."""
    upper = _bits(value).add(noise).add_(1 << 15).bitwise_right_shift_(16)
    return upper.to(torch.int16).view(torch.bfloat16)


def split(value: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split fp32 into the nearest bf16 and a correction, of 16 bits, or of 8 bits where random bits are given."""
    bits = _bits(value)
    if noise is not None:
        bits = bits.add(noise.bitwise_and(0xFF)).bitwise_and_(-256)
    upper = bits.add(1 << 15).bitwise_right_shift_(16)
    rest = bits - (upper << 16)
    weight = upper.to(torch.int16).view(torch.bfloat16)
    return weight, rest.to(torch.int16) if noise is None else (rest >> 8).to(torch.int8)


def join(weight: Tensor, correction: Tensor) -> Tensor:
    """The fp32 value that `split` took apart."""
    upper = weight.view(torch.int16).int().bitwise_left_shift_(16)
    shift = 8 if correction.dtype == torch.int8 else 0
    return upper.add_(correction.int().bitwise_left_shift_(shift)).view(torch.float32)


def converted(correction: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a correction of 16 bits to the nearest of 8 bits, or one of 8 bits to 16, exactly."""
    if correction.dtype == dtype:
        return correction
    wide = correction.int()
    if dtype == torch.int8:
        return wide.add_(1 << 7).bitwise_right_shift_(8).clamp_(max=127).to(dtype)
    return wide.bitwise_left_shift_(8).to(dtype)


def _bits(value: Tensor) -> Tensor:
    """The 32 bits of fp32 values; every NaN becomes the one whose upper half alone, as bf16, is NaN too."""
    return torch.where(value.isnan(), torch.nan, value).contiguous().view(torch.int32)
