"""AdamW on 8-bit moments through torch.compile, against its specification and torch's form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import compiled, moments, reference
from lowmem.kernels.blockwise import COMPANDED, Blocks
from lowmem.kernels.reference import Blockwise
from lowmem.kernels.rounding import CORRECTIONS, ROUNDINGS, Target
from lowmem.optim import AdamW8bit
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.helpers import feed, randn

pytestmark = pytest.mark.slow  # a compilation takes seconds

HOW = Blockwise(COMPANDED, [5], (0.9, 0.99), 1e-8)
LR, DECAY = 1e-2, 0.999
few = settings(max_examples=15, deadline=None, derandomize=True)
# One line, or lines of one entry, are layouts of their own: only the test on fp32 weights draws them.
rows, cols = st.integers(2, 9), st.integers(2, 700).filter(lambda size: size % COMPANDED.block != 1)


def fresh(rows: int, cols: int) -> tuple[Blocks, Blocks]:
    scales = torch.zeros(2, rows, COMPANDED.scales(cols))
    codes = (torch.zeros(rows, cols, dtype=COMPANDED.code_dtype(signed=signed)) for signed in (True, False))
    first, second = map(Blocks, codes, scales)
    return first, second


def target(weight: Tensor, mode: str = "nearest") -> Target:
    correction = torch.zeros_like(weight, dtype=CORRECTIONS[mode]) if mode in CORRECTIONS else None
    return Target(weight.clone(), mode, correction, seed=3, row=2, col=5)


def two_steps(adamw_, to: Target, grads: list[Tensor]) -> tuple[Tensor, ...]:
    """The value of the weight, and codes and scales of both moments."""
    first, second = fresh(*to.weight.shape)
    for t, grad in enumerate(grads, 1):
        adamw_(to, grad, (first, second), t, LR, DECAY, HOW)
    return to.read(), *first, *second


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float, atol: float) -> None:
    """Within an ulp, which may move a value over the border of two codes."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    for index in (1, 3):
        moved = (found[index].int() - expected[index].int()).abs()
        assert moved.max() <= 1
        assert moved.float().mean() <= 0.01 + 1 / moved.numel()
        torch.testing.assert_close(found[index + 1], expected[index + 1])


@few
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 700), turned=st.booleans(), bad=st.sampled_from([None, "nan", "inf"])
)
def test_it_is_the_specification_and_torchs_form(rows: int, cols: int, turned: bool, bad: str | None) -> None:
    weight = randn(cols, rows).T if turned else randn(rows, cols)
    grads = [randn(rows, cols, seed=1), randn(cols, rows, seed=2).T if turned else randn(rows, cols, seed=2)]
    if bad:
        grads[1][-1, -1] = float(bad)
    found = two_steps(compiled.adamw_blockwise_, target(weight), grads)
    assert_near(found, two_steps(reference.adamw_blockwise_, target(weight), grads), 1e-5, 1e-6)
    assert_near(found, two_steps(moments.adamw_blockwise_, target(weight), grads), 1e-5, 1e-6)


@few
@given(rows=rows, cols=cols, seed=st.integers(0, 9))
def test_directions_are_those_of_the_specification(rows: int, cols: int, seed: int) -> None:
    found = []
    for form in (compiled, reference):
        first, second = fresh(rows, cols)
        out = torch.full((rows, cols), torch.nan)
        form.adam_blockwise([randn(rows, cols, seed=seed)], ([first], [second]), [3], [out], HOW)
        found.append((out, *first, *second))
    assert_near(*found, 1e-5, 1e-6)


