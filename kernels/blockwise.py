"""8-bit codes for moments: blocks of a row share a scale, the largest magnitude among them.

A moment is seen as a matrix (rows, cols). Blocks lie within a row and the last one may be shorter, so that rows never
share a scale, and a matrix that is split by rows is coded as its pieces are. With s the scale of a block:

    companded   first moment    c = round(127 sign(m) sqrt(|m| / s))      int8     m = s sign(c) (c / 127)^2
                second moment   c = 255 (v / s)^(1/4), see below          uint8    v = s (c / 255)^4
    dynamic     c = the nearest entry of a table of 256 values            uint8    x = s table[c]

The dynamic tables are those of bitsandbytes (arXiv 2110.02861): decades 10^-6 to 1, each halved into twice as many
cells as the one below. The companded code of a second moment is rounded up with the probability that makes v exact in
the mean, `(v - v_c) / (v_{c+1} - v_c)`: with b2 = 0.999 v changes by 0.1 % in a step where codes are 1.6 % apart or
more, and rounding to nearest would freeze it. It is 0 only where v is. An entry that is not finite is coded as zero.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import random

ASKED = frozenset({"cpu"})
"""Devices whose values are read to choose a faster path; reading those of a GPU would wait for it."""


class Format(NamedTuple):
    """A way to code moments.

    Args:
        name: "companded" or "dynamic".
        block: Entries that share a scale.
    """

    name: str
    block: int

    def code_dtype(self, *, signed: bool) -> torch.dtype:
        """The dtype of the codes of a first (signed) or second moment."""
        return torch.int8 if signed and self.name == "companded" else torch.uint8

    def scales(self, cols: int) -> int:
        """Scales of a row."""
        return -(-cols // self.block)


COMPANDED, DYNAMIC = Format("companded", 128), Format("dynamic", 256)
FORMATS = {"8bit": COMPANDED, "bnb8": DYNAMIC}
"""Formats by the name of the state dtype."""


class Blocks(NamedTuple):
    """A coded matrix (rows, cols) and the scales of its blocks (rows, ceil(cols / block)), fp32."""

    codes: Tensor
    scale: Tensor

    def part(self, rows: slice, cols: slice, form: Format) -> Blocks:
        """Some of its rows and columns, which start where a block does."""
        scales = slice(cols.start // form.block, form.scales(cols.stop))
        return Blocks(self.codes[rows, cols], self.scale[rows, scales])


def dequantise(blocks: Blocks, form: Format, *, signed: bool) -> Tensor:
    """Decode a matrix into fp32 (rows, cols)."""
    parts = [
        decode(codes, form, signed=signed).mul_(scale).flatten(1)
        for codes, scale in _blocked(form, blocks.codes, blocks.scale)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1) if parts else blocks.scale.new_empty(blocks.codes.shape)


def decode(codes: Tensor, form: Format, *, signed: bool) -> Tensor:
    """Values of codes, in units of the scale of their block."""
    if form.name == "dynamic":
        return dynamic_map(signed, str(codes.device))[codes.int()]
    if signed:
        unit = codes.float().mul_(1 / 127)
        return unit.abs().mul_(unit)
    return _fourth_power(codes.float().mul_(1 / 255))


def quantise_(
    blocks: Blocks,
    values: Tensor,
    form: Format,
    *,
    signed: bool,
    seed: random.Seed = 0,
    first: tuple[int, int] = (0, 0),
) -> None:
    """Code a matrix.

    Args:
        blocks: The codes and scales; written.
        values: fp32 (rows, cols).
        form: The format.
        signed: A first moment, which may be negative.
        seed: Of the rounding of a companded second moment.
        first: Its first row and column in the whole matrix: rounding is a function of seed, row and column.
    """
    if values.numel() == 0:
        return
    rounds = form.name == "companded" and not signed
    rows, cols = (range(start, start + size) for start, size in zip(first, values.shape, strict=True))
    noise = random.noise(seed, rows, cols, values.device) if rounds else values
    for codes, scale, part, dither in _blocked(form, blocks.codes, blocks.scale, values, noise):
        scale.copy_(part.abs().amax(-1, keepdim=True) if signed else part.amax(-1, keepdim=True))
        if scale.device.type not in ASKED or not scale.isfinite().all():
            part = part.where(part.isfinite(), 0.0)
            scale.copy_(part.abs().amax(-1, keepdim=True))
        unit = part / scale.clamp(min=torch.finfo(torch.float32).tiny)
        codes.copy_(encode(unit, form, signed=signed, noise=dither))


def encode(unit: Tensor, form: Format, *, signed: bool, noise: Tensor) -> Tensor:
    """Codes of values in units of their scale; `noise` (int16 or int32, 16 bits) rounds companded second moments."""
    if form.name == "dynamic":
        return _nearest(unit, signed)
    if signed:
        return unit.abs().sqrt_().copysign_(unit).mul_(127).round_()
    return _round_fourth_root(unit, noise)


def _round_fourth_root(unit: Tensor, noise: Tensor) -> Tensor:
    """Round `255 u^(1/4)` up or down at random so that its fourth power is exact in the mean; never down to 0."""
    low = unit.sqrt().sqrt_().mul_(255.0).floor_()  # c
    gap = torch.addcmul(low, low, low).mul_(2.0).add_(1.0).mul_(low.mul(2.0).add_(1.0))  # (c + 1)^4 - c^4
    share = unit.mul(255.0**4).sub_(_fourth_power(low.clone())).div_(gap)  # of the way from c to c + 1
    low.add_(share).add_(noise.float(), alpha=2.0**-16).add_(0.5).floor_()
    return low.clamp_(1.0, 255.0).mul_(unit.sign())


def _fourth_power(x: Tensor) -> Tensor:
    """`x^4` in place; torch's square is a power, several times slower than a product."""
    return x.mul_(x).mul_(x)


