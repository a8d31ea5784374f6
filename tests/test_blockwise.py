"""8-bit codes of moments: exactness, bias, scales, and the values of the tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import moments, reference
from lowmem.kernels.blockwise import COMPANDED, DYNAMIC, FORMATS, Blocks, Format, dequantise, dynamic_map, quantise_
from torch import Tensor

few = settings(max_examples=20, deadline=None)
forms = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
kinds = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def empty(rows: int, cols: int, form: Format, signed: bool) -> Blocks:
    codes = torch.zeros(rows, cols, dtype=form.code_dtype(signed=signed))
    return Blocks(codes, torch.zeros(rows, form.scales(cols)))


def coded(values: Tensor, form: Format, signed: bool, seed: int = 0) -> Blocks:
    blocks = empty(*values.shape, form, signed)
    quantise_(blocks, values, form, signed=signed, seed=seed)
    return blocks


def moment(rows: int, cols: int, signed: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) * torch.logspace(-4, 2, cols)
    return values if signed else values.square()


@forms
@kinds
@few
@given(rows=st.integers(0, 4), cols=st.integers(1, 600), seed=st.integers(0, 99))
def test_a_row_keeps_its_scales_whatever_stands_beside_it(
    form: Format, signed: bool, rows: int, cols: int, seed: int
) -> None:
    values = moment(rows, cols, signed, seed)
    blocks = coded(values, form, signed, seed)
    for row in range(rows):
        alone = empty(1, cols, form, signed)
        quantise_(alone, values[row : row + 1], form, signed=signed, seed=seed, first=(row, 0))
        assert torch.equal(alone.codes, blocks.codes[row : row + 1])
        assert torch.equal(alone.scale, blocks.scale[row : row + 1])
    for first in range(0, cols, form.block):
        part = values[:, first : first + form.block].abs()
        if rows:
            assert torch.equal(blocks.scale[:, first // form.block], part.amax(1))


@forms
@kinds
def test_errors_are_those_of_eight_bits(form: Format, signed: bool) -> None:
    values = moment(50, 700, signed)
    error = (dequantise(coded(values, form, signed), form, signed=signed) - values).norm() / values.norm()
    assert error < 0.02


@forms
@kinds
def test_coding_twice_changes_nothing(form: Format, signed: bool) -> None:
    # The signed dynamic table has +1 but no -1: a block whose largest entry is negative shrinks a little each time.
    values = moment(20, 300, signed).abs() if form is DYNAMIC else moment(20, 300, signed)
    once = coded(values, form, signed)
    twice = coded(dequantise(once, form, signed=signed), form, signed, seed=99)
    assert torch.equal(once.codes, twice.codes)


@forms
@kinds
def test_zeros_stay_zero_and_signs_stay(form: Format, signed: bool) -> None:
    values = moment(9, 300, signed)
    values[3] = 0.0
    values[4, 5] = 0.0
    decoded = dequantise(coded(values, form, signed), form, signed=signed)
    assert not decoded[3].any()
    assert decoded[4, 5] == 0
    assert (decoded * values >= 0).all()


@forms
@kinds
def test_what_is_not_finite_counts_as_zero_and_leaves_its_block_alone(form: Format, signed: bool) -> None:
    clean = moment(3, 300, signed)
    clean[1, 7:10] = 0.0
    poisoned = clean.clone()
    poisoned[1, 7], poisoned[1, 8], poisoned[1, 9] = torch.nan, torch.inf, torch.inf if not signed else -torch.inf
    one, other = coded(clean, form, signed), coded(poisoned, form, signed)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


def test_companded_second_moments_are_exact_in_the_mean_and_zero_only_where_they_were() -> None:
    values = moment(40, 256, signed=False)
    total = torch.zeros_like(values, dtype=torch.float64)
    for seed in range(400):
        decoded = dequantise(coded(values, COMPANDED, signed=False, seed=seed), COMPANDED, signed=False)
        assert ((decoded > 0) == (values > 0)).all()
        total += decoded
    scale = coded(values, COMPANDED, signed=False).scale.repeat_interleave(128, 1)
    spacing = 4 * (values / scale).pow(0.75) * scale / 255 + scale / 255**4  # of neighbouring codes, about
    representable = values > 2 * scale / 255**4
    bias = ((total / 400 - values).abs() / spacing)[representable]
    assert bias.max() < 5 * 0.5 / 400**0.5
    assert (total / 400 / values)[representable].mean().item() == pytest.approx(1.0, abs=2e-3)


def test_a_second_moment_decays_in_eight_bits() -> None:
    """Round to nearest would leave it where it is: beta2 = 0.999 moves it by less than half a code."""
    values = moment(8, 1024, signed=False)
    blocks = coded(values, COMPANDED, signed=False)
    start = dequantise(blocks, COMPANDED, signed=False)
    for step in range(100):
        decayed = dequantise(blocks, COMPANDED, signed=False) * 0.999
        quantise_(blocks, decayed, COMPANDED, signed=False, seed=step)
    left = dequantise(blocks, COMPANDED, signed=False).sum() / start.sum()
    assert left.item() == pytest.approx(0.999**100, rel=0.01)


@kinds
def test_the_dynamic_tables_have_256_different_values_and_the_ends(signed: bool) -> None:
    table = dynamic_map(signed)
    assert len(table.unique()) == 256
    assert torch.equal(table, table.sort().values)
    assert table.max() == 1.0
    assert (table == 0).sum() == 1
    assert table.min().item() == pytest.approx(-0.9929688 if signed else 0.0, abs=1e-6)


@forms
@few
@given(rows=st.integers(1, 9), cols=st.integers(1, 700), seed=st.integers(0, 99))
def test_the_fast_adam_is_the_specification(form: Format, rows: int, cols: int, seed: int) -> None:
    first = [coded(moment(rows, cols, True, seed), form, True) for _ in range(2)]
    second = [coded(moment(rows, cols, False, seed + 1), form, False) for _ in range(2)]
    grad, out = moment(rows, cols, True, seed + 2), torch.full((2, rows, cols), torch.nan)
    grad[0, 0] = [torch.nan, torch.inf, 1e30, 0.0][seed % 4]  # the third has a square that is not finite
    how = reference.Blockwise(form, [seed], (0.9, 0.99), 1e-8)
    for index, adam in enumerate((reference.adam_blockwise, moments.adam_blockwise)):
        adam([grad], ([first[index]], [second[index]]), [3], [out[index]], how)
    torch.testing.assert_close(out[1], out[0], rtol=1e-5, atol=1e-7)
    for one, other in (first, second):
        torch.testing.assert_close(one.scale, other.scale)
        moved = (one.codes.int() - other.codes.int()).abs()  # an ulp may move a value over the border of two codes
        assert moved.max() <= 1
        assert moved.float().mean() <= 0.01 + 1 / moved.numel()
