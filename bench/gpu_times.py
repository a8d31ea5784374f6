"""Every kernel beside torch's operations and its floor in bytes or operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..kernels import moments as by_torch
from ..kernels import project_back, random, reference
from ..kernels.blockwise import COMPANDED, DYNAMIC, Format, dequantise, quantise_
from ..kernels.reference import Blockwise
from .gpu_device import Bench, Call
from .gpu_kernels import empty, find, moments
from .gpu_weights import MODES, Mode, make_move, make_target

TORCH: Mapping[str, Callable[..., Any]] = {
    "adam": by_torch.adam,
    "adam_blockwise": by_torch.adam_blockwise,
    "adamw_blockwise_": by_torch.adamw_blockwise_,
    "lion_blockwise": by_torch.lion_blockwise,
    "project_back_": project_back.project_back_,
    "square_means": reference.square_means,
    "quantise_": quantise_,
    "dequantise": dequantise,
    "basis": random.basis,
    "project": torch.mm,
}
"""The same operations in torch, as optimizers use them."""

LOW = ((11008, 1024), (2048, 512), (768, 256))
WEIGHTS = ((4096, 11008), (2048, 5461), (768, 2048))
RANKS = {4096: 1024, 2048: 512, 768: 256}
ESTIMATE = 1.5
"""Seconds that a timing may take."""


class Timed(NamedTuple):
    """One operation on one shape.

    Args:
        op: The kernel.
        name: Shape and variant.
        size: Bytes that must be read and written.
        flops: Operations of its products.
        make: Makes a call of an implementation with new buffers.
    """

    op: str
    name: str
    size: float
    flops: float
    make: Callable[[Callable[..., Any]], Call]


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time everything that fits the budget; what does not is yielded with a reason."""
    for timed in entries(bench):
        floor = bench.floor(timed.size, timed.flops)
        for implementation, run in (("triton", find(timed.op)), ("torch", TORCH[timed.op])):
            row = {"op": timed.op, "name": timed.name, "implementation": implementation}
            if run is None:
                continue
            if bench.budget.left() < ESTIMATE:
                yield row | {"skipped": "no time left"}
                continue
            try:
                ms = bench.time(lambda run=run, make=timed.make: make(run), int(timed.size))  # type: ignore[misc]
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {error}"}
                continue
            yield row | {"ms": ms, "floor_ms": floor.ms, "bound": floor.bound, "over_floor": ms / floor.ms}


def entries(bench: Bench) -> Iterator[Timed]:
    """All operations on the shapes of a 7B, a 1B and a 130M model."""
    low, weights = (((40, 136),), ((33, 57),)) if bench.interpreted else (LOW, WEIGHTS)
    for shape in low:
        yield from _moments(bench, shape)
    for shape in weights:
        yield from _adamw(bench, shape)
        yield from _moves(bench, shape, RANKS.get(min(shape), 16))
        yield from _passes(bench, shape)


def _moments(bench: Bench, shape: tuple[int, int]) -> Iterator[Timed]:
    count = shape[0] * shape[1]

    def adam(run: Callable[..., Any]) -> Call:
        grad, first, second, out = (bench.normal(*shape) for _ in range(4))
        second.square_()
        return lambda: run([grad], ([first], [second]), [3], [out], (0.9, 0.999), 1e-8)

    yield Timed("adam", f"{shape}", 24.0 * count, 0.0, adam)
    for form in (COMPANDED, DYNAMIC):
        yield Timed(
            "adam_blockwise", f"{shape} {form.name}", _coded(shape, form, 8.0), 0.0, _blockwise(bench, shape, form)
        )

    def basis(run: Callable[..., Any]) -> Call:
        out = bench.normal(*shape)
        return lambda: run(out, "gaussian", 7, 0, shape[0])

    yield Timed("basis", f"{shape} gaussian", 4.0 * count, 0.0, basis)


