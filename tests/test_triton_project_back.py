"""Triton's GEMM with residuals under the interpreter against its specification, and compiled for GPUs not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import reference
from lowmem.kernels.reference import Move, Scaled, Signed
from lowmem.kernels.rounding import CORRECTIONS, ROUNDINGS, Target
from torch import Tensor

from tests.helpers import randn

back = pytest.importorskip("lowmem.kernels.triton_project_back")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = back.Tile(16, 16, 16, 4, 2)
RESIDUALS = ("none", "rows", "columns", "all", "sign", "remainder of rows", "remainder of columns")
few = settings(max_examples=30, deadline=None)
sizes = st.one_of(st.just(1), st.integers(1, 40))
ORDERS = ("rows", "columns", "neither")


def ordered(matrix: Tensor, order: str) -> Tensor:
    """The same values in another order of memory."""
    if order == "columns":
        return matrix.T.contiguous().T
    if order == "neither":
        return matrix.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    return matrix.contiguous()


def coarse(*shape: int, seed: int) -> Tensor:
    """Multiples of a quarter, whose products are exact: the order of sums does not show."""
    return (randn(*shape, seed=seed) * 4).round().clamp(-8, 8).div(4).to(DEVICE)


def residual_of(kind: str, grad: Tensor, rank: int, seed: int) -> Scaled | Signed | None:
    m, n = grad.shape
    by_row, by_col = kind.endswith("rows"), kind.endswith("columns")
    shape = (m if by_row else 1, n if by_col else 1)
    if kind in ("rows", "columns", "all"):
        factors = randn(*shape, seed=seed + 5).to(DEVICE)
        return Scaled(grad, torch.where(factors > 0.7, 0.0, factors))
    sound = torch.tensor(seed % 3 != 0, device=DEVICE)
    if kind == "sign":
        return Signed(grad, sound, -0.3)
    if kind.startswith("remainder"):
        left, right = coarse(m, rank, seed=seed + 6), coarse(n, rank, seed=seed + 7)
        return Signed(grad, sound, 0.3, left, right, randn(*shape, seed=seed + 8).abs().to(DEVICE))
    return None


def target_of(m: int, n: int, dtype: torch.dtype, mode: str, order: str, seed: int) -> Target:
    weight = ordered(randn(m, n, seed=seed).to(DEVICE, dtype), order)
    kept = CORRECTIONS.get(mode) if dtype == torch.bfloat16 else None
    words = (randn(m, n, seed=seed + 1) * 40).to(DEVICE)
    correction = None if kept is None else ordered(words.to(kept), order)
    return Target(weight, mode, correction, seed=(1 << 31) + seed, row=seed % 5, col=seed % 7)


def gradient_of(m: int, n: int, dtype: torch.dtype, order: str, seed: int) -> Tensor:
    grad = randn(m, n, seed=seed + 2)
    odd = [torch.nan, torch.inf, -torch.inf, 0.0]
    for index in range(seed % 5):  # some have none
        grad[index * 5 % m, index * 3 % n] = odd[index]
    return ordered(grad.to(DEVICE, dtype), order)


def assert_moved_alike(ours: Target, theirs: Target) -> None:
    """Equal, but for the last bit of fp32, which may decide a rounding."""
    one, other = ours.read(), theirs.read()
    coarsely = ours.mode in ("nearest", "stochastic") and ours.weight.dtype != torch.float32
    step = (2**-7 if ours.weight.dtype == torch.bfloat16 else 2**-10) if coarsely else 2**-14
    torch.testing.assert_close(one, other, rtol=step, atol=4e-6, equal_nan=True)
    if coarsely:
        flipped = (one != other) & ~(one.isnan() & other.isnan())
        assert flipped.sum() <= 1 + 0.01 * one.numel()


def move_both(ours: Target, theirs: Target, left: Tensor | None, right: Tensor | None, move: Move, tiny: bool) -> None:
    """Move one by Triton and one by the specification, with products in fp32 of the same operands."""
    with patch.object(back, "tile", (lambda *_: TINY) if tiny else back.tile):
        back.project_back_(ours, left, right, move)
    narrow = [None if x is None else x.to(move.gemm).float() for x in (left, right)]
    reference.project_back_(theirs, *narrow, move._replace(gemm=torch.float32))


@pytest.mark.parametrize("kind", RESIDUALS)
@few
@given(
    sizes, sizes, st.sampled_from([0, 1, 16, 20, 64]), st.integers(0, 999),
    st.sampled_from([*product([torch.bfloat16], ROUNDINGS), (torch.float32, "nearest"), (torch.float16, "nearest")]),
    st.sampled_from(list(product(ORDERS, ORDERS, ORDERS))), st.booleans(), st.booleans(),
)  # fmt: skip
def test_weights_move_as_specified(
    kind: str, m: int, n: int, rank: int, seed: int, form: tuple[torch.dtype, str], orders: Any, wide: bool, only: bool
) -> None:
    dtype, mode = form
    grad = gradient_of(m, n, torch.float32 if wide else dtype, orders[1], seed)
    gemm = torch.float32 if wide else dtype
    move = Move(0.99, -0.1, gemm, residual_of(kind, grad, rank, seed))
    factors = (None, None) if only else (coarse(m, rank, seed=seed + 3), coarse(n, rank, seed=seed + 4))
    left, right = (None if x is None else ordered(x, orders[2]) for x in factors)
    ours, theirs = (target_of(m, n, dtype, mode, orders[0], seed) for _ in range(2))
    move_both(ours, theirs, left, right, move, tiny=seed % 2 == 0 and DEVICE == "cpu")
    assert_moved_alike(ours, theirs)


@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize("kind", RESIDUALS)
def test_every_mode_with_every_residual(mode: str, kind: str) -> None:
    m, n, rank = (77, 45, 20) if DEVICE == "cpu" else (1541, 2080, 192)
    for order in ORDERS[:2]:
        grad = gradient_of(m, n, torch.bfloat16, order, seed=4)
        move = Move(0.99, -0.1, torch.bfloat16, residual_of(kind, grad, rank, seed=4))
        left, right = randn(m, rank, seed=6).to(DEVICE), randn(n, rank, seed=7).to(DEVICE)
        ours, theirs = (target_of(m, n, torch.bfloat16, mode, order, seed=4) for _ in range(2))
        move_both(ours, theirs, left, right, move, tiny=False)
        assert_moved_alike(ours, theirs)


def test_every_tile_is_moved_once() -> None:
    """More tiles than a group of programs has, and groups that are not whole."""
    for shape in ((16 * 19 + 3, 50), (50, 16 * 19 + 3)):
        ours, theirs = (target_of(*shape, torch.float32, "nearest", "rows", seed=1) for _ in range(2))
        left, right = coarse(shape[0], 16, seed=2), coarse(shape[1], 16, seed=3)
        move_both(ours, theirs, left, right, Move(0.5, 1.0, torch.float32), tiny=DEVICE == "cpu")
        assert_moved_alike(ours, theirs)


@pytest.mark.parametrize("mode", ["stochastic", "compensated8"])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_random_bits_are_those_of_the_place_in_the_whole_weight(mode: str, order: str) -> None:
    left, right, move = coarse(30, 16, seed=1), coarse(41, 16, seed=2), Move(1.0, 0.01, torch.bfloat16)
    whole, parts = (target_of(30, 41, torch.bfloat16, mode, order, seed=3) for _ in range(2))
    back.project_back_(whole, left, right, move)
    for rows, cols in product((slice(0, 7), slice(7, 30)), (slice(0, 13), slice(13, 41))):
        back.project_back_(parts.part(rows, cols), left[rows], right[cols], move)
    assert torch.equal(parts.weight, whole.weight)


def test_numbers_may_be_tensors_on_the_device() -> None:
    left, right = coarse(9, 4, seed=1), coarse(11, 4, seed=2)
    results = []
    for decay, alpha in ((0.75, -0.125), (torch.tensor(0.75, device=DEVICE), torch.tensor(-0.125, device=DEVICE))):
        target = target_of(9, 11, torch.bfloat16, "stochastic", "rows", seed=3)
        back.project_back_(target, left, right, Move(decay, alpha, torch.bfloat16))
        results.append(target.weight)
    assert torch.equal(*results)


def test_nothing_to_move_and_what_has_no_kernel() -> None:
    move = Move(0.9, -0.1, torch.float32)
    for shape in ((0, 5), (5, 0)):
        back.project_back_(Target(torch.empty(shape)), torch.empty(shape[0], 2), torch.empty(shape[1], 2), move)
    weight, wide = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    for target, how in (
        (Target(wide), move),
        (Target(weight), move._replace(gemm=torch.float64)),
        (Target(weight), move._replace(residual=Scaled(wide, torch.ones(3, 1)))),
    ):
        with pytest.raises(ValueError, match="got fp64: Triton kernels compute in fp32, pass backend='torch'"):
            back.project_back_(target, None, None, how)
    with pytest.raises(ValueError, match="a selection"):
        back.project_back_(Target(weight).select(torch.tensor([0]), 0), None, None, move)


def test_fp32_is_multiplied_in_tf32_where_torch_may() -> None:
    seen, before = [], torch.get_float32_matmul_precision()
    with patch.object(back, "tile", lambda *how: seen.append(how) or back.Tile(64, 64, 32, 4, 3)):
        try:
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                target, ones = Target(torch.zeros(4, 4, device=DEVICE)), torch.ones(4, 2, device=DEVICE)
                back.project_back_(target, ones, ones, Move(1.0, 1.0, torch.float32))
                assert (target.weight == 2).all()
        finally:
            torch.set_float32_matmul_precision(before)
    assert [how[2] for how in seen] == ["ieee", "tf32"]


COMPILE = """
import json, os, re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowmem.kernels import triton_project_back as back

