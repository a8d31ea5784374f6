"""Weights of every dtype, rounding and memory order, and the check of the kernel that moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.reference import Move, Scaled, Signed
from ..kernels.rounding import CORRECTIONS, Target
from .gpu_compare import Found, written
from .gpu_device import Bench

SHAPES = ((4096, 4096, 1024), (11008, 4096, 1024), (4096, 11008, 1024), (5461, 2048, 512), (1000, 33, 7))
EVERYTHING, ODD, TINY = (2048, 5461, 512), (129, 257, 33), (33, 57, 20)

RESIDUALS = ("none", "rows", "cols", "sign", "remainder", "rows alone", "sign alone", "decay alone")
"""Residuals beside a product, and what happens without one."""
COMMON = ("none", "rows", "cols", "remainder")


class Mode(NamedTuple):
    """A dtype of weights and how they are rounded."""

    dtype: torch.dtype
    rounding: str

    @property
    def name(self) -> str:
        """Both in a word."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.rounding}"

    @property
    def gemm(self) -> torch.dtype:
        """The dtype of products for such weights."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype


MODES = (
    Mode(torch.bfloat16, "nearest"),
    Mode(torch.bfloat16, "stochastic"),
    Mode(torch.bfloat16, "compensated"),
    Mode(torch.bfloat16, "compensated8"),
    Mode(torch.float32, "nearest"),
    Mode(torch.float16, "nearest"),
)


@dataclass(frozen=True)
class Start:
    """A weight before it moves."""

    target: Target

    def copy(self) -> Target:
        """The same weight in memory of its own."""
        weight, correction = self.target.weight.clone(), self.target.correction
        return Target(
            weight, self.target.mode, None if correction is None else correction.clone(), self.target.seed, 3, 10
        )


def transposed(matrix: Tensor) -> Tensor:
    """The same matrix, column after column in memory."""
    return matrix.T.contiguous().T


def make_target(bench: Bench, shape: tuple[int, int], mode: Mode, turned: bool) -> Start:
    """A weight as layers have it, with corrections where its mode keeps some."""
    weight = (0.05 * bench.normal(*shape)).to(mode.dtype)
    kept = CORRECTIONS.get(mode.rounding) if mode.dtype == torch.bfloat16 else None
    correction = None
    if kept is not None:
        largest = 2000 if kept == torch.int16 else 100
        correction = (bench.normal(*shape) * largest / 4).clamp(-largest, largest).to(kept)
    if turned:
        weight, correction = transposed(weight), None if correction is None else transposed(correction)
    return Start(Target(weight, mode.rounding if mode.dtype == torch.bfloat16 else "nearest", correction, 2**31 + 5))


def project_back_cases(bench: Bench) -> Iterator[tuple[str, Callable[[Callable[..., Any]], list[Found]]]]:
    """What models use, then every mode with every residual on one shape, and each of them alone on an odd one."""
    everything, odd = (TINY, TINY) if bench.interpreted else (EVERYTHING, ODD)
    chosen = [(shape, mode, kind, False) for shape in SHAPES for kind in COMMON for mode in MODES[1:3]]
    chosen = [] if bench.interpreted else chosen
    chosen += [(everything, MODES[1], kind, True) for kind in RESIDUALS]
    chosen += [(everything, mode, kind, False) for mode in MODES for kind in RESIDUALS]
    if odd != everything:
        chosen += [(odd, mode, "none", False) for mode in MODES]
        chosen += [(odd, MODES[1], kind, False) for kind in RESIDUALS[1:]]
    for shape, mode, kind, turned in chosen:
        name = f"{shape} {mode.name} {kind}{' transposed' * turned}"
        yield name, partial(check_move, bench, shape, mode, kind, turned=turned)


def make_move(bench: Bench, shape: tuple[int, int, int], mode: Mode, kind: str) -> Move:
    """A move as optimizers make it; rates are tensors where a residual has factors of rows."""
    m, n, rank = shape
    decay, alpha = 0.99, -0.02
    grad = bench.normal(m, n, dtype=mode.dtype)
    sound = torch.ones((), dtype=torch.bool, device=bench.device)
    move = Move(decay, alpha, mode.gemm)
    if kind.startswith(("rows", "cols")):
        factors = bench.normal(m, 1) if kind.startswith("rows") else bench.normal(1, n)
        factors.view(-1)[0] = 0.0
        rates = [torch.tensor(rate, device=bench.device) for rate in (decay, alpha)]
        return move._replace(residual=Scaled(grad, factors), decay=rates[0], alpha=rates[1])
    if kind.startswith("sign"):
        return move._replace(residual=Signed(grad, sound, 1.0))
    if kind == "remainder":
        left, right = bench.normal(m, rank, dtype=mode.gemm), bench.normal(n, rank, dtype=mode.gemm)
        floor = torch.full((m, 1), 0.01, device=bench.device)
        return move._replace(residual=Signed(grad, sound, 0.7, left / rank**0.5, right, floor))
    return move


def check_move(
    bench: Bench, shape: tuple[int, int, int], mode: Mode, kind: str, kernel: Callable[..., Any], *, turned: bool
) -> list[Found]:
    """Move a weight by the kernel, and by the specification with the same operands and products in fp64."""
    m, n, rank = shape
    start, move = make_target(bench, (m, n), mode, turned), make_move(bench, shape, mode, kind)
    left, right = bench.normal(m, rank) / rank**0.5, bench.normal(n, rank, dtype=mode.gemm)
    factors: tuple[Tensor | None, Tensor | None] = (None, None) if kind.endswith("alone") else (left, right)
    ours, theirs = start.copy(), start.copy()
    kernel(ours, *factors, move)
    rounded = [None if x is None else x.to(move.gemm) for x in factors]
    reference.project_back_(theirs, rounded[0], rounded[1], move._replace(gemm=torch.float64))
    return [written(ours, theirs, start.copy().read(), 3e-3 if kind == "remainder" else 1e-4)]
