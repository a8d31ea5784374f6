"""Triton's means of squares under the interpreter against their specification, and compiled for absent GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import reference
from torch import Tensor

from tests.helpers import randn

statistics = pytest.importorskip("lowmem.kernels.triton_statistics")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN."""
    empty = torch.empty

    def full_of_nan(*shape: int, **options: object) -> Tensor:
        return empty(*shape, **options).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", full_of_nan)


def assert_equal_means(matrix: Tensor) -> None:
    for ours, theirs in zip(statistics.square_means(matrix), reference.square_means(matrix), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    transposed=st.booleans(),
)
def test_means_are_those_of_the_specification(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, transposed: bool
) -> None:
    matrix = randn(*shape, seed=seed, dtype=dtype).to(DEVICE)
    assert_equal_means(matrix.T if transposed else matrix)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (64, 128), (65, 257), (130, 513), (40, 4100)])
def test_tiles_do_not_show(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TILE_ON_CPU", statistics.TILE)
    matrix = randn(*shape).to(DEVICE)
    assert_equal_means(matrix)
    assert_equal_means(matrix.T)


def test_strides_and_what_lies_beside_the_matrix() -> None:
    whole = torch.full((50, 4000), torch.nan, device=DEVICE)
    parts = [whole[3:40, 5:90], whole[::7, ::9], whole[2:30, 5:9], whole.T[::100, 1:45]]
    for index, part in enumerate(parts):
        part.copy_(randn(*part.shape, seed=index))
        assert_equal_means(part)
        part.fill_(torch.nan)
    assert_equal_means(randn(1, 9).to(DEVICE).expand(8, 9))
    assert_equal_means(randn(9, 1).to(DEVICE).expand(9, 8))


@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_not_finite_and_what_is_tiny() -> None:
    matrix = randn(30, 40).to(DEVICE)
    matrix[3, 4], matrix[5, 6], matrix[7, 8] = torch.nan, -torch.inf, 3e38
    matrix[:, 11], matrix[9] = 1e-18, 0.0
    assert_equal_means(matrix)


def test_the_same_bits_in_every_run() -> None:
    matrix = randn(300, 2000).to(DEVICE)
    first = torch.cat(statistics.square_means(matrix))
    assert torch.equal(first, torch.cat(statistics.square_means(matrix)))


COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowmem.kernels import triton_statistics as s

tool = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)
tile = {"ROWS": s.TILE[0], "COLS": s.TILE[1], "matrix_col": 1}
end = {"LINES": s.LINES, "PARTS": s.PARTS}
kernels = {f"tile_sums-{dtype}": (s.tile_sums, {"matrix": f"*{dtype}"}, tile) for dtype in ("bf16", "fp16", "fp32")} | {
    "tile_sums-narrow": (s.tile_sums, {"matrix": "*bf16"}, {**tile, "n": 1}),
    "finish": (s.finish, {"divisor": "fp32"}, end),
    "finish-one": (s.finish, {"divisor": "fp32"}, {**end, "count": 1, "length": 1}),
}
sums = dict.fromkeys(("by_row", "by_col", "parts", "out"), "*fp32")
found = {}
for capability in (80, 86, 89, 90):
    for name, (kernel, types, constants) in kernels.items():
        order, types = kernel.arg_names, types | sums
        signature = {x: types.get(x) or ("constexpr" if x in constants else "i32") for x in order}
        aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(order) if signature[x][0] in "*i"}
        source = ASTSource(kernel, signature, constants, aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        report = {"bytes": len(binary.asm["cubin"])}
        if tool:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
            report |= {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
        found[f"{name}-{capability}"] = report
print(json.dumps(found))
"""


def test_the_kernels_compile_ahead_of_time_without_spills(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 24
    for name, report in found.items():
        assert report["bytes"] > 1000, name
        assert report.get("STACK", 0) == 0, (name, report)
        assert report.get("LOCAL", 0) == 0, (name, report)
        assert report.get("REG", 0) <= 128, (name, report)