EVERY = sys.argv[1] == "every"
CAPABILITIES = (80, 86, 89, 90)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KINDS = {"none": 0, "scaled": 1, "sign": 2, "remainder": 3}
MODES = {"exact": 0, "nearest": 1, "stochastic": 2, "compensated": 3, "compensated8": 4, "half": 5}
ROWS, COLS = ({x + end for x in ("weight", "correction", "grad")} for end in ("_row", "_col"))
tool = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)


def compiled(job):
    name, types, constants, odd, (warps, stages), capability = job
    kernel, order = back.move_weight, back.move_weight.arg_names
    signature = {x: types.get(x) or ("constexpr" if x in constants else "i32") for x in order}
    attributes = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(order)
                  if signature[x] != "constexpr" and x not in odd}
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    report = {"bytes": len(binary.asm["cubin"]), "shared": binary.metadata.shared, "capability": capability}
    if tool:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"]); file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        report |= {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
    return f"{name} sm_{capability}", report


def move(kind, mode, gemm=torch.bfloat16, precision="ieee", large=True, columns=False):
    dtype = {"exact": torch.float32, "half": torch.float16}.get(mode, torch.bfloat16)
    how = back.tile(large, gemm, precision, kind == "remainder")
    types = {"bound": "*fp32", "sound": "*u8", "scalars": "*i32", "grad": POINTERS[dtype]}
    types["weight"] = "*i16" if dtype == torch.bfloat16 else POINTERS[dtype]
    types["correction"] = {"compensated": "*i16", "compensated8": "*i8"}.get(mode, types["weight"])
    types |= {x: POINTERS[gemm or dtype] for x in ("left", "right", "other_left", "other_right")}
    constants = {"ROWS": how.rows, "COLS": how.cols, "DEPTH": how.depth, "PRODUCT": gemm is not None,
                 "KIND": KINDS[kind], "BY_COL": columns, "FLIPPED": columns, "WIDEN": False,
                 "PRECISION": precision, "MODE": MODES[mode], **dict.fromkeys(COLS, 1)}
    odd = {"sound", "scalars", "m", "n", "bound_step"} | (set() if large else ROWS)
    size = "large" if large else "odd"
    name = f"{kind} {mode} {str(gemm)[6:] or '-'} {precision} {size} {'columns' if columns else 'rows'} {tuple(how)}"
    return name, types, constants, odd, (how.warps, how.stages)


