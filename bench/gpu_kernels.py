"""Every Triton kernel against its specification, on shapes of real models and on odd ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import random, reference
from ..kernels.blockwise import COMPANDED, DYNAMIC, Blocks, Format, dequantise, quantise_
from ..kernels.reference import Blockwise
from .gpu_compare import Found, codes, equal, relative, written
from .gpu_device import Bench
from .gpu_weights import MODES, Mode, make_target, project_back_cases, transposed

KERNELS = {
    "adam": "triton_moments",
    "adam_blockwise": "triton_moments",
    "adamw_blockwise_": "triton_moments",
    "lion_blockwise": "triton_moments",
    "project_back_": "triton_project_back",
    "square_means": "triton_statistics",
    "quantise_": "triton_blockwise",
    "dequantise": "triton_blockwise",
    "basis": "triton_random",
    "sketch": "triton_sketch",
}
"""Module of every kernel; the specification has the same name and arguments."""

LOW = ((4096, 1024), (11008, 1024), (5461, 512), (4096, 100), (33, 257), (1, 4096), (7, 3))
WHOLE = ((4096, 4096), (2048, 5461), (5461, 2048), (129, 257))
TINY_LOW, TINY_WHOLE = ((40, 136), (33, 257), (7, 3)), ((24, 160), (33, 57))


class Case(NamedTuple):
    """A kernel on one input: what it is called with, and the errors of the result."""

    op: str
    name: str
    check: Callable[[Callable[..., Any]], list[Found]]


def find(op: str) -> Callable[..., Any] | None:
    """A kernel, imported when it is asked for; None where this version has none."""
    if op not in KERNELS:
        return None
    try:
        module = importlib.import_module(f"..kernels.{KERNELS[op]}", __package__)
    except ModuleNotFoundError as error:
        if error.name is not None and KERNELS[op] not in error.name:
            raise
        return None
    found: Callable[..., Any] | None = getattr(module, op, None)
    return found


def cases(bench: Bench) -> Iterator[Case]:
    """All checks, those that compile the most kernels last."""
    low, whole = (TINY_LOW, TINY_WHOLE) if bench.interpreted else (LOW, WHOLE)
    for shape in low:
        for raw in (False, True):
            yield Case("adam", f"{shape} raw_eps={raw}", partial(_adam, bench, shape, raw))
    for form in (COMPANDED, DYNAMIC):
        for shape in low:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{shape} {form.name} {str(dtype).removeprefix('torch.')}"
                yield Case("adam_blockwise", name, partial(_adam_blockwise, bench, shape, form, dtype))
            yield Case("lion_blockwise", f"{shape} {form.name}", partial(_lion_blockwise, bench, shape, form))
            for signed in (True, False):
                name = f"{shape} {form.name} signed={signed}"
                yield Case("quantise_", name, partial(_quantise, bench, shape, form, signed))
                yield Case("dequantise", name, partial(_dequantise, bench, shape, form, signed))
    for shape in whole:
        for mode in MODES:
            for turned in (False, True):
                name = f"{shape} {mode.name}{' transposed' * turned}"
                yield Case("adamw_blockwise_", name, partial(_adamw, bench, shape, mode, turned))
    for shape in (*whole, *low):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"{shape} {str(dtype).removeprefix('torch.')}"
            yield Case("square_means", name, partial(_square_means, bench, shape, dtype))
    for kind in random.BASES:
        for rows, rank in low:
            yield Case("basis", f"{(rows, rank)} {kind}", partial(_basis, bench, rows, rank, kind))
    for shape in low:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case("sketch", f"{shape} {str(dtype).removeprefix('torch.')}", partial(_sketch, bench, shape, dtype))
    yield from (Case("project_back_", name, check) for name, check in project_back_cases(bench))


def moments(bench: Bench, shape: tuple[int, int], form: Format) -> tuple[Blocks, Blocks]:
    """Coded moments of ordinary sizes, by the specification."""
    found = []
    for signed in (True, False):
        values = bench.normal(*shape) * torch.logspace(-3, 1, shape[1], device=bench.device)
        blocks = empty(bench, shape, form, signed=signed)
        quantise_(blocks, values if signed else values.square(), form, signed=signed, seed=5)
        found.append(blocks)
    return found[0], found[1]


def empty(bench: Bench, shape: tuple[int, int], form: Format, *, signed: bool) -> Blocks:
    """Codes and scales full of rubbish."""
    codes = torch.full(shape, 77, dtype=form.code_dtype(signed=signed), device=bench.device)
    return Blocks(codes, torch.full((shape[0], form.scales(shape[1])), torch.nan, device=bench.device))


def copied(blocks: Blocks) -> Blocks:
    """Codes and scales of their own."""
    return Blocks(*(tensor.clone() for tensor in blocks))


def _poisoned(bench: Bench, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, device=bench.device)


def _spoil(grad: Tensor) -> Tensor:
    """A gradient with entries that are not finite, or whose squares are not."""
    flat = grad.view(-1)
    for place, value in enumerate((torch.nan, torch.inf, -torch.inf, 1e30, 0.0)):
        flat[place * (flat.numel() - 1) // 4] = value
    return grad


def _adam(bench: Bench, shape: tuple[int, int], raw: bool, kernel: Callable[..., Any]) -> list[Found]:
    grad, first, second = (bench.normal(*shape) for _ in range(3))
    found = []
    results: list[tuple[Tensor, ...]] = []
    for adam in (kernel, reference.adam):
        m, v, out = first.clone(), second.square(), _poisoned(bench, *shape)
        adam([grad], ([m], [v]), [3], [out], (0.9, 0.999), 1e-8, raw_eps=raw)
        results.append((out, m, v))
    names = ("direction", "first moment", "second moment")
    for name, one, other in zip(names, *results, strict=True):
        found.append(relative(name, one, other, 1e-5))
    return found


def _adam_blockwise(
    bench: Bench, shape: tuple[int, int], form: Format, dtype: torch.dtype, kernel: Callable[..., Any]
) -> list[Found]:
    grad, state = _spoil(bench.normal(*shape)).to(dtype), moments(bench, shape, form)
    how = Blockwise(form, [2**31 + 7], (0.9, 0.999), 1e-8)
    results: list[tuple[Tensor, Blocks, Blocks]] = []
    for adam, seen in ((kernel, grad), (reference.adam_blockwise, grad.float())):
        first, second, out = copied(state[0]), copied(state[1]), _poisoned(bench, *shape)
        adam([seen], ([first], [second]), [3], [out], how)
        results.append((out, first, second))
    (out, first, second), (out_, first_, second_) = results
    return [relative("direction", out, out_, 1e-5), *codes("first", first, first_), *codes("second", second, second_)]


def _lion_blockwise(bench: Bench, shape: tuple[int, int], form: Format, kernel: Callable[..., Any]) -> list[Found]:
    grad, state = bench.normal(*shape), moments(bench, shape, form)[0]
    how, results = Blockwise(form, [0], (0.9, 0.99)), []
    for lion in (kernel, reference.lion_blockwise):
        moment, out = copied(state), _poisoned(bench, *shape)
        lion([grad], [moment], [out], how)
        results.append((out, moment))
    (out, moment), (out_, moment_) = results
    wrong = float((out != out_).double().mean())
    return [Found("direction", wrong, 1e-4 + 1.0 / out.numel()), *codes("first", moment, moment_)]


def _adamw(bench: Bench, shape: tuple[int, int], mode: Mode, turned: bool, kernel: Callable[..., Any]) -> list[Found]:
    form = DYNAMIC if mode.rounding == "compensated8" else COMPANDED
    grad, state = bench.normal(*shape, dtype=mode.dtype), moments(bench, shape, form)
    grad = transposed(grad) if turned else grad
    start = make_target(bench, shape, mode, turned)
    how, results = Blockwise(form, [9], (0.9, 0.999), 1e-8), []
    for adamw_ in (kernel, reference.adamw_blockwise_):
        target, pair = start.copy(), (copied(state[0]), copied(state[1]))
        adamw_(target, grad, pair, 4, 1e-2, 0.999, how)
        results.append((target, *pair))
    (target, first, second), (target_, first_, second_) = results
    before = start.copy().read()
    return [written(target, target_, before), *codes("first", first, first_), *codes("second", second, second_)]


def _square_means(bench: Bench, shape: tuple[int, int], dtype: torch.dtype, kernel: Callable[..., Any]) -> list[Found]:
    matrix = bench.normal(*shape, dtype=dtype)
    found = []
    for name, seen in (("", matrix), ("transposed ", transposed(matrix))):
        exact = matrix.double().square()
        rows, cols = kernel(seen)
        found += [
            relative(f"{name}rows", rows, exact.mean(1), 1e-5),
            relative(f"{name}cols", cols, exact.mean(0), 1e-5),
        ]
    return found


def _quantise(
    bench: Bench, shape: tuple[int, int], form: Format, signed: bool, kernel: Callable[..., Any]
) -> list[Found]:
    values = bench.normal(*shape) * torch.logspace(-3, 1, shape[1], device=bench.device)
    values = values if signed else values.square()
    values.view(-1)[0] = torch.inf
    results = []
    for quantise in (kernel, quantise_):
        blocks = empty(bench, shape, form, signed=signed)
        quantise(blocks, values.clone(), form, signed=signed, seed=2**31 + 3, first=(5, 2 * form.block))
        results.append(blocks)
    return codes("", *results)


def _dequantise(
    bench: Bench, shape: tuple[int, int], form: Format, signed: bool, kernel: Callable[..., Any]
) -> list[Found]:
    blocks = moments(bench, shape, form)[0 if signed else 1]
    ours, theirs = kernel(blocks, form, signed=signed), dequantise(blocks, form, signed=signed)
    return [relative("values", ours, theirs, 1e-6)]


def _basis(bench: Bench, rows: int, rank: int, kind: str, kernel: Callable[..., Any]) -> list[Found]:
    rank = min(rows, rank)
    results = []
    for make in (kernel, random.basis):
        out = _poisoned(bench, max(1, rows // 2), rank)
        make(out, kind, 2**31 + 11, rows // 3, rows)
        results.append(out)
    return [equal("bits", *results)]


def _sketch(bench: Bench, shape: tuple[int, int], dtype: torch.dtype, kernel: Callable[..., Any]) -> list[Found]:
    inner, rank = shape
    matrix = bench.normal(max(1, rank // 2), inner, dtype=dtype)
    results = list[Tensor]()
    for sketch, working in ((kernel, torch.float32), (reference.sketch, torch.float64)):
        out = torch.full((len(matrix), rank), torch.nan, dtype=working, device=bench.device)
        sketch(out, matrix, 2**31 + 11, 5)
        results.append(out)
    return [relative("sums", results[0], results[1], 1e-5)]