@pytest.mark.parametrize("mode", ROUNDINGS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(rows=rows, cols=cols, turned=st.booleans())
def test_bf16_weights_are_rounded_as_specified(mode: str, rows: int, cols: int, turned: bool) -> None:
    weight = (randn(cols, rows).T if turned else randn(rows, cols)).bfloat16()
    grads = [randn(rows, cols, seed=seed).bfloat16() for seed in (1, 2)]
    found, expected = (two_steps(form.adamw_blockwise_, target(weight, mode), grads) for form in (compiled, reference))
    assert (found[0] != expected[0]).float().mean() < 0.02 + 1 / weight.numel() or mode.startswith("compensated")
    bits = {"nearest": 8, "stochastic": 8, "compensated": 17, "compensated8": 15}[mode]
    assert_near(tuple(t.float() for t in found), tuple(t.float() for t in expected), 2.0 ** (1 - bits), 1e-6)


def test_fp64_weights_keep_their_bits() -> None:
    weight = randn(7, 300, dtype=torch.float64)
    still, *_ = two_steps(compiled.adamw_blockwise_, target(weight), [torch.zeros_like(weight)])
    assert torch.equal(still, weight * DECAY)
    grads = [randn(7, 300, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    found, expected = (two_steps(form.adamw_blockwise_, target(weight), grads) for form in (compiled, reference))
    assert found[0].dtype == torch.float64
    assert_near(found, expected, 0.0, 1e-5 * LR)  # directions are fp32, weights are not


@pytest.mark.parametrize("shape", [(40, 640), (9, 300), (40, 44), (3, 1000)])
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "compensated8"])
def test_the_size_of_pieces_changes_no_bit(mode: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(*shape).bfloat16()
    grads = [randn(*shape, seed=seed).bfloat16() for seed in (1, 2)]
    whole = two_steps(compiled.adamw_blockwise_, target(weight, mode), grads)
    monkeypatch.setattr(compiled, "PIECE", 512)  # rows in twos and tens, rows in parts
    assert same(two_steps(compiled.adamw_blockwise_, target(weight, mode), grads), whole)


def test_no_size_or_layout_asks_for_another_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(shape: tuple[int, int], turned: bool = False) -> int:
        before = counters["stats"]["unique_graphs"]
        weight = randn(*reversed(shape)).T if turned else randn(*shape)
        two_steps(compiled.adamw_blockwise_, target(weight), [randn(*shape)])
        return counters["stats"]["unique_graphs"] - before

    assert run((5, 384)) <= 1  # other tests may have been here
    monkeypatch.setattr(compiled, "PIECE", 1 << 14)
    # In one piece and in many; as many lines as entries in a line; one row; widths of blocks, of less, and in between.
    for shape in ((5, 384), (300, 512), (64, 256), (1, 5120), (9, 44), (200, 300), (3, 40960)):
        assert run(shape) == run(shape, turned=True) == 0, shape


def test_temporaries_are_those_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PIECE", 1 << 12)
    weight, grad = target(randn(512, 512)), randn(512, 512)
    held = fresh(512, 512)
    peaks = []
    for _ in range(2):  # the first may compile
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled.adamw_blockwise_(weight, grad, held, 1, LR, DECAY, HOW)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        peaks.append(peak)
    assert 0 < peaks[1] < 4 * 4 * compiled.PIECE < weight.weight.nbytes / 8


def test_nothing_is_done_to_an_empty_weight() -> None:
    for shape in ((0, 5), (5, 0)):
        two_steps(compiled.adamw_blockwise_, target(torch.empty(shape)), [torch.empty(shape)])


def test_an_unknown_mode_is_refused_by_name() -> None:
    weight, correction = randn(2, 8).bfloat16(), torch.zeros(2, 8, dtype=torch.int8)
    for wrong in (Target(weight, "up"), Target(weight, "compensated"), Target(weight, "stochastic", correction)):
        with pytest.raises(ValueError, match=rf"Invalid mode: '{wrong.mode}' with.*'nearest', 'stochastic', 'compens"):
            wrong.write(randn(2, 8))
        with pytest.raises(ValueError, match=f"Invalid mode: '{wrong.mode}'"):
            compiled.adamw_blockwise_(wrong, randn(2, 8), fresh(2, 8), 1, LR, DECAY, HOW)


def test_compiled_optimizers_are_the_eager_ones() -> None:
    results = {}
    for backend in ("torch", "compile"):
        for rounding in ("nearest", "stochastic", "compensated8"):
            weights = [nn.Parameter(randn(40, 300).bfloat16()), nn.Parameter(randn(5120).bfloat16())]
            optimizer = AdamW8bit(weights, lr=1e-2, rounding=rounding, backend=backend)
            for weight in weights:
                feed(optimizer, weight, [randn(*weight.shape, seed=seed) for seed in range(3)])
                weight.grad = None
            results[backend, rounding] = torch.cat([optimizer.full_precision(w).flatten() for w in weights])
    for rounding in ("nearest", "stochastic", "compensated8"):
        one, other = results["torch", rounding], results["compile", rounding]
        assert (one != other).float().mean() < 0.02, rounding  # an ulp of the step may cross a border
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)
