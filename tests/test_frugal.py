"""FRUGAL's limits and invariants (arXiv 2411.07837), its blocks, and BAdam and LISA, which are made of them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.kernels import tiles
from lowmem.optim import LISA, BAdam, Frugal, GaLore, param_groups
from lowmem.optim.core import blocks, selection
from lowmem.optim.core.projector import PROJECTORS
from lowmem.optim.core.state import is_counter
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import randn
from tests.reference.frugal import frugal_block_step, frugal_step, selection_size

few = settings(max_examples=20, deadline=None)
ENTRIES = ("columns", "rows", "randk")
DIRECTIONS = ("randperm", "sketch", "svd", "track", "random", "dct", "descend")
MODES: dict[str, dict[str, Any]] = {
    **{name: {"projector": name} for name in (*ENTRIES, *DIRECTIONS)},
    "columns-rotate": {"projector": "columns", "carry": "rotate"},
    "svd-full-complement": {"projector": "svd", "proj_type": "full", "free_space": "complement"},
    "lazy": {"projector": "sketch", "lazy": 0.5, "carry": "rotate"},
    **{f"blocks-{order}": {"projector": "blocks", "block_order": order} for order in blocks.ORDERS},
    "blocks-keep": {"projector": "blocks", "carry": "keep", "density": 0.5},
}
every_mode = pytest.mark.parametrize("mode", MODES)
shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))


def build(
    shapes: Sequence[tuple[int, ...]] = ((24, 16),), dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Frugal, list[Parameter]]:
    params = [Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    return Frugal(params, **{"lr": 1e-2, "update_proj_gap": 3, "weight_decay": 0.1, **options}), params


def feed(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: Sequence[int], scale: float = 1.0) -> None:
    """A step with random gradients for every seed."""
    for step in steps:
        for i, param in enumerate(params):
            param.grad = scale * randn(*param.shape, seed=1000 + 50 * step + i, dtype=param.dtype)
        optimizer.step()


def values(params: list[Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(one: list[Parameter], other: list[Parameter]) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages of all state but counters."""
    tensors = [value for held in optimizer.state.values() for name, value in held.items() if not is_counter(name)]
    return sum(value.untyped_storage().nbytes() for value in tensors)


# ------------------------------------------------------------------------------------------- density one and zero


@every_mode
@pytest.mark.parametrize("carry", ["reset", "keep", "rotate"])
def test_density_one_is_adamw_across_refreshes(mode: str, carry: str) -> None:
    ours, params = build([(24, 16), (13, 28), (6, 4, 3)], **MODES[mode] | {"density": 1.0, "carry": carry})
    theirs = [Parameter(value) for value in values(params)]
    feed(ours, params, range(10))
    feed(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True), theirs, range(10))
    assert_equal(params, theirs)


@few
@given(shapes, st.sampled_from((*ENTRIES, *DIRECTIONS)), st.floats(0.2, 3.0))
def test_density_one_takes_the_scaled_rate_and_the_unscaled_decay(
    shape: tuple[int, int], projector: str, scale: float
) -> None:
    ours, params = build([shape], density=1.0, projector=projector, scale=scale)
    theirs = [Parameter(value) for value in values(params)]
    feed(ours, params, range(5))
    feed(torch.optim.AdamW(theirs, lr=1e-2 * scale, weight_decay=0.1 / scale), theirs, range(5))
    torch.testing.assert_close(params, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projector", sorted({*PROJECTORS, "blocks"} - {"cross_head", "gaussian"}))
@pytest.mark.parametrize("free", ["signsgd", "sgd", "none"])
def test_density_zero_is_the_free_rule_without_state(
    projector: str, free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a decomposition")

    for name in ("exact_basis", "range_finder", "orthonormal"):
        monkeypatch.setattr(f"lowmem.optim.core.linalg.{name}", never)
    optimizer, params = build([(24, 16), (4, 3, 3)], density=0.0, projector=projector, free_rule=free, free_scale=0.5)
    expected = values(params)
    rule: Callable[[Tensor], Tensor] = {"signsgd": torch.sign, "sgd": torch.clone, "none": torch.zeros_like}[free]
    for step in range(5):
        feed(optimizer, params, [step])
        expected = [w * (1 - 1e-2 * 0.1) - 5e-3 * rule(p.grad) for w, p in zip(expected, params, strict=True)]
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-15, atol=1e-15)
        assert optimizer.state[param].keys() == {"step"}
    assert held_bytes(optimizer) == optimizer.summary().state_bytes == 0


@few
@given(shapes, st.sampled_from(ENTRIES), st.floats(0.05, 0.95))
def test_a_reset_in_every_step_makes_everything_signsgd(shape: tuple[int, int], projector: str, density: float) -> None:
    optimizer, params = build([shape], density=density, projector=projector, update_proj_gap=1, eps=0.0)
    expected = params[0].detach().clone()
    for step in range(4):
        feed(optimizer, params, [step])
        expected = (1 - 1e-3) * expected - 1e-2 * params[0].grad.sign()
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["lion", "sgd", "rmsprop"])
def test_density_one_is_the_rule_of_a_plain_group(rule: str) -> None:
    ours, params = build([(9, 7)], density=1.0, rule=rule)
    theirs = [Parameter(value) for value in values(params)]
    feed(ours, params, range(6))
    feed(GaLore(theirs, lr=1e-2, weight_decay=0.1, rank=None, rule=rule), theirs, range(6))
    assert_equal(params, theirs)