bf16 = ("nearest", "stochastic", "compensated", "compensated8")
square = [[move(kind, mode, columns=k % 2 == 1) for mode in bf16] for k, kind in enumerate(KINDS)]
beside = [
    [move("none", "half", torch.float16), move("scaled", "compensated", None)],
    [move("scaled", "exact", torch.float32, "tf32"), move("sign", "compensated8", None)],
    [move("remainder", "exact", torch.float32, "tf32"), move("remainder", "compensated8", large=False, columns=True)],
    [move("remainder", "exact", torch.float32), move("none", "exact", None)],
]
if EVERY:
    products = [(mode, torch.bfloat16, "ieee") for mode in bf16] + [("half", torch.float16, "ieee")]
    products += [("exact", torch.float32, p) for p in ("ieee", "tf32")] + [("exact", torch.bfloat16, "ieee")]
    products += [(mode, None, "ieee") for mode in MODES]
    jobs = [move(kind, *product, large, columns=not large) for kind in KINDS for product in products
            for large in (True, False) if not (kind == "remainder" and not product[1])]
    jobs = [(*job, capability) for capability in CAPABILITIES for job in jobs]
else:  # every kind in every mode, each on one GPU
    jobs = [(*job, CAPABILITIES[(k + i) % 4]) for k, row in enumerate(square) for i, job in enumerate(row)]
    jobs += [(*job, CAPABILITIES[k]) for k, row in enumerate(beside) for job in row]
with ThreadPoolExecutor(os.cpu_count()) as pool:
    print(json.dumps(dict(pool.map(compiled, jobs))))
"""
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that a program can have."""


def test_the_kernels_compile_ahead_of_time_without_spills(tmp_path: Path) -> None:
    """Set `LOWMEM_COMPILE=every` to compile every variant for every GPU, which takes minutes."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    which = os.environ.get("LOWMEM_COMPILE", "some")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, which], env=environment, capture_output=True, text=True, timeout=3000,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 24
    for name, report in found.items():
        assert report["bytes"] > 1000, name
        assert report["shared"] <= SHARED[report["capability"]], (name, report)
        assert report.get("STACK", 0) == 0, (name, report)
        assert report.get("LOCAL", 0) == 0, (name, report)
