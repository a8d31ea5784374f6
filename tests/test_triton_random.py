"""The Triton generator makes the numbers of the torch one, bit for bit, and compiles for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowmem.kernels import dispatch, pick, random
from lowmem.optim import Flora, SubspaceAccumulator
from lowmem.optim.core.seeded import SeededBasis
from torch.nn import Parameter

from tests.helpers import randn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_kind = pytest.mark.parametrize("kind", random.BASES)


@every_kind
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize(
    ("size", "rank", "first", "last"),
    [(50, 7, 0, 50), (50, 33, 13, 40), (300, 64, 0, 300), (8, 8, 0, 8), (1, 1, 0, 1), (9, 1, 3, 4), (5, 3, 2, 2)],
)
def test_all_bits_are_equal(kind: str, seed: int, size: int, rank: int, first: int, last: int) -> None:
    ours, theirs = (torch.full((last - first, rank), 9.0, device=DEVICE) for _ in range(2))
    pick("basis", ours, "triton")(ours, kind, seed, first, size)
    random.basis(theirs, kind, seed, first, size)
    assert torch.equal(ours, theirs)
    on_cpu = torch.empty(last - first, rank)
    random.basis(on_cpu, kind, seed, first, size)
    assert torch.equal(ours.cpu(), on_cpu)


@every_kind
def test_rows_far_away_and_outputs_with_strides(kind: str) -> None:
    size, first = 1_500_000_000 if kind != "orthonormal" else 200_000, 150_000
    first = size - 10 if kind != "orthonormal" else first
    ours, theirs = torch.empty(6, 4, device=DEVICE).T, torch.empty(4, 6, device=DEVICE)
    pick("basis", ours, "triton")(ours, kind, 77, first, size)
    random.basis(theirs, kind, 77, first, size)
    assert torch.equal(ours, theirs)


@every_kind
def test_blocks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem.kernels import triton_random

    whole = SeededBasis(kind, 5, 40, 9).matrix(device=DEVICE, backend="triton")
    monkeypatch.setattr(triton_random, "ON_CPU", 64)
    monkeypatch.setattr(triton_random, "ON_GPU", 64)
    assert torch.equal(SeededBasis(kind, 5, 40, 9).matrix(device=DEVICE, backend="triton"), whole)


def test_the_choice_of_a_backend() -> None:
    cpu = torch.empty(1)
    assert pick("basis", cpu) is random.basis
    assert pick("basis", cpu, "torch") is random.basis
    if DEVICE == "cuda":
        assert pick("basis", torch.empty(1, device="cuda")) is not random.basis


def test_a_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = SubspaceAccumulator(torch.optim.SGD([param := Parameter(randn(24, 16))]), rank=4, backend="triton")
    param.grad = randn(24, 16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"has no 'sketch' for torch\.float32 on cpu; pass backend='auto'"):
        accumulator.accumulate()
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"Triton is not installed, pip install 'lowmem\[triton\]'"):
        accumulator.accumulate()


@every_kind
def test_optimizers_follow_the_same_path_with_either(kind: str) -> None:
    finals = []
    for backend in ("torch", "triton"):
        param = Parameter(randn(24, 16).to(DEVICE))
        optimizer = Flora([param], lr=1e-2, rank=4, update_proj_gap=9, distribution=kind, backend=backend)
        accumulator = SubspaceAccumulator(optimizer, rank=5, distribution=kind, backend=backend)
        for step in range(11):
            param.grad = randn(24, 16, seed=step).to(DEVICE)
            accumulator.accumulate()
            accumulator.step()
        finals.append(param.detach())
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-6)  # statistics are summed in another order


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowmem.kernels import triton_random

common = {"count": "i32", "cols": "i32", "first": "i32", "seed": "i32"}
kernels = {
    "rademacher": {"out": "*fp32", **common, "scale": "fp32"},
    "gaussian": {"out": "*fp32", "table": "*fp32", **common, "scale": "fp32"},
    "orthonormal": {"out": "*fp32", "table": "*fp32", "chosen": "*i64", **common, "size": "i32"},
}
sizes = {}
for name, signature in kernels.items():
    for capability in (80, 90):
        source = ASTSource(
            getattr(triton_random, name), {**signature, "BLOCK": "constexpr"}, {"BLOCK": triton_random.ON_GPU}
        )
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        sizes[f"{name}-{capability}"] = len(binary.asm["cubin"])
print(json.dumps(sizes))
"""


def test_the_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout)
    assert len(sizes) == 6
    assert min(sizes.values()) > 1000