def test_vectors_are_plain_adamw() -> None:
    ours, params = build([(9,), (), (24, 16)], scale=0.5)
    theirs = [Parameter(value) for value in values(params)]
    feed(ours, params, range(5))
    feed(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True), theirs, range(5))
    assert_equal(params[:2], theirs[:2])
    assert not torch.equal(params[2], theirs[2])


# ------------------------------------------------------------------------------------------------ splitting


def split(step: Callable[[float], Tensor]) -> tuple[Tensor, Tensor]:
    """The state-full and the state-free part of the first step of a function of s_f."""
    full = step(0.0)
    return full, step(1.0) - full


@few
@given(shapes, st.sampled_from((*ENTRIES, "randperm")), st.floats(0.0, 1.0))
def test_choices_of_entries_split_a_weight_without_overlap(
    shape: tuple[int, int], projector: str, density: float
) -> None:
    def step(free_scale: float) -> Tensor:
        options = {"density": density, "projector": projector, "free_scale": free_scale, "weight_decay": 0.0}
        optimizer, params = build([shape], **options)
        before = params[0].detach().clone()
        feed(optimizer, params, [0])
        return params[0].detach() - before

    full, free = split(step)
    assert ((full.abs() > 1e-6) ^ (free.abs() > 1e-6)).all()


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_the_complement_has_no_free_part_inside_the_subspace(shape: tuple[int, int], proj_type: str) -> None:
    leaks = {}
    for space in ("ambient", "complement"):
        optimizers = []

        def step(free_scale: float, space: str = space, optimizers: list[Frugal] = optimizers) -> Tensor:
            options = {"projector": "svd", "proj_type": proj_type, "free_space": space, "free_scale": free_scale}
            optimizer, params = build([shape], **options, weight_decay=0.0)
            before = params[0].detach().clone()
            feed(optimizer, params, [0])
            optimizers.append(optimizer)
            return params[0].detach() - before

        _, free = split(step)
        (held,) = optimizers[0].state.values()
        (plan,) = optimizers[0]._planned()
        oriented = plan.view.orient(free)
        inside = oriented @ held["basis"]
        inside = inside if "basis_left" not in held else held["basis_left"].T @ inside
        leaks[space] = float(inside.norm() / free.norm())
    assert leaks["complement"] < 1e-12
    assert leaks["ambient"] > (0.05 if proj_type == "full" else 0.2)


def test_the_leak_of_signs_into_a_quarter_of_the_directions_is_about_a_third() -> None:
    weight = Parameter(torch.zeros(256, 256, dtype=torch.float64))
    optimizer = Frugal([weight], lr=1.0, projector="random", rule="sgd", betas=(0.0, 0.0), weight_decay=0.0)
    feed(optimizer, [weight], [0])
    basis = optimizer.state[weight]["basis"]
    free = weight.grad @ basis @ basis.T + weight.detach()
    assert 0.25 < float((free @ basis).norm() / free.norm()) < 0.35