def _blockwise(bench: Bench, shape: tuple[int, int], form: Format) -> Callable[[Callable[..., Any]], Call]:
    def make(run: Callable[..., Any]) -> Call:
        grad, out, pair = bench.normal(*shape), bench.normal(*shape), moments(bench, shape, form)
        how = Blockwise(form, [3], (0.9, 0.999), 1e-8)
        return lambda: run([grad], ([pair[0]], [pair[1]]), [3], [out], how)

    return make


def _coded(shape: tuple[int, int], form: Format, rest: float) -> float:
    """Bytes of two coded moments, read and written, and of `rest` an entry."""
    return shape[0] * (shape[1] * (4.0 + rest) + 16.0 * form.scales(shape[1]))


def _adamw(bench: Bench, shape: tuple[int, int]) -> Iterator[Timed]:
    how = Blockwise(COMPANDED, [3], (0.9, 0.999), 1e-8)
    for mode, rest in ((MODES[1], 6.0), (MODES[2], 10.0)):

        def make(run: Callable[..., Any], mode: Mode = mode) -> Call:
            target, pair = make_target(bench, shape, mode, False).target, moments(bench, shape, COMPANDED)
            grad = bench.normal(*shape, dtype=mode.dtype)
            return lambda: run(target, grad, pair, 3, 1e-6, 1.0, how)

        yield Timed("adamw_blockwise_", f"{shape} {mode.name}", _coded(shape, COMPANDED, rest), 0.0, make)


def _moves(bench: Bench, shape: tuple[int, int], rank: int) -> Iterator[Timed]:
    (m, n), products = shape, 2.0 * shape[0] * shape[1] * rank
    factors = 4.0 * m * rank + 2.0 * n * rank
    for mode, kind, more in (
        (MODES[0], "none", 4.0), (MODES[1], "none", 4.0), (MODES[2], "none", 8.0), (MODES[3], "none", 6.0),
        (MODES[1], "rows", 6.0), (MODES[1], "remainder", 6.0), (MODES[1], "sign alone", 6.0),
    ):  # fmt: skip

        def make(run: Callable[..., Any], mode: Mode = mode, kind: str = kind) -> Call:
            target, move = make_target(bench, shape, mode, False).target, make_move(bench, (m, n, rank), mode, kind)
            move = move._replace(decay=1.0, alpha=-1e-6)
            if kind.endswith("alone"):
                return lambda: run(target, None, None, move)
            left, right = bench.normal(m, rank), bench.normal(n, rank, dtype=mode.gemm)
            return lambda: run(target, left, right, move)

        twice = 2 if kind == "remainder" else 0 if kind.endswith("alone") else 1
        size = more * m * n + twice * factors
        yield Timed("project_back_", f"{shape} rank {rank} {mode.name} {kind}", size, twice * products, make)

    def project(run: Callable[..., Any]) -> Call:
        grad, basis = bench.normal(m, n, dtype=torch.bfloat16), bench.normal(n, rank, dtype=torch.bfloat16)
        return lambda: run(grad, basis)

    yield Timed("project", f"{shape} rank {rank}", 2.0 * (m * n + n * rank + m * rank), products, project)


def _passes(bench: Bench, shape: tuple[int, int]) -> Iterator[Timed]:
    count = shape[0] * shape[1]

    def means(run: Callable[..., Any]) -> Call:
        matrix = bench.normal(*shape, dtype=torch.bfloat16)
        return lambda: run(matrix)

    yield Timed("square_means", f"{shape} bfloat16", 2.0 * count, 0.0, means)

    def code(run: Callable[..., Any]) -> Call:
        values, blocks = bench.normal(*shape), empty(bench, shape, COMPANDED, signed=False)
        values.square_()
        return lambda: run(blocks, values, COMPANDED, signed=False, seed=3)

    yield Timed("quantise_", f"{shape} companded", 5.0 * count, 0.0, code)

    def decode(run: Callable[..., Any]) -> Call:
        blocks = moments(bench, shape, COMPANDED)[1]
        return lambda: run(blocks, COMPANDED, signed=False)

    yield Timed("dequantise", f"{shape} companded", 5.0 * count, 0.0, decode)