def _blocked(form: Format, codes: Tensor, scale: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """View matrices as (rows, blocks, block), and in a second item what is left of every row as one shorter block."""
    cols, views = codes.shape[1], []
    whole = cols // form.block
    if whole:
        main = (tensor[:, : whole * form.block].view(-1, whole, form.block) for tensor in (codes, *others))
        head = next(main)
        views.append((head, scale[:, :whole, None], *main))
    if whole * form.block < cols:
        rest = (tensor[:, None, whole * form.block :] for tensor in (codes, *others))
        head = next(rest)
        views.append((head, scale[:, whole:, None], *rest))
    return views


@lru_cache(maxsize=8)
def dynamic_map(signed: bool, device: str = "cpu") -> Tensor:
    """The 256 values of the dynamic format, ascending fp32: for i = 0..6 the midpoints of an even split of a decade.

    A signed one splits 10^(i-7) .. 10^(i-6) into 2^i cells on either side of zero, an unsigned one into 2^(i+1); zero
    and one make it 256.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):  # in fp32 from the start, as bitsandbytes' values are
        cells = 1 << decade if signed else 2 << decade
        edges = torch.linspace(0.1, 1.0, cells + 1, dtype=torch.float32, device="cpu")
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middle, -middle] if signed else [middle]
    return torch.cat(values).sort().values.to(device)


def _nearest(unit: Tensor, signed: bool) -> Tensor:
    """Codes of the nearest values of the dynamic map, an order of magnitude faster than a search.

    The upper 16 bits of an fp32 value are its cell. A table has the code of the least value in every cell; no cell has
    more than one border between two codes, so one comparison with that border tells whether it is the next code.
    """
    edges, cells = borders(signed, str(unit.device))
    cell = unit.contiguous().view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    code = cells.index_select(0, cell.view(-1)).view(unit.shape)
    return code + (unit > edges.index_select(0, code.view(-1)).view(unit.shape))


@lru_cache(maxsize=8)
def borders(signed: bool, device: str) -> tuple[Tensor, Tensor]:
    """Borders between codes (256,), the last one infinite, and the code of the least value of every cell (2^16,)."""
    table = dynamic_map(signed, "cpu").double()
    edges = torch.cat([(table[1:] + table[:-1]) / 2, table.new_tensor([torch.inf])]).float()
    pattern = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([pattern, pattern | 0xFFFF]).view(torch.float32).nan_to_num()
    return edges.to(device), torch.bucketize(ends.amin(0), edges[:-1], out_int32=True).to(device)
