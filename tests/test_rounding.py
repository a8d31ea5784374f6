"""How values are written to bf16 weights: rounding modes, corrections, and the random bits that they use."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import random
from lowmem.kernels.rounding import ROUNDINGS, Target, join, round_stochastically, split
from torch import Tensor

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def rounded(value: Tensor, seed: int) -> Tensor:
    return round_stochastically(value, random.noise(seed, range(1), range(len(value)))[0]).float()


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


@few
@given(seeds, st.integers(0, 9), st.integers(1, 7), st.integers(0, 50), st.integers(1, 40))
def test_noise_is_half_words_of_bits_in_every_piece(seed: int, row: int, rows: int, col: int, cols: int) -> None:
    words = random.bits(seed, range(row, row + rows), (col + cols + 1) // 2)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, col : col + cols]
    noise = random.noise(seed, range(row, row + rows), range(col, col + cols))
    assert torch.equal(noise.int() & 0xFFFF, halves.int())
    at = random.noise_at(seed, torch.arange(row, row + rows)[:, None], torch.arange(col, col + cols))
    assert torch.equal(noise, at)


@few
@given(st.lists(FLOATS, min_size=1, max_size=30), seeds)
def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_what_bf16_holds(values: list[float], seed: int) -> None:
    exact = torch.tensor(values).bfloat16().float()
    assert torch.equal(rounded(exact, seed), exact)
    value = torch.tensor(values)
    assert ((rounded(value, seed) - value).abs() <= value.abs() * 2**-7 + 1e-38).all()


@pytest.mark.parametrize("value", [1.0 + 2**-10, 1.0 + 3 * 2**-9, 0.1, -0.7, 1e-20, 3e20])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    sample = rounded(torch.full((100_000,), value), seed=1).double()
    spread = sample.std() / len(sample) ** 0.5
    assert abs(sample.mean() - torch.tensor(value).double()) <= 4 * spread
    assert len(sample.unique()) == 2


def test_stochastic_rounding_passes_on_what_is_not_finite_and_does_not_overflow() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    torch.testing.assert_close(rounded(odd, 1), odd, equal_nan=True, rtol=0, atol=0)
    every_bit = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert rounded(every_bit, 1).isnan().all()
    top = torch.full((1000,), torch.finfo(torch.bfloat16).max)
    assert torch.equal(rounded(top, 1), top)


def test_rounding_is_a_function_of_seed_and_place_and_of_no_global_state() -> None:
    value, before = torch.randn(40, 60), torch.get_rng_state()
    written = []
    for seed in (1, 1, 2):
        target = Target(torch.zeros(40, 60, dtype=torch.bfloat16), "stochastic", seed=seed)
        target.write(value.clone())
        written.append(target.weight)
    assert torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])
    piece = Target(torch.zeros(40, 60, dtype=torch.bfloat16), "stochastic", seed=1)
    piece.part(slice(7, 31), slice(13, 60)).write(value[7:31, 13:].clone())
    assert torch.equal(piece.weight[7:31, 13:], written[0][7:31, 13:])
    columns = torch.tensor([3, 17, 59])
    chosen = piece.select(columns, dim=1)
    chosen.write(value[:, columns])
    piece.put(chosen, columns, dim=1)
    assert torch.equal(piece.weight[:, columns], written[0][:, columns])
    assert torch.equal(before, torch.get_rng_state())


@few
@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_weight_and_correction_of_16_bits_are_fp32_and_the_weight_is_the_nearest(values: list[float]) -> None:
    value = torch.tensor([*values, math.inf, -math.inf, 1e-40, -0.0, 1 + 2**-8])
    weight, correction = split(value)
    assert torch.equal(bits(join(weight, correction)), bits(value))
    assert torch.isnan(join(*split(torch.tensor([math.nan])))).all()
    nearest, finite = value.bfloat16().float(), value.isfinite()
    assert ((weight.float() - value).abs() <= (nearest - value).abs())[finite].all()


@few
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=30), seeds)
def test_a_correction_of_8_bits_makes_24_of_the_value(values: list[float], seed: int) -> None:
    value = torch.tensor(values)
    weight, correction = split(value, random.noise(seed, range(1), range(len(value)))[0])
    assert correction.dtype == torch.int8
    assert ((join(weight, correction) - value).abs() <= value.abs() * 2**-15 + 1e-38).all()


def test_a_correction_of_8_bits_is_unbiased() -> None:
    value = torch.full((100_000,), 1.0 + 2**-18)
    sample = join(*split(value, random.noise(3, range(1), range(len(value)))[0])).double()
    assert abs(sample.mean() - value[0].double()) <= 4 * sample.std() / len(sample) ** 0.5


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_small_updates_reach_the_weight_unless_it_is_rounded_to_nearest(mode: str) -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    correction = {"compensated": torch.int16, "compensated8": torch.int8}.get(mode)
    held = None if correction is None else torch.zeros(64, 64, dtype=correction)
    for step in range(200):  # of a twentieth of what bf16 resolves
        target = Target(weight, mode, held, seed=step)
        target.write(target.read() + 2**-7 / 20)
    moved = Target(weight, mode, held).read().mean().item() - 1
    assert moved == 0 if mode == "nearest" else moved == pytest.approx(10 * 2**-7, rel=0.02)