@pytest.mark.parametrize("mode", ["svd", "sketch", "svd-full-complement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(96, 64), (200, 300)])
def test_a_gradient_inside_the_subspace_leaves_no_signs(mode: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    finals = []
    for free_rule in ("signsgd", "none"):
        optimizer, params = build([shape], dtype, **MODES[mode], free_rule=free_rule, update_proj_gap=1)
        for step in range(3):
            params[0].grad = randn(shape[0], 8, seed=step, dtype=dtype) @ randn(8, shape[1], seed=9, dtype=dtype)
            optimizer.step()
        finals.append(params[0].detach())
    torch.testing.assert_close(*finals, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["columns", "randk", "svd", "svd-full-complement", "dct"])
def test_the_size_of_tiles_does_not_matter(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finals = []
    for chunk in (1 << 18, 64, 7):
        monkeypatch.setattr(tiles, "CHUNK", chunk)
        optimizer, params = build([(24, 16), (13, 28)], **MODES[mode])
        feed(optimizer, params, range(5))
        finals.append(values(params))
    for small in finals[1:]:
        torch.testing.assert_close(small, finals[0], rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {StorageWeakRef(v.untyped_storage()) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and StorageWeakRef(value.untyped_storage()) not in known:
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("mode", ["columns", "rows", "randk", "svd", "svd-full-complement", "blocks-random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free", ["signsgd", "sgd"])
def test_a_step_makes_nothing_of_the_size_of_a_weight(
    mode: str, dtype: torch.dtype, free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CHUNK", 1 << 10)
    optimizer, params = build([(128, 96)] * 2, dtype, **{"density": 0.1, **MODES[mode], "free_rule": free})
    feed(optimizer, params, range(2))
    inactive = params if "blocks" not in mode else [p for p in params if "exp_avg" not in optimizer.state[p]]
    for param in params:
        param.grad = randn(128, 96, seed=7, dtype=dtype) if any(param is one for one in inactive) else None
    with Largest() as largest:
        optimizer.step()
    assert 0 < largest.elements <= 2 * 128 * 10  # R of two matrices, of 10 % each


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("mode", ["columns", "rows", "randk", "columns-rotate", "random", "dct", "blocks-random"])
def test_trajectories_do_not_see_the_scale_of_the_gradient(mode: str) -> None:
    finals = []
    for scale in (1.0, 100.0):
        optimizer, params = build([(24, 16), (13, 28)], **MODES[mode], eps=0.0)
        feed(optimizer, params, range(8), scale)
        finals.append(values(params))
    torch.testing.assert_close(*finals, rtol=1e-9, atol=1e-9)


def test_a_free_sgd_part_is_linear_in_the_gradient() -> None:
    moves = []
    for scale in (1.0, 10.0):
        optimizer, params = build(free_rule="sgd", rule="sgd", betas=(0.0, 0.0), weight_decay=0.0)
        before = values(params)[0]
        feed(optimizer, params, [0], scale)
        moves.append(params[0].detach() - before)
    torch.testing.assert_close(10 * moves[0], moves[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moves[0], -1e-2 * randn(24, 16, seed=1000, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projector", ["columns", "svd"])
def test_rows_may_be_permuted(projector: str) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    one, a = build(projector=projector)
    other, b = build(projector=projector)
    b[0].data = a[0].detach()[order]
    for step in range(7):
        a[0].grad = randn(24, 16, seed=step, dtype=torch.float64)
        b[0].grad = a[0].grad[order]
        one.step()
        other.step()
    torch.testing.assert_close(a[0].detach()[order], b[0].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("here", "there"), [("columns", "rows"), ("rows", "columns"), ("randperm", "randperm"), ("svd", "svd")]
)
@pytest.mark.parametrize("shape", [(24, 16), (13, 28)])
def test_a_transposed_weight_has_the_transposed_trajectory(here: str, there: str, shape: tuple[int, int]) -> None:
    one, a = build([shape], projector=here)
    other, b = build([shape[::-1]], projector=there)
    b[0].data = a[0].detach().T.contiguous()
    for step in range(7):
        a[0].grad = randn(*shape, seed=step, dtype=torch.float64)
        b[0].grad = a[0].grad.T.contiguous()
        one.step()
        other.step()
    torch.testing.assert_close(a[0].detach().T, b[0].detach(), rtol=1e-9, atol=1e-9)


@every_mode
def test_rate_zero_moves_nothing_and_decay_comes_once(mode: str) -> None:
    still, params = build([(24, 16), (13, 28)], **MODES[mode] | {"lr": 0.0})
    before = values(params)
    feed(still, params, range(4))
    assert_equal(params, before)
    decaying, params = build([(24, 16), (13, 28)], **MODES[mode] | {"lr": 0.5, "weight_decay": 0.25})
    for param in params:
        param.grad = torch.zeros_like(param)
    decaying.step()
    torch.testing.assert_close(values(params), [0.875 * value for value in before], rtol=1e-15, atol=0)


@every_mode
@pytest.mark.parametrize("tensor", [False, True])
def test_a_doubled_rate_doubles_the_first_step(mode: str, tensor: bool) -> None:
    moves = []
    for lr in (1e-2, torch.tensor(2e-2, dtype=torch.float64) if tensor else 2e-2):
        optimizer, params = build([(24, 16), (13, 28)], **MODES[mode] | {"lr": lr, "weight_decay": 0.0})
        before = values(params)
        feed(optimizer, params, [0])
        moves.append([now - old for now, old in zip(values(params), before, strict=True)])
    torch.testing.assert_close([2 * move for move in moves[0]], moves[1], rtol=1e-6, atol=1e-12)


@every_mode
def test_a_non_contiguous_or_convolutional_weight_is_any_other(mode: str) -> None:
    one, a = build([(24, 16), (10, 4, 3, 3)], **MODES[mode])
    b = [Parameter(torch.stack([a[0].detach()] * 2, dim=-1)[..., 0])]
    b.append(Parameter(a[1].detach().contiguous(memory_format=torch.channels_last)))
    assert not any(param.is_contiguous() for param in b)
    other = Frugal(b, lr=1e-2, update_proj_gap=3, weight_decay=0.1, **MODES[mode])
    feed(one, a, range(5))
    feed(other, b, range(5))
    torch.testing.assert_close(values(a), values(b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["columns", "rows", "randk", "blocks-random"])
@pytest.mark.parametrize("free", ["signsgd", "sgd"])
def test_bfloat16_weights_are_rounded_once(mode: str, free: str) -> None:
    low, a = build([(24, 16), (13, 28)], torch.bfloat16, **MODES[mode], free_rule=free, state_dtype="float32")
    high, b = build([(24, 16), (13, 28)], torch.float32, **MODES[mode], free_rule=free)
    for x, y in zip(a, b, strict=True):
        y.data = x.detach().float()
        x.grad = randn(*x.shape, seed=3, dtype=torch.bfloat16)
        y.grad = x.grad.float()
    low.step()
    high.step()
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.detach(), y.detach().bfloat16())


@pytest.mark.parametrize("mode", [mode for mode in MODES if "blocks" not in mode])  # those are torch's AdamW
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("at", [0, 3, 4])
def test_a_bad_gradient_poisons_nothing_and_is_a_zero_one(mode: str, bad: float, at: int) -> None:
    finals = []
    for value in (bad, 0.0):
        optimizer, params = build([(24, 16)], torch.float32, **MODES[mode])
        for step in range(8):
            params[0].grad = randn(24, 16, seed=step)
            if step == at:
                params[0].grad.mul_(1.0 if value else 0.0)[3, 5] = value
            optimizer.step()
        held = optimizer.state[params[0]]
        assert params[0].isfinite().all()
        assert all(value.isfinite().all() for name, value in held.items() if name != "until_refresh")
        finals.append(params[0].detach())
    if bad != 1e30:  # which a refresh can use
        torch.testing.assert_close(*finals, rtol=1e-6, atol=1e-6)


def test_a_state_free_matrix_ignores_a_bad_gradient() -> None:
    optimizer, params = build([(24, 16)], torch.float32, density=0.0)
    before = values(params)[0]
    params[0].grad = randn(24, 16)
    params[0].grad[3, 5] = math.nan
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), (1 - 1e-3) * before)


# --------------------------------------------------------------------------------------------------- sizes and bytes


@few
@given(shapes, st.sampled_from((*ENTRIES, "randperm", "svd", "random")), st.floats(0.0, 1.0))
def test_sizes_are_the_papers(shape: tuple[int, int], projector: str, density: float) -> None:
    optimizer, params = build([shape], density=density, projector=projector)
    feed(optimizer, params, range(2))
    side = "right" if shape[0] >= shape[1] else "left"
    size, whole = selection_size(projector if projector in ENTRIES else "dense", density, shape, side)
    moment = optimizer.state[params[0]].get("exp_avg", torch.empty(0))
    kept = {"columns": shape[0], "rows": shape[1], "randk": 1}.get(projector, max(shape))
    assert moment.numel() == kept * size
    if 0 < size < whole:
        assert optimizer.state[params[0]]["basis"].shape[-1] == size


@pytest.mark.parametrize(("density", "rank"), [(0.05, 0), (0.15, 2), (0.25, 2), (0.35, 4), (0.96, None)])
def test_directions_are_rounded_half_to_even(density: float, rank: int | None) -> None:
    optimizer, params = build([(10, 10)], density=density, projector="random")
    feed(optimizer, params, [0])
    shape = optimizer.state[params[0]].get("basis", torch.empty(10, 0)).shape
    assert shape == (10, 0 if rank is None else rank)
    assert ("exp_avg" in optimizer.state[params[0]]) == (rank != 0)


def test_a_rank_is_a_number_of_columns_even_beyond_the_rows() -> None:
    optimizer, params = build([(4, 64), (64, 4)], rank=16)
    feed(optimizer, params, [0])
    assert optimizer.state[params[0]]["exp_avg"].shape == (4, 16)
    assert optimizer.state[params[1]]["exp_avg"].shape == (64, 4)  # all columns: AdamW
    assert "basis" not in optimizer.state[params[1]]


FORMULAE: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "columns": lambda m, n: (2 * m * (n // 4), n // 4),
    "rows": lambda m, n: (2 * n * (m // 4), m // 4),
    "randk": lambda m, n: (2 * (m * n // 4), m * n // 4),
    "randperm": lambda m, n: (2 * max(m, n) * round(min(m, n) / 4), round(min(m, n) / 4)),
    "dct": lambda m, n: (2 * max(m, n) * round(min(m, n) / 4), round(min(m, n) / 4)),
    **dict.fromkeys(("svd", "sketch", "random"), lambda m, n: ((2 * max(m, n) + min(m, n)) * round(min(m, n) / 4), 0)),
}
"""Elements of state, and indices of 4 bytes."""


@pytest.mark.parametrize("projector", FORMULAE)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("carry", ["reset", "rotate"])
def test_state_has_the_documented_size(projector: str, shape: tuple[int, int], carry: str) -> None:
    optimizer, params = build([shape], torch.float32, projector=projector, carry=carry)
    feed(optimizer, params, range(5))
    elements, indices = FORMULAE[projector](*shape)
    ages = indices if carry == "rotate" else 0  # an age for every chosen index
    assert held_bytes(optimizer) == optimizer.summary().state_bytes == 4 * (elements + indices + ages)


@pytest.mark.parametrize(
    ("size", "adamw", "quarter", "zero", "directions"),
    [
        ((512, 1376, 8), 0.43, 0.29, 0.24, 0.30),
        ((768, 2048, 12), 1.00, 0.52, 0.37, 0.57),
        ((1024, 2736, 24), 2.74, 1.05, 0.49, 1.22),
        ((2048, 5461, 24), 9.98, 3.23, 0.98, 3.88),
    ],
    ids=["60M", "130M", "350M", "1B"],
)
def test_the_papers_table_of_memory(
    size: tuple[int, int, int], adamw: float, quarter: float, zero: float, directions: float
) -> None:
    hidden, inner, layers = size
    with torch.device("meta"):
        plain = [torch.empty(32000, hidden)] * 0 + [torch.empty(32000, hidden) for _ in range(2)]
        plain += [torch.empty(hidden) for _ in range(2 * layers + 1)]
        linear = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        matrices = [torch.empty(*shape) for shape in linear * layers]

    def gib(**options: Any) -> float:
        groups = [{"params": plain}, {"params": matrices, **options}]
        bytes_: int = Frugal(groups).summary().state_bytes
        return bytes_ / 2**30

    assert gib(density=1.0) == pytest.approx(adamw, abs=0.011)
    assert gib(density=0.25) == pytest.approx(quarter, abs=0.011)
    assert gib(density=0.25, projector="blocks") == pytest.approx(quarter, abs=0.05)
    assert gib(density=0.0) == pytest.approx(zero, abs=0.011)
    assert gib(density=0.25, projector="svd") == pytest.approx(directions, abs=0.011)


# -------------------------------------------------------------------------------------------------------- lifecycle

BUCKET = ((24, 16), (13, 28), (7,), (16, 16), (9, 9))


@every_mode
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_run_is_the_same_to_the_bit(mode: str, stop: int, tmp_path: Any) -> None:
    whole, a = build(BUCKET, torch.float32, **MODES[mode])
    feed(whole, a, range(14))
    first, b = build(BUCKET, torch.float32, **MODES[mode])
    feed(first, b, range(stop))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    c = [Parameter(value) for value in values(b)]
    second = Frugal(c, lr=0.5, **MODES[mode])
    torch.manual_seed(12345)  # draws come from no global generator
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    feed(second, c, range(stop, 14))
    assert_equal(a, c)
    own = {value.data_ptr() for held in second.state.values() for value in held.values() if value.numel()}
    source = {value.data_ptr() for held in first.state.values() for value in held.values() if value.numel()}
    assert not own & source


@every_mode
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_continue_as_the_original(mode: str, how: Callable[[Any], Any]) -> None:
    optimizer, a = build(BUCKET, torch.float32, **MODES[mode])
    feed(optimizer, a, range(4))
    twin, b = how((optimizer, a))
    feed(optimizer, a, range(4, 9))
    feed(twin, b, range(4, 9))
    assert_equal(a, b)


@every_mode
def test_a_missing_gradient_resets_nothing(mode: str) -> None:
    absent = range(4, 4 + 2 * 3)
    optimizer, a = build(BUCKET, torch.float32, **MODES[mode])
    alone, b = build(BUCKET, torch.float32, **MODES[mode])
    for step in range(12):
        for params, missing in ((a, step in absent), (b, False)):
            for i, param in enumerate(params):
                param.grad = None if missing and i == 0 else randn(*param.shape, seed=100 * step + i)
        optimizer.step()
        alone.step()
    assert_equal(a[1:], b[1:])
    assert not torch.equal(a[0], b[0])


def test_state_that_stays_keeps_its_age_and_new_state_starts_at_zero() -> None:
    optimizer, params = build(carry="rotate", density=0.5)
    ages = []
    for step in range(9):
        feed(optimizer, params, [step])
        held = optimizer.state[params[0]]
        ages.append(dict(zip(held["basis"].tolist(), held["age"].tolist(), strict=True)))
    assert set(ages[0].values()) == {1.0}
    for before, after in itertools.pairwise(ages):
        assert all(age == before.get(index, 0.0) + 1 for index, age in after.items())
    assert len(set(ages[-1].values())) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": -0.1}, "Invalid density: -0.1"),
        ({"density": 1.1}, "Invalid density: 1.1"),
        ({"density": math.nan}, "Invalid density: nan"),
        ({"density": 0.0, "rank": 3}, "rank=3 and density=0.0 contradict"),
        ({"density": 0.5, "rank": 3}, "rank=3 and density=0.5 contradict"),
        ({"free_rule": "adam"}, "Invalid free_rule: 'adam'; choose one of 'signsgd'"),
        ({"free_space": "inside"}, "Invalid free_space"),
        ({"free_scale": -1.0}, "Invalid free_scale: -1.0"),
        ({"free_rule": "freeze"}, "pass projector='blocks'"),
        ({"carry": None}, "Invalid carry: None"),
        ({"rule": "adafactor"}, "Invalid rule: 'adafactor'; choose one of 'adamw'"),
        ({"compat": "official"}, "drop the option"),
        ({"rank": "auto"}, "pass density=0.25"),
        ({"projector": "cross_head"}, "drop num_heads"),
        ({"projector": "magic"}, "Invalid projector"),
        ({"block_order": "random"}, "or pass projector='blocks'"),
        ({"block_by": "tensor"}, "or pass projector='blocks'"),
        ({"projector": "blocks", "proj_type": "left"}, "proj_type='left' has no meaning"),
        ({"projector": "blocks", "lazy": 0.5}, "lazy=0.5 has no meaning"),
        ({"projector": "blocks", "stagger": True}, "stagger=True has no meaning"),
        ({"projector": "blocks", "block_order": "sorted"}, "Invalid block_order"),
        ({"projector": "blocks", "block_by": "layer"}, "model.named_parameters"),
        ({"projector": "blocks", "rank": 2}, "of which the group has 1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
    optimizer, _ = build()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(randn(9, 7))], **options})
    assert len(optimizer.param_groups) == 1


def test_other_optimizers_have_no_blocks() -> None:
    with pytest.raises(ValueError, match="Invalid projector: 'blocks'"):
        GaLore([Parameter(randn(9, 7))], projector="blocks")


def test_a_size_in_any_group_makes_the_others_plain() -> None:
    def ranks(groups: list[dict[str, Any]], **options: Any) -> list[int | None]:
        return [row.rank for row in Frugal(groups, **options).summary()]

    one, two = {"params": [Parameter(randn(9, 8))]}, {"params": [Parameter(randn(9, 8))]}
    assert ranks([{**one}, {**two}]) == [2, 2]
    assert ranks([{**one}, {**two}], rank=3) == [3, 3]
    assert ranks([{**one}, {**two, "density": 0.5}]) == [None, 4]
    assert ranks([{**one}, {**two, "density": 0.0}], rank=3) == [None, 0]
    assert ranks([{**one}, {**two, "rank": 5}], density=0.5) == [None, 5]
    optimizer = Frugal([{**one}])
    optimizer.add_param_group({**two, "rank": 5})
    optimizer.add_param_group({"params": [Parameter(randn(9, 8))], "rank": None})
    optimizer.add_param_group({"params": [Parameter(randn(9, 8))], "density": 0.5})
    optimizer.add_param_group({"params": [Parameter(randn(9, 8))]})
    assert [row.rank for row in optimizer.summary()] == [2, 5, None, 4, 2]


def test_the_groups_of_a_model() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "mlp": nn.Linear(8, 16), "lm_head": nn.Linear(8, 20)})
    optimizer = Frugal(param_groups(model, rank=None, density=0.25))
    assert [row.rank for row in optimizer.summary() if row.rank is not None] == [2]


# ----------------------------------------------------------------------------------------------------------- blocks


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(blocks.ORDERS), st.integers(1, 13), st.data())
def test_every_block_has_equal_turns(order: str, total: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, total))
    turns: Counter[int] = Counter(dict.fromkeys(range(total), 0))
    for refreshes in range(1, 40):
        chosen = blocks.window(order, total, size, refreshes, seed=5)
        assert len(set(chosen)) == len(chosen) == size
        turns.update(chosen)
        if order != "iid":
            assert max(turns.values()) - min(turns.values()) <= 1


def test_windows_of_every_order() -> None:
    def windows(order: str, total: int, size: int, count: int) -> list[list[int]]:
        return [blocks.window(order, total, size, turn + 1) for turn in range(count)]

    assert windows("ascending", 5, 2, 3) == [[0, 1], [2, 3], [4, 0]]
    assert windows("descending", 5, 2, 3) == [[4, 3], [2, 1], [0, 4]]
    assert windows("mirror", 6, 2, 4) == [[0, 5], [1, 4], [2, 3], [0, 5]]
    assert windows("mirror", 5, 2, 3) == [[0, 4], [1, 3], [2, 0]]
    epochs = [sorted(itertools.chain(*windows("random", 6, 2, 6)[i : i + 3])) for i in (0, 3)]
    assert epochs == [list(range(6))] * 2
    assert windows("random", 6, 2, 3) != windows("random", 6, 2, 6)[3:]
    seeds = {tuple(blocks.window("random", 8, 4, 1, seed)) for seed in range(9)}
    assert len(seeds) > 5


def active_names(optimizer: Frugal, params: list[Parameter]) -> set[int]:
    return {i for i, param in enumerate(params) if "exp_avg" in optimizer.state[param]}


@pytest.mark.parametrize("order", blocks.ORDERS)
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("carry", ["reset", "keep", "rotate"])
@pytest.mark.parametrize(("rule", "free"), [("adamw", "signsgd"), ("lion", "sgd"), ("sgd", "none")])
def test_blocks_follow_the_dense_reference(order: str, density: float, carry: str, rule: str, free: str) -> None:
    group = [(12, 7), (7, 12), (5, 3, 2), (6, 6), (4, 9)]
    options = {"projector": "blocks", "density": density, "block_order": order, "carry": carry, "free_rule": free}
    optimizer, params = build(group, rule=rule, scale=0.5, free_scale=0.3, seed=3, **options)
    weights, states = values(params), [{} for _ in group]
    size = max(1, round(density * len(group)))
    for step in range(13):
        active = blocks.window(order, len(group), size, 1 + step // 3, 3)
        feed(optimizer, params, [step])
        frugal_block_step(
            weights,
            [param.grad for param in params],
            states,
            active=active,
            restart=carry == "reset" and step % 3 == 0,
            lr=1e-2,
            weight_decay=0.1,
            rule=rule,
            free=free,
            full_scale=0.5,
            free_scale=0.3,
        )
        assert active_names(optimizer, params) == set(active)
    torch.testing.assert_close(values(params), weights, rtol=1e-9, atol=1e-9)


def test_a_block_that_is_active_for_ever_is_adamw_and_the_others_signsgd() -> None:
    optimizer, params = build([(12, 7)] * 4, projector="blocks", update_proj_gap=10**9)
    theirs = [Parameter(value) for value in values(params)]
    feed(optimizer, params, range(9))
    feed(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True), theirs, range(9))
    (chosen,) = active_names(optimizer, params)
    for i, (mine, other) in enumerate(zip(params, theirs, strict=True)):
        assert torch.equal(mine, other) == (i == chosen)
    free = Parameter(randn(12, 7, seed=(chosen + 1) % 4, dtype=torch.float64))
    for step in range(9):
        free.data = (1 - 1e-3) * free - 1e-2 * randn(12, 7, seed=1000 + 50 * step + (chosen + 1) % 4).double().sign()
    torch.testing.assert_close(params[(chosen + 1) % 4].detach(), free.detach(), rtol=1e-12, atol=1e-12)


def test_the_state_of_a_block_is_really_freed() -> None:
    optimizer, params = build([(40, 24)] * 4, torch.float32, projector="blocks", block_order="ascending")
    refs = []
    for step in range(12):
        feed(optimizer, params, [step])
        assert held_bytes(optimizer) == optimizer.summary().state_bytes == 2 * 40 * 24 * 4
        (chosen,) = active_names(optimizer, params)
        assert chosen == step // 3
        refs.append(StorageWeakRef(optimizer.state[params[chosen]]["exp_avg"].untyped_storage()))
    assert [ref.expired() for ref in refs] == [True] * 9 + [False] * 3


def test_the_schedule_counts_steps_without_gradients() -> None:
    optimizer, params = build([(12, 7)] * 4, projector="blocks", block_order="ascending")
    for step in range(12):
        for param in params:
            param.grad = None
        params[3].grad = randn(12, 7, seed=step, dtype=torch.float64)
        optimizer.step()
        assert active_names(optimizer, params[3:]) == ({0} if step >= 9 else set())
    assert float(optimizer.state[params[3]]["step"]) == 3


def test_the_warm_up_step_of_checkpointing_tools_counts_nothing() -> None:
    one, a = build([(12, 7)] * 4, projector="blocks")
    other, b = build([(12, 7)] * 4, projector="blocks")
    other.param_groups[0]["lr"] = 0.0
    for param in b:
        param.grad = torch.zeros_like(param)
    other.step()
    other.param_groups[0]["lr"] = 1e-2
    feed(one, a, range(7))
    feed(other, b, range(7))
    assert_equal(a, b)


def test_a_changed_interval_takes_effect_at_the_next_refresh() -> None:
    optimizer, params = build([(12, 7)] * 4, projector="blocks", block_order="ascending")
    feed(optimizer, params, [0])
    optimizer.param_groups[0]["update_proj_gap"] = 1
    seen = []
    for step in range(1, 6):
        feed(optimizer, params, [step])
        seen += active_names(optimizer, params)
    assert seen == [0, 0, 1, 2, 3]


def test_vectors_in_a_group_of_blocks_are_always_adamw() -> None:
    optimizer, params = build([(7,), (12, 7), (9,), (12, 7)], projector="blocks", density=0.5)
    theirs = [Parameter(value) for value in values(params)]
    feed(optimizer, params, range(7))
    feed(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True), theirs, range(7))
    assert_equal([params[0], params[2]], [theirs[0], theirs[2]])


def test_a_checkpoint_of_another_form_is_refused() -> None:
    optimizer, params = build(projector="blocks")
    feed(optimizer, params, [0])
    other, _ = build(projector="columns")
    with pytest.raises(ValueError, match="construct the optimizer that wrote it, with projector='blocks'"):
        other.load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------------------------------------- BAdam and LISA


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}) for _ in range(layers))
        for i, param in enumerate(self.parameters()):
            param.data = randn(*param.shape, seed=i)


def groups(model: nn.Module, rank: int | None = 1) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [pair for pair in named if "layers" not in pair[0]], "rank": None},
        {"params": [pair for pair in named if "layers" in pair[0]], "rank": rank},
    ]


def active_layers(optimizer: Frugal, model: nn.Module) -> list[str]:
    named = model.named_parameters()
    return [name for name, p in named if "layers" in name and p.ndim > 1 and "exp_avg" in optimizer.state[p]]


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
def test_every_layer_of_badam_has_its_steps_and_stands_still_otherwise(order: str) -> None:
    model = Model()
    params = list(model.parameters())
    optimizer = BAdam(groups(model), lr=1e-2, weight_decay=0.1, update_proj_gap=3, block_order=order)
    names = [name for name, _ in model.named_parameters()]
    moves: Counter[str] = Counter()
    for step in range(12):
        before = values(params)
        feed(optimizer, params, [step])
        moved = {name for name, p, old in zip(names, params, before, strict=True) if not torch.equal(p, old)}
        still = {name for name in names if name.endswith("weight") and "layers" in name} - moved
        assert len(still) == 6
        assert len(active_layers(optimizer, model)) == 2
        moves.update(moved)
    assert {
        name: count for name, count in moves.items() if "layers" in name and name.endswith("weight")
    } == dict.fromkeys((name for name in names if "layers" in name and name.endswith("weight")), 3)
    assert moves["embed.weight"] == 12


def test_badam_restarts_adam_for_every_block() -> None:
    shape, gap = (9, 7), 3
    mine, theirs = Parameter(randn(*shape)), Parameter(randn(*shape))
    optimizer = BAdam([("layers.0.weight", mine)], lr=1e-2, update_proj_gap=gap)
    for step in range(9):
        if step % gap == 0:
            restarted = torch.optim.AdamW([theirs], lr=1e-2, fused=True)
        feed(optimizer, [mine], [step])
        feed(restarted, [theirs], [step])
    assert torch.equal(mine, theirs)
    endless = BAdam([("layers.0.weight", mine)], lr=1e-2, update_proj_gap=10**9)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, fused=True)
    feed(endless, [mine], range(9))
    feed(adamw, [theirs], range(9))
    assert torch.equal(mine, theirs)


def test_lisa_trains_some_layers_at_a_time_and_frees_the_others() -> None:
    model = Model(6)
    params = list(model.parameters())
    optimizer = LISA(groups(model, 2), lr=1e-2, update_proj_gap=2)
    drawn = []
    for step in range(16):
        feed(optimizer, params, [step])
        names = active_layers(optimizer, model)
        assert len(names) == 4
        drawn.append(tuple(sorted({name.split(".")[1] for name in names})))
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 3
    plain = sum(p.numel() for name, p in model.named_parameters() if "weight" not in name or "embed" in name)
    assert held_bytes(optimizer) == 4 * 2 * (plain + 4 * 36)


def test_lisa_keeps_the_moments_of_a_layer_that_stays() -> None:
    model = Model(3)
    params = list(model.parameters())
    optimizer = LISA(groups(model, 2), update_proj_gap=1)
    ages: dict[str, float] = {}
    for step in range(12):
        feed(optimizer, params, [step])
        active = active_layers(optimizer, model)
        now = {name: float(optimizer.state[p]["step"]) for name, p in model.named_parameters() if name in active}
        assert all(age == ages.get(name, 0.0) + 1 for name, age in now.items())
        ages = now
    assert max(ages.values()) > 1


def test_layers_come_from_the_whole_of_a_name_up_to_its_number() -> None:
    assert blocks.layer("model.layers.3.mlp.0.weight") == "model.layers.3"
    assert blocks.layer("layers.10.weight") != blocks.layer("layers.1.weight")
    assert blocks.layer("encoder.0.weight") != blocks.layer("decoder.0.weight")
    model = Model()
    with pytest.raises(ValueError, match=r"'embed\.weight' has none: put it in a plain group"):
        BAdam(model.named_parameters())
    with pytest.raises(ValueError, match=r"pass model\.named_parameters\(\)"):
        BAdam(model.parameters())


@pytest.mark.parametrize("build_it", [BAdam, LISA])
def test_layers_resume_in_the_middle_of_a_turn(build_it: Callable[..., Frugal], tmp_path: Any) -> None:
    whole, split = Model(), Model()
    a, b = list(whole.parameters()), list(split.parameters())
    feed(build_it(groups(whole), update_proj_gap=3), a, range(14))
    first = build_it(groups(split), update_proj_gap=3)
    feed(first, b, range(7))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = build_it(groups(split), update_proj_gap=3)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    feed(second, b, range(7, 14))
    assert_equal(a, b)


@pytest.mark.parametrize("free", ["signsgd", "freeze"])
def test_badam_is_frugal_with_layers(free: str) -> None:
    one, other = Model(), Model()
    a, b = list(one.parameters()), list(other.parameters())
    feed(BAdam(groups(one), free_rule=free), a, range(4))
    options = {"projector": "blocks", "block_by": "layer", "update_proj_gap": 100, "free_rule": free}
    feed(Frugal(groups(other), **options), b, range(4))
    assert_equal(a, b)


# ------------------------------------------------------------------------------------------------------- convergence


def test_the_free_part_makes_up_for_most_of_what_a_projection_loses() -> None:
    """Least squares that are not of low rank: the projection alone leaves three quarters of the error."""
    target = randn(32, 32, seed=1)
    losses = {}
    for name, options in {"adamw": {"density": 1.0}, "frugal": {}, "alone": {"free_rule": "none"}}.items():
        weight = Parameter(torch.zeros(32, 32))
        optimizer = Frugal([weight], lr=2e-2, weight_decay=0.0, update_proj_gap=10**9, **options)
        for _ in range(120):
            optimizer.zero_grad()
            loss = (weight - target).square().sum()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["frugal"] < 0.25 * losses["alone"]
    assert losses["adamw"] < 0.25 * losses["alone"]


def test_the_reference_of_one_matrix_is_ours_at_every_density() -> None:
    for density in (0.0, 0.1, 0.9, 1.0):
        optimizer, params = build([(6, 5)], density=density, projector="svd")
        weight, state = values(params)[0], {}
        for step in range(5):
            feed(optimizer, params, [step])
            frugal_step(
                weight, params[0].grad, state, lr=1e-2, density=density, weight_decay=0.1, gap=3, select="dense"
            )
        torch.testing.assert_close(params[0].detach(), weight, rtol=1e-9, atol=1e-9)


def test_entries_that_four_bytes_do_not_number_are_refused() -> None:
    weight = Parameter(torch.empty(1 << 16, 1 << 15, device="meta"))
    with pytest.raises(ValueError, match=r"2147483648 coordinates .* choose projector='columns'"):
        Frugal([weight], density=0.01, projector="randk").summary()


@pytest.mark.parametrize("name", ["inactive_lr_scale", "reset_statistics", "is_proj_params"])
def test_options_of_the_authors_groups_are_refused_with_ours_named(name: str) -> None:
    group = {"params": [Parameter(torch.zeros(8, 6))], "density": 0.5, name: True}
    with pytest.raises(ValueError, match=rf"got {name}=True, .* say it by {selection.THEIRS[name]}"):
        Frugal([group])
