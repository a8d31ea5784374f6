"""Triton's sketches under the interpreter against a product with the basis, and compiled for absent GPUs."""

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
from lowmem.kernels import random
from lowmem.optim.core.seeded import SeededBasis
from torch import Tensor

from tests.helpers import randn

triton_sketch = pytest.importorskip("lowmem.kernels.triton_sketch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.integers(1, 150)


def basis(rows: range, rank: int, seed: int) -> Tensor:
    out = torch.empty(len(rows), rank)
    random.basis(out, "rademacher", seed, rows.start, rows.stop)
    return out.to(DEVICE)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(sizes, sizes, sizes),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    first=st.sampled_from([0, 7, 2_000_000_000]),
    flips=st.integers(0, 3),
)
def test_sketches_are_products_with_the_basis(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, first: int, flips: int
) -> None:
    m, k, rank = shape
    matrix = randn(k, m, seed=seed % 99).to(DEVICE, dtype).T if flips & 1 else randn(m, k).to(DEVICE, dtype)
    out = torch.full((rank, m) if flips & 2 else (m, rank), torch.nan, device=DEVICE)
    out = out.T if flips & 2 else out
    triton_sketch.sketch(out, matrix, seed, first)
    expected = matrix.float() @ basis(range(first, first + k), rank, seed)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("distribution", random.BASES)
def test_images_under_seeded_bases_are_products_with_them(distribution: str, backend: str) -> None:
    basis = SeededBasis(distribution, 2**31 + 9, 70, 33)
    matrix = randn(70, 50).bfloat16().to(DEVICE).T
    expected = matrix.float() @ basis.matrix(device=DEVICE)
    torch.testing.assert_close(basis.image(matrix, torch.float32, backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 31, 32, 33, 64, 100])
def test_the_identity_gives_the_basis_bit_for_bit(rank: int) -> None:
    out = torch.full((90, rank), torch.nan, device=DEVICE)
    triton_sketch.sketch(out, torch.eye(90, device=DEVICE), 2**31 + 5, 11)
    assert torch.equal(out, basis(range(11, 101), rank, 2**31 + 5))


def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sketch, "FEW", 0)
    matrix, out = randn(140, 200).bfloat16().to(DEVICE), torch.full((140, 150), torch.nan, device=DEVICE)
    triton_sketch.sketch(out, matrix, 3)
    torch.testing.assert_close(out, matrix.float() @ basis(range(200), 150, 3), rtol=1e-5, atol=1e-4)


def test_nothing_to_do_and_what_has_no_kernel() -> None:
    triton_sketch.sketch(torch.empty(0, 3, device=DEVICE), torch.empty(0, 5, device=DEVICE), 1)
    out = torch.full((4, 3), torch.nan, device=DEVICE)
    triton_sketch.sketch(out, torch.empty(4, 0, device=DEVICE), 1)
    assert torch.equal(out, torch.zeros(4, 3, device=DEVICE))
    for given_out, matrix in (
        (torch.empty(4, 3), torch.empty(4, 5, dtype=torch.float64)),
        (torch.empty(4, 3, dtype=torch.bfloat16), torch.empty(4, 5)),
        (torch.empty(3, 3), torch.empty(4, 5)),
    ):
        with pytest.raises(ValueError, match="pass backend='torch'"):
            triton_sketch.sketch(given_out, matrix, 1)


COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowmem.kernels import triton_sketch as s

tool = next(Path(triton.__file__).parent.rglob("cuobjdump"), None)
order = s.sketch_signs.arg_names
found = {}
for capability in (80, 86, 89, 90):
    for large, dtype, precision in (
        (True, "bfloat16", "ieee"), (True, "float32", "tf32"), (False, "bfloat16", "ieee"), (False, "float32", "ieee")
    ):
        how = s.tile(8192 if large else 768, 4096 if large else 128, getattr(torch, dtype), precision)
        constants = {"ROWS": how.rows, "COLS": how.cols, "DEPTH": how.depth, "WIDEN": False, "PRECISION": precision,
                     "matrix_inner": 1, "out_col": 1}
        types = {"matrix": "*bf16" if dtype == "bfloat16" else "*fp32", "out": "*fp32", "scale": "fp32"}
        signature = {x: types.get(x) or ("constexpr" if x in constants else "i32") for x in order}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, x in enumerate(order) if signature[x][0] in "*i" and x not in ("first", "seed")
        }
        binary = triton.compile(
            ASTSource(s.sketch_signs, signature, constants, aligned), target=GPUTarget("cuda", capability, 32),
            options={"num_warps": how.warps, "num_stages": how.stages},
        )
        report = {"bytes": len(binary.asm["cubin"]), "shared": binary.metadata.shared}
        if tool:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
            report |= {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
        found[f"{how}-{dtype}-{precision}-{capability}"] = report
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
    assert len(found) == 16
    for name, report in found.items():
        assert report["bytes"] > 1000, name
        assert report.get("STACK", 0) == 0, (name, report)
        assert report.get("LOCAL", 0) == 0, (name, report)
        assert report["shared"] <= 99 * 1024, (name, report)  # what sm_86 and sm_89 have
