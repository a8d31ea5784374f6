"""Random bases that are never stored: functions of a seed, a place and a window, made anew wherever they are needed.

A basis P (b x r) has `E[P P^T] = I`, so that `X P P^T` is an unbiased copy of X. Its numbers depend on their row and
column alone: every shard, device, dtype and resumed run has the same (other dtypes round the fp32 number).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import pick, random
from .together import Recipe
from .view import MatrixView

if TYPE_CHECKING:
    from .bucket import Bucket

DISTRIBUTIONS = random.BASES
"""Values of the option `distribution`."""

Device = torch.device | str


@dataclass(frozen=True, slots=True)
class SeededBasis:
    """A random basis P (size x rank).

    Args:
        distribution: "rademacher" (entries +-1 / sqrt(r)), "gaussian" (N(0, 1/r)) or "orthonormal" (r random columns of
            the cosine matrix with random signs of its rows, times sqrt(b/r); exact at r = b).
        seed: 32 bits; see `of`.
        size: b.
        rank: r.
    """

    distribution: str
    seed: int
    size: int
    rank: int

    @classmethod
    def of(cls, view: MatrixView, distribution: str, *source: int) -> SeededBasis:
        """The basis of a matrix; `source` is the user's seed, the place of the parameter and the window."""
        return cls(distribution, random.mix(*source), view.b, view.rank)

    @property
    def key(self) -> int:
        """An integer that identifies it among all bases of its shape; never 0, with which state begins."""
        return (DISTRIBUTIONS.index(self.distribution) + 1) << 32 | self.seed

    def of_key(self, key: int) -> SeededBasis:
        """The basis of this shape that has the given key."""
        return SeededBasis(DISTRIBUTIONS[(key >> 32) - 1], key & 0xFFFFFFFF, self.size, self.rank)

    def rows(
        self, rows: range, dtype: torch.dtype = torch.float32, device: Device = "cpu", backend: str = "auto"
    ) -> Tensor:
        """Make consecutive rows of P (len(rows), rank)."""
        out = torch.empty(len(rows), self.rank, dtype=torch.float32, device=device)
        pick("basis", out, backend)(out, self.distribution, self.seed, rows.start, self.size)
        return out.to(dtype)

    def matrix(self, dtype: torch.dtype = torch.float32, device: Device = "cpu", backend: str = "auto") -> Tensor:
        """Make P (size, rank)."""
        return self.rows(range(self.size), dtype, device, backend)

    def image(self, matrix: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
        """`A P` (a, rank) in a dtype; signs are made inside of the product, where there is a kernel for it."""
        if self.distribution != "rademacher":
            return matrix.to(dtype) @ self.matrix(dtype, matrix.device, backend)
        out = torch.empty(len(matrix), self.rank, dtype=dtype, device=matrix.device)
        pick("sketch", matrix, backend)(out, matrix, self.seed)
        return out


def bases(b: Bucket, now: Sequence[SeededBasis], backend: str) -> tuple[list[Recipe], list[Recipe]]:
    """Recipes of P_{t-1}, in which the momenta are written, and of P_t: the same ones until a window ends.

    The state keeps the key of the basis, so that a momentum is read in the basis in which it was written even if
    options have changed since.
    """
    rows, device = b.layout.projected(b.view), b.params[0].device

    def recipe(basis: SeededBasis) -> Recipe:
        return Recipe(partial(basis.rows, rows, b.dtype, device, backend), keep=b.layout.alone)

    keys, new = [int(held["basis_key"]) for held in b.states], [recipe(basis) for basis in now]
    for held, basis in zip(b.states, now, strict=True):
        held["basis_key"].fill_(basis.key)
    old = [
        made if key in (basis.key, 0) else recipe(basis.of_key(key))
        for key, basis, made in zip(keys, now, new, strict=True)
    ]
    return old, new


def growth(distribution: str, size: int, rank: int) -> float:
    """Mean growth of `|C|^2` when `C = X P` moves to another basis, `C <- C P^T P_new`.

    As `E[P_new P_new^T] = I`, it is `E|X P P^T|^2 / E|X P|^2`:

        gaussian (b + r + 1) / r      rademacher (b + r - 1) / r      orthonormal b / r
    """
    return {"gaussian": size + rank + 1, "rademacher": size + rank - 1, "orthonormal": size}[distribution] / rank


def shortest_window(distribution: str, size: int, rank: int, beta: float) -> int:
    """The least k for which a momentum stays bounded, `beta^k sqrt(growth) < 1`."""
    rate = math.sqrt(growth(distribution, size, rank))
    if rate < 1.0 or beta == 0.0:
        return 1
    window = max(1, math.ceil(math.log(rate) / -math.log(beta)))
    return window if beta**window * rate < 1.0 else window + 1
