"""Kernels, random numbers, linear algebra and rounding against plain specifications."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import dispatch, moments, pick, random, reference
from lowmem.optim.core import codec, factored, linalg
from lowmem.optim.core.view import SIDES, MatrixView
from torch import Tensor

from tests.reference.subspace import best_rank_energy, captured_energy, orthonormality_error

ROOT = Path(__file__).parent.parent
few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def falling(m: int, n: int, seed: int = 0) -> Tensor:
    left, _, right = torch.linalg.svd(randn(m, n, seed=seed), full_matrices=False)
    return left * torch.arange(1, min(m, n) + 1) ** -1.0 @ right


def largest(matrix: Tensor) -> Tensor:
    return matrix.abs().max()


# -------------------------------------------------------------------------------------------------- kernels


def adam_inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    first = [randn(*shape, seed=i + 10, dtype=dtype) for i, shape in enumerate(shapes)]
    second = [randn(*shape, seed=i + 20, dtype=dtype).square() for i, shape in enumerate(shapes)]
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)], first, second


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("raw_eps", [False, True])
@few
@given(
    shapes=st.lists(st.one_of(st.just(()), st.tuples(sizes), st.tuples(sizes, sizes)), max_size=4),
    counts=st.lists(st.integers(1, 2000), min_size=4, max_size=4),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.9, 0.999])),
    eps=st.sampled_from([1e-8, 1e-3]),
)
def test_fused_adam_follows_its_specification(
    dtype: torch.dtype,
    tolerance: float,
    raw_eps: bool,
    shapes: list[tuple[int, ...]],
    counts: list[int],
    betas: tuple[float, float],
    eps: float,
) -> None:
    results = []
    for adam in (moments.adam, reference.adam):
        grads, first, second = adam_inputs(shapes, dtype)
        out = [torch.full_like(grad, math.nan) for grad in grads]
        adam(grads, (first, second), counts[: len(shapes)], out, betas, eps, raw_eps=raw_eps)
        results.append([*first, *second, *out])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_fused_adam_without_bias_correction() -> None:
    grads, first, second = adam_inputs([(5, 3)], torch.float64)
    expected_first = 0.9 * first[0] + 0.1 * grads[0]
    expected_second = 0.999 * second[0] + 0.001 * grads[0].square()
    out = [torch.empty(5, 3, dtype=torch.float64)]
    moments.adam(grads, (first, second), [reference.NO_CORRECTION], out, (0.9, 0.999), 1e-8)
    torch.testing.assert_close(out[0], expected_first / (expected_second.sqrt() + 1e-8))


@pytest.mark.parametrize("adam", [moments.adam, reference.adam])
def test_a_nan_stays_in_its_element(adam) -> None:
    grads, first, second = adam_inputs([(5, 3), (4,)], torch.float32)
    grads[0][2, 1] = math.nan
    out = [torch.empty_like(grad) for grad in grads]
    adam(grads, (first, second), [3, 3], out, (0.9, 0.999), 1e-8)
    assert out[0].isnan().sum() == 1
    assert out[0][2, 1].isnan()
    assert out[1].isfinite().all()


def test_adam_is_that_of_torch() -> None:
    param = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    adam = torch.optim.Adam([param], lr=1.0)
    first, second = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
    total, out = torch.zeros(6, 4, dtype=torch.float64), torch.empty(6, 4, dtype=torch.float64)
    for t in range(1, 6):
        param.grad = randn(6, 4, seed=t)
        adam.step()
        reference.adam([param.grad], ([first], [second]), [t], [out], (0.9, 0.999), 1e-8)
        total -= out
        torch.testing.assert_close(param.detach(), total, rtol=0, atol=1e-12)


def test_lion_and_momentum_follow_their_papers() -> None:
    moment, grad, out = randn(5, 3), randn(5, 3, seed=1), torch.empty(5, 3, dtype=torch.float64)
    lion = moment.clone()
    reference.lion(grad, lion, out, (0.9, 0.99))
    torch.testing.assert_close(out, torch.sign(0.9 * moment + 0.1 * grad))
    torch.testing.assert_close(lion, 0.99 * moment + 0.01 * grad)
    ball = moment.clone()
    reference.momentum(grad, ball, out, 0.9)
    torch.testing.assert_close(out, 0.9 * moment + grad)
    assert torch.equal(out, ball)
    assert out.data_ptr() != ball.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_pick_returns_a_working_adam(backend: str) -> None:
    grads, first, second = adam_inputs([(5, 3)], torch.float32)
    out = [torch.full((5, 3), math.nan)]
    pick("adam", grads[0], backend)(grads, (first, second), [1], out, (0.9, 0.999), 1e-8)
    assert out[0].isfinite().all()


def test_pick_names_the_backends_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"'nonsense' has no 'adam' for torch.float32 on cpu.*torch"):
        pick("adam", torch.zeros(1), "nonsense")


def test_every_operation_has_one_in_torch_that_runs_everywhere() -> None:
    for implementations in dispatch.IMPLEMENTATIONS.values():
        torch_ones = [candidate for candidate in implementations if candidate.name == "torch"]
        assert torch_ones[-1].runs_on(torch.zeros(1, dtype=torch.complex64))


# --------------------------------------------------------------------------------------------------- random


@few
@given(seed=seeds, rows=sizes, cols=sizes, data=st.data())
def test_random_numbers_are_a_function_of_seed_row_and_column(
    seed: int, rows: int, cols: int, data: st.DataObject
) -> None:
    whole = random.normal(seed, rows, cols)
    part = random.normal(seed, data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols)))
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()
    assert torch.equal(whole[: part.shape[0], : part.shape[1]], part)


def test_random_numbers_are_standard_normal_and_uncorrelated() -> None:
    sample = random.normal(7, 20000, 16).double()
    count = sample.numel()
    assert abs(sample.mean()) <= 4 / count**0.5
    assert abs(sample.var() - 1) <= 4 * (2 / count) ** 0.5
    assert abs((sample**4).mean() - 3) <= 4 * (96 / count) ** 0.5
    for matrix in (sample.T, sample[:16384].reshape(16, -1)):  # between columns, and between blocks of rows
        correlation = torch.corrcoef(matrix) - torch.eye(16)
        assert correlation.abs().max() <= 5 / matrix.shape[1] ** 0.5


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1)])
def test_neighbouring_cells_are_uncorrelated(shift: tuple[int, int]) -> None:
    sample = random.normal(11, 600, 600).double()
    moved = sample[shift[0] :, shift[1] :]
    still = sample[: moved.shape[0], : moved.shape[1]]
    assert abs((still * moved).mean()) <= 4 / still.numel() ** 0.5


@few
@given(seed=st.integers(0, 2**32 - 2))
def test_neighbouring_seeds_are_uncorrelated(seed: int) -> None:
    one, other = random.normal(seed, 100, 100).double(), random.normal(seed + 1, 100, 100).double()
    assert abs((one * other).mean()) <= 5 / 100


def test_bits_are_balanced() -> None:
    words = random.bits(3, range(300), 300)
    assert words.min() >= 0
    assert words.max() < 2**32
    for bit in range(32):
        assert abs((words >> bit & 1).double().mean() - 0.5) <= 5 * 0.5 / 300


def test_mixed_seeds_do_not_collide_and_depend_on_order() -> None:
    values = {random.mix(0, position, step) for position in range(200) for step in range(200)}
    assert len(values) >= 40000 - 2
    assert all(0 <= value < 2**32 for value in values)
    assert random.mix(1, 2) != random.mix(2, 1)
    assert random.mix(-1) == random.mix(0xFFFFFFFF)


# ------------------------------------------------------------------------------------------------ linear algebra


@few
@given(b=sizes, seed=seeds, data=st.data())
def test_columns_become_orthonormal_whatever_their_rank(b: int, seed: int, data: st.DataObject) -> None:
    count, rank = data.draw(st.integers(1, b)), data.draw(st.integers(0, b))
    columns = randn(b, rank, seed=seed % 1000) @ randn(rank, count, seed=1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        basis = linalg.orthonormal(columns.to(dtype))
        assert basis.shape == (b, count)
        assert basis.isfinite().all()
        assert orthonormality_error(basis) <= tolerance


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@few
@given(a=sizes, b=sizes, seed=st.integers(0, 99), data=st.data())
def test_the_exact_basis_is_that_of_an_svd(scale: float, a: int, b: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(a, b)))
    matrix = falling(a, b, seed) * scale
    basis = linalg.exact_basis(matrix, rank, largest(matrix))
    assert orthonormality_error(basis) <= 1e-10
    best = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank].T
    torch.testing.assert_close((basis.T @ best).abs(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("kind", ["rank-1", "repeated"])
def test_the_exact_basis_of_a_degenerate_matrix(shape: tuple[int, int], kind: str) -> None:
    left, _, right = torch.linalg.svd(randn(*shape), full_matrices=False)
    matrix = left[:, :1] @ right[:1] if kind == "rank-1" else left @ right
    basis = linalg.exact_basis(matrix, 4, largest(matrix))
    assert orthonormality_error(basis) <= 1e-10
    assert captured_energy(matrix, basis) == pytest.approx(best_rank_energy(matrix, 4))


def test_eigenvectors_come_largest_first() -> None:
    turn = linalg.orthonormal(randn(7, 7))
    values = torch.tensor([3.0, 9.0, 0.0, 1.0, 27.0, 0.1, 5.0], dtype=torch.float64)
    vectors = linalg.eigenvectors(turn * values @ turn.T)
    expected = turn[:, values.argsort(descending=True)]
    torch.testing.assert_close((vectors.T @ expected).abs(), torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-10)


def test_eigenvectors_survive_a_failed_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = linalg.orthonormal(randn(5, 5))
    gram = turn * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64) @ turn.T

    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    vectors = linalg.eigenvectors(gram)
    torch.testing.assert_close((vectors.T @ turn).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)


@few
@given(a=st.integers(2, 40), b=st.integers(2, 40), seed=st.integers(0, 99), data=st.data())
def test_the_range_finder_recovers_a_low_rank_row_space(a: int, b: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(a, b)))
    matrix = randn(a, rank, seed=seed) @ randn(rank, b, seed=seed + 1)
    (found,), (image,) = linalg.range_finder([matrix], [randn(b, rank, seed=seed + 2)], 2, [largest(matrix)])
    assert orthonormality_error(found) <= 1e-10
    torch.testing.assert_close(image * largest(matrix), matrix @ found)
    assert captured_energy(matrix, found) >= linalg.ENOUGH * best_rank_energy(matrix, rank)


@few
@given(a=st.integers(4, 30), b=st.integers(4, 30), seed=st.integers(0, 99))
def test_ritz_vectors_are_the_best_directions_of_a_span_largest_first(a: int, b: int, seed: int) -> None:
    matrix = falling(a, b, seed)
    columns = linalg.orthonormal(randn(b, 4, seed=seed))
    (vectors,), (image,) = linalg.ritz([columns], [matrix @ columns], 2)
    assert orthonormality_error(vectors) <= 1e-10
    torch.testing.assert_close(image, matrix @ vectors)
    energies = (matrix @ vectors).square().sum(0)
    assert energies[0] >= energies[1]
    assert captured_energy(matrix, vectors) == pytest.approx(best_rank_energy(matrix @ columns, 2))


def test_the_range_finder_goes_on_until_it_holds_enough() -> None:
    flat, steep = randn(40, 30), randn(40, 3) @ randn(3, 30)
    for matrix, stops in ((flat, False), (steep, True)):
        start, scale = randn(30, 12), largest(matrix)
        (once,), _ = linalg.range_finder([matrix], [start], 1, [scale])
        (thrice,), _ = linalg.range_finder([matrix], [start], 3, [scale])
        assert torch.equal(once, thrice) is stops
        held = captured_energy(matrix, once) / matrix.square().sum()
        assert bool(held >= linalg.ENOUGH) is stops


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_lapack_bases_are_the_authors_call(shape: tuple[int, int]) -> None:
    grad = randn(*shape, dtype=torch.bfloat16)
    left, right = linalg.lapack_bases(grad, 4)
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    assert left.dtype == right.dtype == torch.bfloat16
    assert torch.equal(left, u[:, :4].bfloat16())
    assert torch.equal(right, vh[:4].T.bfloat16())


@pytest.mark.parametrize("side", SIDES)
@few
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=4), rank=st.integers(1, 12))
def test_a_view_orients_without_copying(side: str, shape: list[int], rank: int) -> None:
    view = MatrixView.of(shape, rank, side)
    weight = torch.empty(shape)
    matrix = view.orient(weight)
    assert matrix.shape == (view.a, view.b)
    assert matrix.data_ptr() == weight.data_ptr()
    assert view.rank == min(rank, view.m, view.n)
    assert view.m * view.n == weight.numel()
    assert view.basis_shapes["basis"] == (view.b, view.rank)


# ---------------------------------------------------------------------------------------------- codec, factored


@pytest.mark.parametrize(
    ("param", "state", "stored"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.float64, "float32", torch.float64),
        (torch.bfloat16, "parameter", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_storage_dtypes(param: torch.dtype, state: str, stored: torch.dtype) -> None:
    assert codec.storage_dtype(param, state) == stored


@few
@given(batch=st.integers(1, 3), m=sizes, n=sizes, seed=st.integers(0, 99), weight=st.floats(0.01, 1.0))
def test_factored_statistics_follow_their_equations(batch: int, m: int, n: int, seed: int, weight: float) -> None:
    grad = randn(batch, m, n, seed=seed)
    row, col = randn(batch, m, seed=1).square(), randn(batch, n, seed=2).square()
    square = grad.square() + 1e-30
    rows = (1 - weight) * row + weight * square.mean(-1)
    cols = (1 - weight) * col + weight * square.mean(-2)
    factored.accumulate([grad], [(row, col)], [weight], 1e-30)
    torch.testing.assert_close((row, col), (rows, cols))
    dense = row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None]
    (update,) = factored.whitened([grad], [(row, col)])
    torch.testing.assert_close(update(), grad / dense.sqrt())


# --------------------------------------------------------------------------------------------- import hygiene


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the repository root as current folder and first on the path."""
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_folder_kernels_does_not_pass_for_the_hugging_face_package() -> None:
    # transformers imports a package it finds without metadata, to ask for its version, and does not catch errors:
    # the bare import itself may succeed, but must offer nothing.
    result = python("from kernels import get_kernel")
    assert result.returncode != 0
    assert "Error" in result.stderr
    assert "kernels" in result.stderr
    assert python("import sys, transformers.utils as u; sys.exit(u.is_kernels_available())").returncode == 0


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("transformers", "from transformers import LlamaConfig, LlamaForCausalLM, Trainer"),
        ("bitsandbytes", "import bitsandbytes.optim"),
        ("torch", "import lowmem.optim, lowmem.kernels"),
    ],
)
def test_neighbours_import_cleanly_in_the_repository_root(package: str, code: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    result = python(code)
    assert result.returncode == 0, result.stderr
