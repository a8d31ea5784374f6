"""GaLore+'s limits and invariants (arXiv 2412.19820): shared heads, sparse residuals, state that changes its shape."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowmem.optim import Fira, GaLore, GaLorePlus, head_groups, param_groups
from lowmem.optim.core.cross_head import cross_head
from lowmem.optim.core.projector import Request, sketch
from torch import Tensor, nn
from torch.nn import Parameter

from tests.helpers import feed, randn
from tests.reference.subspace import best_rank_energy, captured_energy, overlap

EVERY = {"lr": 1e-2, "rank": 4, "update_proj_gap": 5, "weight_decay": 0.1, "residual_density": 0.1}
FUSED = [(12, 3), (6, 1), (6, None)]
WARM = ("exact", "additive")


def build(
    shape: tuple[int, ...] = (24, 16), dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[GaLorePlus, Parameter]:
    param = Parameter(randn(*shape, dtype=dtype))
    return GaLorePlus([param], **{**EVERY, "residual_warmup": 3, **options}), param


def grads(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    return [randn(*shape, seed=100 * seed + step, dtype=torch.float64) for step in range(steps)]


def reloaded(optimizer: GaLorePlus) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def find(matrix: Tensor, heads: Any, rank: int, **options: Any) -> Tensor:
    """The basis that a refresh finds, through the public optimizer."""
    param = Parameter(torch.zeros_like(matrix))
    optimizer = GaLore([param], rank=rank, projector="cross_head", num_heads=heads, **options)
    feed(optimizer, param, [matrix])
    return optimizer.state[param]["basis"]


def held_bytes(optimizer: GaLorePlus, param: Parameter) -> int:
    return sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values() if t.ndim)


# ----------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("off", [{"residual_density": 0.0}, {"residual": None}])
def test_without_residual_and_heads_it_is_galore(shape: tuple[int, int], off: dict[str, Any]) -> None:
    plus, ours = build(shape, **off)
    options = {name: value for name, value in EVERY.items() if name != "residual_density"}
    galore = GaLore([theirs := Parameter(ours.detach().clone())], **options)
    feed(plus, ours, grads(shape, 12))
    feed(galore, theirs, grads(shape, 12))
    assert torch.equal(ours, theirs)
    assert plus.state[ours].keys() == galore.state[theirs].keys()


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_one_head_is_galore_from_the_right(shape: tuple[int, int]) -> None:
    plus, ours = build(shape, residual=None, num_heads=1)
    galore = GaLore(
        [theirs := Parameter(ours.detach().clone())],
        lr=1e-2, rank=4, update_proj_gap=5, weight_decay=0.1, proj_type="right",
    )  # fmt: skip
    feed(plus, ours, grads(shape, 12))
    feed(galore, theirs, grads(shape, 12))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("heads", [None, 4, FUSED], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_exact_moments_of_every_entry_are_adamw(heads: Any, maximize: bool) -> None:
    plus, ours = build(dtype=torch.float64, num_heads=heads, residual_density=1.0, scale=0.5, maximize=maximize)
    theirs = Parameter(ours.detach().clone())
    adamw = torch.optim.AdamW([theirs], lr=5e-3, weight_decay=0.2, maximize=maximize)
    feed(plus, ours, grads((24, 16), 12))
    feed(adamw, theirs, grads((24, 16), 12))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_weight_of_any_strides_and_dimensions_follows_adamw() -> None:
    start = randn(6, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    plus = GaLorePlus([ours], **{**EVERY, "residual_density": 1.0, "scale": 1.0})
    adamw = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    feed(plus, ours, grads(start.shape, 7))
    feed(adamw, theirs, grads(start.shape, 7))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# -------------------------------------------------------------------------------------------------- cross-head


def test_a_row_space_that_heads_share_is_captured_whole() -> None:
    matrix = randn(32, 3, dtype=torch.float64) @ randn(3, 20, seed=1, dtype=torch.float64)
    basis = find(matrix, 8, 3)
    assert (matrix - matrix @ basis @ basis.T).norm() <= 1e-12 * matrix.norm()


def test_the_basis_is_the_dominant_subspace_of_one_head() -> None:
    matrix = randn(32, 20, dtype=torch.float64)
    spectrum = torch.linspace(1, 0.1, 20, dtype=torch.float64) ** 3
    for select, head in {"first": 0, "cycle": 0, "max_norm": 2}.items():
        scaled = matrix * spectrum
        scaled[16:24] *= 3  # head 2 of 4
        block = scaled.view(4, 8, 20)[head]
        assert captured_energy(block, find(scaled, 4, 5, head_select=select)) >= 0.999 * best_rank_energy(block, 5)


@pytest.mark.parametrize(("heads", "rank", "taken"), [(4, 9, 2), (8, 10, 3), (4, 8, 1)])
def test_a_rank_beyond_a_head_stacks_heads(heads: int, rank: int, taken: int) -> None:
    matrix = randn(32, 20, dtype=torch.float64)
    basis = find(matrix, heads, rank, head_select="first")
    block = matrix[: taken * 32 // heads]
    assert captured_energy(block, basis) >= 0.98 * best_rank_energy(block, rank)
    assert (basis.T @ basis - torch.eye(rank, dtype=basis.dtype)).abs().max() < 1e-10


def test_a_random_head_depends_on_seed_and_refresh_alone() -> None:
    def heads(seed: int, steps: int = 12) -> list[int]:
        plus, param = build((32, 20), num_heads=8, residual=None, seed=seed, update_proj_gap=1)
        seen = []
        for grad in grads((32, 20), steps):
            feed(plus, param, [grad])
            energies = [captured_energy(block, plus.state[param]["basis"]) / block.square().sum() for block in
                        grad.view(8, 4, 20)]  # fmt: skip
            seen.append(int(torch.stack([torch.as_tensor(e) for e in energies]).argmax()))
        return seen

    assert heads(0) == heads(0)
    assert heads(0) != heads(1)
    assert len(set(heads(0))) > 3


def test_a_head_without_gradient_is_passed_over() -> None:
    matrix = randn(32, 20)
    matrix[:24] = 0.0
    assert captured_energy(matrix, find(matrix, 4, 4, head_select="first")) >= 0.9 * best_rank_energy(matrix, 4)


def test_query_and_key_of_grouped_attention_have_their_own_counts() -> None:
    query, key = Parameter(randn(32, 20)), Parameter(randn(8, 20))
    groups = [{"params": [query], "num_heads": 8}, {"params": [key], "num_heads": 2}]
    plus = GaLorePlus([{**group, "rank": 4} for group in groups])
    assert [group["projector"] for group in plus.param_groups] == ["cross_head"] * 2
    assert [row.side for row in plus.summary()] == ["right"] * 2
    query.grad, key.grad = randn(32, 20, seed=1), randn(8, 20, seed=2)
    plus.step()


def test_ranges_of_a_fused_weight_move_as_weights_of_their_own() -> None:
    options: dict[str, Any] = {**EVERY, "head_select": "first", "residual": None}
    whole = Parameter(randn(24, 16, dtype=torch.float64))
    parts = [Parameter(part.clone()) for part in whole.detach().split([12, 6, 6])]
    fused = GaLorePlus([whole], num_heads=FUSED, **options)
    apart = [GaLorePlus([part], num_heads=heads or 1, **options) for part, (_, heads) in zip(parts, FUSED, strict=True)]
    for grad in grads((24, 16), 11):
        feed(fused, whole, [grad])
        for one, part, piece in zip(apart, parts, grad.split([12, 6, 6]), strict=True):
            feed(one, part, [piece])
    # Where a block has no more rows than the sketch has columns it is exact, whatever its start.
    torch.testing.assert_close(whole, torch.cat(list(parts)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("carry", ["rotate", "keep", "reset"])
def test_ranges_carry_their_moments(carry: str) -> None:
    plus, param = build(dtype=torch.float64, num_heads=FUSED, carry=carry, residual=None)
    feed(plus, param, grads((24, 16), 5))
    before = {name: held.clone() for name, held in plus.state[param].items()}
    param.grad = torch.full((24, 16), 1e-30, dtype=torch.float64) * randn(24, 16, dtype=torch.float64)
    plus.step()
    after = plus.state[param]
    assert after["refreshes"] == 2
    for start, stop, range_ in ((0, 12, 0), (12, 18, 1), (18, 24, 2)):
        turn = after["basis"][range_].T @ before["basis"][range_]
        expected = {"keep": before["exp_avg"][start:stop], "rotate": before["exp_avg"][start:stop] @ turn.T}
        wanted = expected.get(carry, torch.zeros(stop - start, 4, dtype=torch.float64))
        torch.testing.assert_close(after["exp_avg"][start:stop], 0.9 * wanted, rtol=1e-9, atol=1e-12)


def test_a_range_without_gradient_keeps_its_basis() -> None:
    plus, param = build(num_heads=FUSED, update_proj_gap=1)
    first, second = grads((24, 16), 2)
    first[:12] = 0.0
    feed(plus, param, [first])
    basis = plus.state[param]["basis"].clone()
    assert overlap(basis[0], basis[0]) == pytest.approx(1, abs=1e-5)  # arbitrary, orthonormal
    second[12:18] = 0.0
    feed(plus, param, [second])
    after = plus.state[param]["basis"]
    assert torch.equal(after[1], basis[1])
    assert not torch.equal(after[0], basis[0])


@pytest.mark.parametrize("heads", [4, FUSED], ids=str)
def test_heads_serve_other_methods(heads: Any) -> None:
    param = Parameter(randn(24, 16))
    fira = Fira([{"params": [param], "rank": 4, "projector": "cross_head", "num_heads": heads}], update_proj_gap=3)
    feed(fira, param, grads((24, 16), 8))
    assert param.isfinite().all()


def request(matrix: Tensor, rank: int, seed: int, old: Tensor | None) -> Request:
    param = Parameter(torch.zeros_like(matrix))
    optimizer = GaLore([param], rank=rank, projector="cross_head", num_heads=4, head_select="first")
    plan = optimizer._planned()[0]
    scale, hyper = matrix.abs().amax(), optimizer._hyper(optimizer.param_groups[0])
    assert plan.view is not None
    return Request(matrix, scale, plan.view, plan.view, plan.layout, seed, old, hyper)


def found(one: Request) -> Tensor:
    return cross_head(sketch, [one])[0].basis


def test_the_iteration_captures_slow_spectra_cold_and_warm() -> None:
    def spectral(seed: int) -> Tensor:
        left, _, right = torch.linalg.svd(randn(1024, 256, seed=seed), full_matrices=False)
        return (left * torch.arange(1, 257) ** -0.5 @ right).contiguous()

    old, block = spectral(1)[:256], spectral(2)[:256]
    best = best_rank_energy(block, 32)
    first = found(request(torch.cat([old, block, old, old]), 32, 0, None))
    both = torch.cat([block, old, old, old])
    cold, warm = (captured_energy(block, found(request(both, 32, 1, start))) / best for start in (None, first))
    assert cold >= 0.99
    assert warm >= cold - 0.01


# ------------------------------------------------------------------------------------------------- the residual


@pytest.mark.parametrize("heads", [None, 4, FUSED], ids=str)
@pytest.mark.parametrize("stagger", [False, True])
def test_the_buffer_and_the_low_rank_moment_add_up_to_the_whole(heads: Any, stagger: bool) -> None:
    plus, param = build(dtype=torch.float64, num_heads=heads, residual_warmup=5, stagger=stagger)
    plus.add_param_group({"params": [other := Parameter(randn(24, 16, dtype=torch.float64))]})
    whole = torch.zeros(24, 16, dtype=torch.float64)
    for grad in grads((24, 16), 4):
        for one in (param, other):
            one.grad = grad.clone()
        plus.step()
        whole = 0.9 * whole + 0.1 * grad
        for one in (param, other):  # the other is refreshed in the middle of its warm-up where refreshes are staggered
            held = plus.state[one]
            bases = held["basis"] if held["basis"].ndim == 3 else held["basis"][None]
            sizes = [rows for rows, _ in FUSED] if isinstance(heads, list) else [24]
            back = torch.cat([m @ p.T for m, p in zip(held["exp_avg"].split(sizes), bases, strict=True)])
            torch.testing.assert_close(held["residual_avg"] + back, whole, rtol=1e-12, atol=1e-14)
    assert float(plus.state[other]["refreshes"]) == 1 + stagger


def test_the_support_is_the_largest_of_the_buffer_ascending_and_the_buffer_is_freed() -> None:
    plus, param = build(residual_density=0.13)
    seen = grads((24, 16), 4)
    feed(plus, param, seen[:2])
    held = plus.state[param]
    size = lambda: (24 * 16 * 4 if "residual_avg" in held else 50 * 12) + 4 * (16 * 4 + 2 * 24 * 4)  # noqa: E731
    assert held_bytes(plus, param) == plus.summary().state_bytes == size()
    basis, before = held["basis"], held["residual_avg"].double()
    error = seen[2].float() - (seen[2].float() @ basis) @ basis.T
    expected = (0.9 * before + 0.1 * error).abs().flatten().topk(50).indices.sort().values
    feed(plus, param, seen[2:3])
    index = held["residual_index"]
    assert index.dtype == torch.int32
    assert len(index) == round(0.13 * 24 * 16) == len(index.unique())
    assert torch.equal(index.long(), expected)
    assert "residual_avg" not in held
    for _ in range(2):
        assert held_bytes(plus, param) == plus.summary().state_bytes == size()
        feed(plus, param, seen[3:])
    assert torch.equal(held["residual_index"].long(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_at_the_support_are_stored_as_the_others(dtype: str) -> None:
    plus, param = build(state_dtype=dtype)
    feed(plus, param, grads((24, 16), 8))
    width = 4 if dtype == "float32" else 2
    assert held_bytes(plus, param) == 4 * 16 * 4 + 2 * 24 * 4 * width + 38 * (4 + 2 * width)


def test_the_additive_first_moment_takes_up_what_rotation_loses() -> None:
    plus, param = build(dtype=torch.float64, residual="additive")
    feed(plus, param, grads((24, 16), 5))
    held = plus.state[param]

    def first() -> Tensor:
        index = held["residual_index"].long()
        return held["residual_exp_avg"] + (held["exp_avg"] @ held["basis"].T).flatten()[index]

    before, grad = first(), grads((24, 16), 1, seed=7)[0]
    old = held["basis"].clone()
    feed(plus, param, [grad])  # a refresh
    assert overlap(old, held["basis"]) < 0.9
    expected = 0.9 * before + 0.1 * grad.flatten()[held["residual_index"].long()]
    torch.testing.assert_close(first(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("residual", WARM)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_a_zero_or_bad_gradient_poisons_nothing(residual: str, bad: float, at: int) -> None:
    plus, param = build(residual=residual)
    seen = [grad.float() for grad in grads((24, 16), 9)]
    seen[at][3, 5] = bad
    if not bad:
        seen[at].zero_()
    feed(plus, param, seen)
    assert param.isfinite().all()
    assert all(held.isfinite().all() for held in plus.state[param].values())
    assert len(plus.state[param]["residual_index"].unique()) == 38


@pytest.mark.parametrize("residual", WARM)
def test_bf16_weights_and_low_precision_gradients_move(residual: str) -> None:
    plus, param = build(dtype=torch.bfloat16, residual=residual)
    twin, exact = build(residual=residual)
    feed(plus, param, grads((24, 16), 12))
    feed(twin, exact, [grad.bfloat16().float() for grad in grads((24, 16), 12)])
    assert (param.float() - exact).norm() < 0.02 * exact.norm()


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("options", [{}, {"residual": "additive"}, {"num_heads": 4}, {"num_heads": FUSED}], ids=str)
@pytest.mark.parametrize("after", [0, 1, 3, 4, 7])
def test_resume_is_bit_exact_in_every_phase(options: dict[str, Any], after: int) -> None:
    seen = grads((24, 16), 12)
    whole, a = build(**options)
    feed(whole, a, seen)
    first, b = build(**options)
    feed(first, b, seen[:after])
    second = GaLorePlus([b], **{**EVERY, "residual_warmup": 3, **options})
    second.load_state_dict(reloaded(first))
    feed(second, b, seen[after:])
    assert torch.equal(a, b)
    for name, held in whole.state[a].items():
        assert torch.equal(held, second.state[b][name]), name


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("after", [2, 6])
def test_copies_continue_in_either_phase(clone: Callable[[Any], Any], after: int) -> None:
    seen = grads((24, 16), 9)
    plus, param = build(num_heads=4)
    feed(plus, param, seen[:after])
    twin, other = clone((plus, param))
    feed(plus, param, seen[after:])
    feed(twin, other, seen[after:])
    assert torch.equal(param, other)


def test_a_state_of_another_phase_may_be_loaded_over() -> None:
    early, _ = build()
    late, param = build()
    feed(late, param, grads((24, 16), 7))
    saved = reloaded(early)
    feed(early, early.param_groups[0]["params"][0], grads((24, 16), 1))
    saved = reloaded(early)
    late.load_state_dict(saved)
    assert "residual_avg" in late.state[param]
    feed(late, param, grads((24, 16), 9))
    assert "residual_index" in late.state[param]


def test_a_checkpoint_without_a_residual_is_refused() -> None:
    galore = GaLore([param := Parameter(randn(24, 16))], rank=4)
    feed(galore, param, grads((24, 16), 2))
    plus, _ = build()
    with pytest.raises(ValueError, match="the loaded state of parameter 0"):
        plus.load_state_dict(galore.state_dict())


def test_a_residual_may_be_switched_on_but_not_resized() -> None:
    plus, param = build(residual=None)
    feed(plus, param, grads((24, 16), 2))
    plus.param_groups[0]["residual"] = "exact"
    feed(plus, param, grads((24, 16), 4))
    assert "residual_index" in plus.state[param]
    plus.param_groups[0]["residual_density"] = 0.2
    with pytest.raises(ValueError, match="residual_index"):
        feed(plus, param, grads((24, 16), 1))


# --------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "dense"}, "Invalid residual: 'dense'"),
        ({"residual_density": 1.1}, "Invalid residual_density: 1.1"),
        ({"residual_warmup": 0}, "Invalid residual_warmup: 0"),
        ({"rule": "lion"}, "rule='lion'.*residual=None"),
        ({"compat": "official"}, "no authors' code"),
        ({"residual": "additive", "projector": "columns"}, "additive.*projector='sketch'"),
        ({"residual": "additive", "projector": "track"}, "additive.*projector='sketch'"),
        ({"num_heads": 5}, "24 rows, need a multiple of num_heads=5"),
        ({"num_heads": 0}, "Invalid num_heads: 0"),
        ({"num_heads": []}, r"Invalid num_heads: \[\]"),
        ({"num_heads": [(12, 5), (12, None)]}, "Invalid num_heads"),
        ({"num_heads": [(12, 3), (6, 1)]}, "cover 18 rows, the weight has 24"),
        ({"num_heads": [(20, 5), (4, None)]}, "rank=4 needs ranges of more rows"),
        ({"num_heads": FUSED, "rule": "adafactor", "residual": None}, "column statistics"),
        ({"num_heads": 4, "projector": "sketch"}, "with num_heads=4"),
        ({"projector": "cross_head"}, "with num_heads=None"),
        ({"num_heads": 4, "proj_type": "left"}, "chooses its own side"),
        ({"num_heads": 4, "head_select": "last"}, "Invalid head_select: 'last'"),
        ({"residual_densty": 0.1}, "did you mean|unexpected keyword"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build(**options)
    plus, _ = build()
    with pytest.raises(ValueError, match=message):
        plus.add_param_group({"params": [Parameter(randn(24, 16))], **options})
    assert len(plus.param_groups) == 1


def test_a_projected_gradient_is_refused() -> None:
    plus, param = build()
    feed(plus, param, grads((24, 16), 1))
    plus._low_grads[param] = randn(24, 4)
    with pytest.raises(NotImplementedError, match="residual=None"):
        plus.step()


# ------------------------------------------------------------------------------------------------------- groups


class Attention(nn.Module):
    def __init__(self, fused: str | None) -> None:
        super().__init__()
        if fused:
            setattr(self, fused, nn.Linear(16, 48 if fused == "Wqkv" else 32, bias=False))
        else:
            self.q_proj, self.k_proj = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
            self.v_proj = nn.Linear(16, 8, bias=False)


class Model(nn.Module):
    def __init__(self, fused: str | None = None, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.embed, self.attn = nn.Embedding(9, 16), Attention(fused)
        self.mlp, self.lm_head = nn.Linear(16, 24), nn.Linear(24, 9)


def test_head_groups_tell_queries_from_keys() -> None:
    model = Model(num_attention_heads=4, num_key_value_heads=2)
    plain, ordinary, queries, keys = head_groups(model, rank=4, update_proj_gap=7)
    assert [len(group["params"]) for group in (plain, ordinary, queries, keys)] == [4, 2, 1, 1]
    assert queries["params"][0] is model.attn.q_proj.weight
    assert (queries["num_heads"], keys["num_heads"], keys["update_proj_gap"]) == (4, 2, 7)
    assert "num_heads" not in ordinary
    for optimizer in (GaLorePlus, GaLore):
        groups = head_groups(model, rank=4)
        assert optimizer(groups).summary().projected == 4
    assert GaLorePlus(param_groups(model, rank=4)).summary().projected == 4


@pytest.mark.parametrize(
    ("name", "kind", "keys", "expected"),
    [
        ("qkv_proj", "phi3", 2, ((16, 4), (8, 2), (8, None))),
        ("Wqkv", "mpt", None, ((16, 4), (16, 4), (16, None))),
    ],
)
def test_fused_layers_are_told_by_the_model_type(name: str, kind: str, keys: Any, expected: Any) -> None:
    model = Model(name, model_type=kind, num_attention_heads=4, num_key_value_heads=keys)
    assert head_groups(model, rank=4)[-1]["num_heads"] == expected
    GaLorePlus(head_groups(model, rank=4)).summary()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model("qkv_proj", model_type="codegen", num_attention_heads=4), "no projected linear layer"),
        (Model(), "does not tell how many"),
        (nn.Sequential(nn.Linear(8, 9)), "no projected linear layer"),
    ],
)
def test_without_known_heads_the_line_to_write_is_told(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*write the groups yourself"):
        head_groups(model, rank=4)
