"""Triton's moments under the interpreter against their specification, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import moments, pick, reference
from lowmem.kernels.blockwise import DYNAMIC, FORMATS, Blocks, Format, borders, dequantise, dynamic_map, quantise_
from lowmem.kernels.rounding import CORRECTIONS, ROUNDINGS, Target
from lowmem.optim import AdamW8bit, Fira, Frugal, GaLore
from torch import nn

from tests.helpers import feed, randn
from tests.test_blockwise import coded, moment

triton_moments = pytest.importorskip("lowmem.kernels.triton_moments")
triton_blockwise = pytest.importorskip("lowmem.kernels.triton_blockwise")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
few = settings(max_examples=12, deadline=None)
forms = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def states(rows: int, cols: int, form: Format, seed: int) -> tuple[Blocks, Blocks]:
    pair = [(True, seed), (False, seed + 1)]
    found = (coded(moment(rows, cols, signed, start), form, signed) for signed, start in pair)
    first, second = (Blocks(*(tensor.to(DEVICE) for tensor in blocks)) for blocks in found)
    return first, second


def assert_same_codes(one: Blocks, other: Blocks, values: torch.Tensor | None = None) -> None:
    """An ulp may move a value, and in bf16 all of `values` that equal it, over the border of two codes."""
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-6, atol=0)
    moved = (one.codes.int() - other.codes.int()).abs()
    assert moved.max() <= 1
    differ = int(moved.count_nonzero()) if values is None else len(values[moved > 0].unique())
    assert differ <= 0.001 * moved.numel() + 1.5


@forms
@few
@given(rows=st.integers(1, 9), cols=st.integers(1, 600), seed=st.integers(0, 99), dtype=st.sampled_from([32, 16]))
def test_adam_is_the_specification(form: Format, rows: int, cols: int, seed: int, dtype: int) -> None:
    grad = moment(rows, cols, True, seed + 2).to(DEVICE, torch.float32 if dtype == 32 else torch.bfloat16)
    grad[0, 0] = [torch.nan, torch.inf, 1e30, 0.0][seed % 4]
    how = reference.Blockwise(form, [seed], (0.9, 0.99), 1e-8, raw_eps=seed % 2 == 0)
    results = []
    for adam in (reference.adam_blockwise, triton_moments.adam_blockwise):
        pair, out = states(rows, cols, form, seed), torch.full((rows, cols), torch.nan, device=DEVICE)
        adam([grad.float() if adam is reference.adam_blockwise else grad], tuple([b] for b in pair), [3], [out], how)
        results.append((out, *pair))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-5, atol=1e-7)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert_same_codes(one, other)


@few
@given(shape=st.tuples(st.integers(0, 40), st.integers(1, 40)), seed=st.integers(0, 99), raw=st.booleans())
def test_dense_adam_is_the_specification(shape: tuple[int, int], seed: int, raw: bool) -> None:
    results = []
    for adam in (reference.adam, triton_moments.adam):
        m, v, grad = (randn(*shape, seed=seed + i).to(DEVICE) for i in range(3))
        out = torch.full_like(grad, torch.nan)
        adam([grad], ([m], [v.square()]), [3], [out], (0.9, 0.99), 1e-8, raw_eps=raw)
        results.append((out, m))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-7)


@forms
def test_lion_is_the_specification(form: Format) -> None:
    grad, how = moment(7, 500, True, 5).to(DEVICE), reference.Blockwise(form, [0], (0.9, 0.99))
    results = []
    for lion in (reference.lion_blockwise, triton_moments.lion_blockwise):
        first, out = states(7, 500, form, 3)[0], torch.full((7, 500), torch.nan, device=DEVICE)
        lion([grad], [first], [out], how)
        results.append((out, first))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_codes(results[0][1], results[1][1])


@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_move_in_the_same_pass(mode: str, dtype: torch.dtype, transposed: bool) -> None:
    form, results = FORMATS["8bit"], []
    for adamw_ in (reference.adamw_blockwise_, moments.adamw_blockwise_, triton_moments.adamw_blockwise_):
        weight = randn(37, 300).to(DEVICE, dtype)
        weight = weight.T.contiguous().T if transposed else weight
        kept = CORRECTIONS.get(mode) if dtype == torch.bfloat16 else None
        correction = None if kept is None else torch.full((37, 300), 5, dtype=kept, device=DEVICE)
        target = Target(weight, mode, correction, seed=11, row=2, col=4)
        pair, grad = states(37, 300, form, 8), moment(37, 300, True, 9).to(DEVICE)
        adamw_(target, grad, pair, 4, 1e-2, 0.999, reference.Blockwise(form, [7], (0.9, 0.99), 1e-8))
        results.append(target.read())
    for other in results[1:]:
        step = 2**-7 if dtype == torch.bfloat16 and mode in ("nearest", "stochastic") else 2**-14
        assert ((other - results[0]).abs() <= step * results[0].abs() + 1e-6).all()
        assert (other != results[0]).float().mean() < (0.01 if step == 2**-7 else 1.0)


@pytest.mark.parametrize("signed", [True, False])
def test_the_closed_form_of_a_dynamic_code_is_the_nearest_one(signed: bool) -> None:
    """The hard values: those of the map, their borders and the next numbers to them."""
    edges = borders(signed, "cpu")[0][:-1]
    ends = [torch.nextafter(edges, torch.tensor(to)) for to in (9.0, -9.0)]
    values = torch.cat([dynamic_map(signed), edges, *ends, -torch.logspace(-9, 0, 900)])
    values = values if signed else values.abs()
    values = torch.cat([values, torch.zeros(-len(values) % 255)]).view(-1, 255)
    values = torch.cat([torch.ones(len(values), 1), values], dim=1)  # the scale of every block
    # With decay rates of zero the new moments are R and R^2, with b2 = 1 the second moment stays.
    zeros = torch.zeros_like(values)
    first, second = coded(zeros, DYNAMIC, True), coded(values if not signed else zeros, DYNAMIC, False)
    grad, betas = (values, (0.0, 0.5)) if signed else (zeros, (0.0, 1.0 - 2**-24))
    how = reference.Blockwise(DYNAMIC, [0], betas, 1.0)
    pair = Blocks(*(t.to(DEVICE) for t in first)), Blocks(*(t.to(DEVICE) for t in second))
    out = torch.empty_like(values, device=DEVICE)
    triton_moments.adam_blockwise([grad.to(DEVICE)], ([pair[0]], [pair[1]]), [1], [out], how)
    expected = coded(values, DYNAMIC, signed).codes
    assert torch.equal((pair[0] if signed else pair[1]).codes.cpu(), expected)


def inside(rows: int, cols: int, dtype: torch.dtype, transposed: bool, fill: float) -> torch.Tensor:
    """Part of a larger matrix, in either order of memory."""
    shape = (cols + 3, rows + 2) if transposed else (rows + 2, cols + 3)
    whole = torch.full(shape, fill, dtype=dtype, device=DEVICE)
    return (whole.T if transposed else whole)[1:-1, 2:-1]


@forms
@pytest.mark.parametrize("signed", [True, False])
@few
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 600), seed=st.integers(0, 2**32 - 1), transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), small=st.booleans(),
)  # fmt: skip
def test_codes_are_those_of_the_specification(
    form: Format, signed: bool, rows: int, cols: int, seed: int, transposed: bool, dtype: torch.dtype, small: bool
) -> None:
    values = inside(rows, cols, dtype, transposed, torch.nan)
    values.copy_(moment(rows, cols, signed, seed % 99) * 2.0 ** -(seed % 5))
    values[-1, -1] = [torch.nan, torch.inf, -torch.inf, 0.0][seed % 4]
    expected = coded(torch.zeros(rows, cols), form, signed)
    quantise_(expected, values.float().cpu().contiguous(), form, signed=signed, seed=seed, first=(3, 8))
    codes = inside(rows, cols, form.code_dtype(signed=signed), transposed, 77)
    found = Blocks(codes, inside(rows, form.scales(cols), torch.float32, transposed, torch.nan))
    with pytest.MonkeyPatch.context() as patch:
        if small and DEVICE == "cpu":
            patch.setattr(triton_blockwise, "ON_CPU", triton_blockwise.ON_GPU)
        triton_blockwise.quantise_(found, values, form, signed=signed, seed=seed, first=(3, 8))
        decoded = triton_blockwise.dequantise(found, form, signed=signed)
    assert_same_codes(Blocks(*(tensor.cpu() for tensor in found)), expected, values.float().cpu())
    again = Blocks(found.codes.cpu().contiguous(), found.scale.cpu().contiguous())
    torch.testing.assert_close(decoded.cpu(), dequantise(again, form, signed=signed), rtol=1e-6, atol=0.0)
    around = codes._base if codes._base is not None else codes
    assert (around.float() == 77).sum() >= around.numel() - codes.numel()


def test_empty_matrices_and_what_has_no_kernel() -> None:
    form, how = FORMATS["8bit"], reference.Blockwise(FORMATS["8bit"], [0], (0.9, 0.99))
    empty = Blocks(torch.empty(0, 5, dtype=torch.int8), torch.empty(0, form.scales(5)))
    triton_moments.lion_blockwise([torch.empty(0, 5)], [empty], [torch.empty(0, 5)], how)
    triton_blockwise.quantise_(empty, torch.empty(0, 5), form, signed=True)
    assert triton_blockwise.dequantise(empty, form, signed=True).shape == (0, 5)
    first, _ = states(2, 40, form, 0)
    with pytest.raises(ValueError, match="got fp64 gradients"):
        triton_moments.lion_blockwise([torch.zeros(2, 40, dtype=torch.float64)], [first], [torch.zeros(2, 40)], how)


BUILDS: dict[str, Any] = {
    "adamw": AdamW8bit,
    "galore": lambda p, **o: GaLore(p, rank=40, update_proj_gap=2, **o),
    "fira": lambda p, **o: Fira(p, rank=40, update_proj_gap=2, **o),
    "frugal": lambda p, **o: Frugal(p, rank=40, projector="svd", update_proj_gap=2, **o),
    "columns": lambda p, **o: Frugal(p, density=0.5, update_proj_gap=2, **o),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("state_dtype", [*FORMATS, "float32"])
def test_optimizers_follow_the_same_path_with_either(build: Any, state_dtype: str) -> None:
    finals = []
    for backend in ("torch", "triton"):
        weight = nn.Parameter(randn(120, 96).to(DEVICE))
        optimizer = build([weight], lr=1e-2, state_dtype=state_dtype, backend=backend)
        feed(optimizer, weight, [randn(120, 96, seed=s).to(DEVICE) for s in range(4)])
        finals.append(weight.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-3, atol=3e-5)


def test_triton_comes_first_where_it_compiles() -> None:
    if DEVICE == "cuda":
        assert "triton" in pick("adam_companded", torch.empty(1, 1, device="cuda")).__qualname__
    assert pick("adam_companded", torch.empty(1, 1)) is moments.adam_blockwise


COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowmem.kernels import triton_blockwise as b
from lowmem.kernels import triton_moments as m

tool = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)
pointers = {"grad": "*bf16", "first": "*i8", "first_scale": "*fp32", "second": "*u8", "second_scale": "*fp32",
            "correction": "*i16", "tables": "*fp32", "scalars": "*i32"}
numbers = ["rows", "cols", "blocks", "grad_row", "grad_col", "code_row", "out_row", "out_col",
           "correction_row", "correction_col"]
found = {}


def build(name, kernel, types, constants, capability):
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    signature = {n: types.get(n) or ("constexpr" if n in constants else "i32") for n in kernel.arg_names}
    binary = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    report = {"bytes": len(binary.asm["cubin"])}
    if tool:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        report |= {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
    found[f"{name}-{capability}"] = report


for capability in (80, 86, 89, 90):
    for name, dynamic, lion, writes, mode in (
        ("adam", 0, 0, 0, 0), ("adam-dynamic", 1, 0, 0, 0), ("lion", 0, 1, 0, 0), ("adamw", 0, 0, 1, 1),
        ("adamw-stochastic", 0, 0, 1, 2), ("adamw-compensated", 0, 0, 1, 3), ("adamw-compensated8", 0, 0, 1, 4),
    ):
        types = {"out": "*i16" if writes else "*fp32", **pointers}
        types["first"] = "*u8" if dynamic else "*i8"
        types["correction"] = {3: "*i16", 4: "*i8"}.get(mode, types["out"])
        width = 256 if dynamic else 128
        constants = {"BLOCK": width, "WIDTH": width, "LINES": m.ON_GPU // width, "DYNAMIC": bool(dynamic),
                     "LION": bool(lion), "WRITES": bool(writes), "MODE": mode,
                     "grad_col": 1, "out_col": 1, "correction_col": 1}
        build(name, m.coded_moments, types, constants, capability)
    types = dict.fromkeys(("grad", "first", "second", "out"), "*fp32") | {"scalars": "*i32"}
    build("dense-adam", m.dense_adam, types, {"BLOCK": m.ON_GPU}, capability)
    for dynamic in (0, 1) if capability in (80, 90) else ():
        width = 256 if dynamic else 128
        constants = {"BLOCK": width, "WIDTH": width, "LINES": b.ON_GPU // width, "SIGNED": False,
                     "DYNAMIC": bool(dynamic), "value_col": 1, "code_col": 1, "scale_col": 1}
        types = dict.fromkeys(("values", "scale", "edges", "table", "out"), "*fp32") | {"codes": "*u8"}
        build(f"code-{dynamic}", b.code_blocks, types, constants, capability)
        build(f"decode-{dynamic}", b.decode_blocks, types, constants, capability)
print(json.dumps(found))
"""


def test_the_kernels_compile_ahead_of_time_without_spills(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 40
    for name, report in found.items():
        assert report["bytes"] > 1000, name
        assert report.get("STACK", 0) == 0, (name, report)
        assert report.get("LOCAL", 0) == 0, (name, report)
