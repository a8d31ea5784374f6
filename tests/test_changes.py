"""Options and dtypes that change after the first step: state follows exactly, or the change is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.kernels.rounding import CORRECTIONS, converted, join, split
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Apollo,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdamW8bit,
    LowRank,
    full_precision_state_dict,
)
from torch import Tensor, nn

from tests.helpers import randn

Build = Callable[..., torch.optim.Optimizer]
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
MODES = ("nearest", "stochastic", "compensated", "compensated8")

OPTIMIZERS: dict[str, Build] = {
    "adamw": AdamW8bit,
    "galore": lambda p, **o: GaLore(p, rank=32, update_proj_gap=3, **o),
    "fira": lambda p, **o: Fira(p, rank=32, update_proj_gap=3, **o),
    "frugal": lambda p, **o: Frugal(p, density=0.5, update_proj_gap=3, **o),
    "flora": lambda p, **o: Flora(p, rank=32, **o),
    "adafactor": lambda p, **o: Adafactor(p, beta1=0.9, momentum_on="update", **o),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def trained(name: str, dtype: torch.dtype = BF16, steps: int = 4, **options: Any):
    weight = nn.Parameter((0.05 * randn(160, 96)).to(dtype))
    optimizer = OPTIMIZERS[name]([weight], lr=1e-2, **options)
    for seed in range(steps):
        step(optimizer, weight, seed)
    return optimizer, weight


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, seed: int = 99) -> None:
    weight.grad = randn(*weight.shape, seed=seed).to(weight.dtype)
    optimizer.step()


def value(optimizer: Any, weight: nn.Parameter) -> Tensor:
    return optimizer.full_precision(weight).clone()


@every
@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_a_change_of_rounding_moves_no_weight(name: str, before: str, after: str) -> None:
    """At rate 0 a weight keeps its value, up to what the new mode resolves, however many steps it takes."""
    optimizer, weight = trained(name, rounding=before)
    shown, kept = weight.detach().clone(), value(optimizer, weight)
    optimizer.param_groups[0].update(rounding=after, lr=0.0, weight_decay=0.0)
    for seed in range(5):
        step(optimizer, weight, seed)
    now = value(optimizer, weight)
    if after in CORRECTIONS and before in CORRECTIONS:
        coarse = "compensated8" in (before, after)
        assert (now - kept).abs().max() <= kept.abs().max() * 2.0 ** (-15 if coarse else -30)
    else:
        assert torch.equal(weight, shown)
    assert optimizer.state[weight].get("correction", torch.zeros(0)).dtype == CORRECTIONS.get(after, F32)


def test_a_correction_that_is_switched_on_works_from_the_next_step() -> None:
    optimizer, weight = trained("adamw", rounding="nearest", state_dtype="float32")
    exact = nn.Parameter(weight.detach().float())
    twin = AdamW8bit([exact], lr=1e-2, state_dtype="float32")
    twin.state[exact] = {k: v.clone() for k, v in optimizer.state[weight].items()}
    optimizer.param_groups[0]["rounding"] = "compensated"
    for seed in range(10, 30):
        weight.grad = randn(160, 96, seed=seed).to(BF16)
        exact.grad = weight.grad.float()
        optimizer.step()
        twin.step()
    assert (value(optimizer, weight) - exact).abs().max() < 1e-6


def test_an_unknown_rounding_is_refused_by_name_at_the_next_step() -> None:
    optimizer, weight = trained("galore")
    optimizer.param_groups[0]["rounding"] = "foo"
    with pytest.raises(ValueError, match="Invalid rounding: 'foo'; choose one of 'nearest'"):
        step(optimizer, weight)


@every
@pytest.mark.parametrize("after", ["float32", "8bit", "bnb8", "bfloat16"])
@pytest.mark.parametrize("before", ["float32", "8bit", "bnb8", "bfloat16"])
def test_moments_of_another_dtype_are_cast_and_of_another_code_refused(name: str, before: str, after: str) -> None:
    optimizer, weight = trained(name, dtype=F32, state_dtype=before)
    optimizer.param_groups[0]["state_dtype"] = after
    kept = weight.detach().clone()
    held = {key: state.clone() for key, state in optimizer.state[weight].items()}
    if before == after or {before, after} == {"float32", "bfloat16"}:
        step(optimizer, weight)
        assert optimizer.state[weight]["exp_avg"].dtype == {"bfloat16": BF16, "float32": F32}.get(
            after, held["exp_avg"].dtype
        )
        return
    with pytest.raises(ValueError, match=r"exp_avg of a \(160, 96\) parameter .* state_dtype cannot change so"):
        step(optimizer, weight)
    assert torch.equal(weight, kept)
    assert all(torch.equal(held[key], state) for key, state in optimizer.state[weight].items())
    optimizer.param_groups[0]["state_dtype"] = before
    step(optimizer, weight)


def test_codes_of_the_same_dtype_and_shape_are_told_apart() -> None:
    """A second moment alone, in short rows: nothing but the option tells the two codes apart."""
    weight = nn.Parameter(randn(96, 96))
    optimizer = LowRank([weight], rank=64, rule="rmsprop", betas=(0.0, 0.9), state_dtype="8bit")
    step(optimizer, weight)
    optimizer.param_groups[0]["state_dtype"] = "bnb8"
    with pytest.raises(ValueError, match=r"in another code, dynamic: .* cannot change so after the first step"):
        step(optimizer, weight)


@pytest.mark.parametrize(("before", "after"), [(None, "int8"), ("int8", None), ("int8", "int4"), ("int4", "int8")])
def test_bases_in_other_bits_are_refused(before: str | None, after: str | None) -> None:
    optimizer, weight = trained("galore", basis_dtype=before)
    optimizer.param_groups[0]["basis_dtype"] = after
    with pytest.raises(ValueError, match=r"basis of a \(160, 96\) parameter .* basis_dtype cannot change so"):
        step(optimizer, weight)


@pytest.mark.parametrize(("before", "after"), [("lion", "adamw"), ("adamw", "adafactor"), ("sgd", "rmsprop")])
def test_a_rule_whose_second_moment_would_start_at_an_old_count_is_refused(before: str, after: str) -> None:
    optimizer, weight = trained("galore", rule=before)
    optimizer.param_groups[0]["rule"] = after
    with pytest.raises(
        ValueError,
        match=f"is that of {before} on the right side, its group now says {after} .*: rule, .* cannot change so",
    ):
        step(optimizer, weight)


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("name", ["adamw", "galore", "fira", "flora"])
def test_a_model_that_is_cast_after_the_first_step_goes_on(name: str, rounding: str) -> None:
    optimizer, weight = trained(name, rounding=rounding)
    weight.data = weight.data.float()
    before = weight.detach().clone()
    for seed in range(5):
        step(optimizer, weight, seed)
    assert weight.isfinite().all()
    assert 0 < (weight - before).abs().max() < 0.5
    assert "correction" not in optimizer.state[weight]
    weight.data = weight.data.to(BF16)
    step(optimizer, weight)
    assert weight.isfinite().all()
    assert ("correction" in optimizer.state[weight]) == (rounding in CORRECTIONS)


def test_a_model_that_is_cast_to_fp16_is_refused_in_modes_that_it_does_not_have() -> None:
    optimizer, weight = trained("galore", rounding="compensated")
    weight.data = weight.data.half()
    with pytest.raises(TypeError, match=r"rounding=.compensated. is for bf16 weights, got torch\.float16"):
        step(optimizer, weight)
    plain, other = trained("galore")
    other.data = other.data.half()
    step(plain, other)
    assert other.isfinite().all()


def test_a_weight_of_another_shape_is_refused() -> None:
    optimizer, weight = trained("galore")
    weight.data = torch.zeros(80, 96, dtype=BF16)
    with pytest.raises(ValueError, match=r"of a \(80, 96\) parameter is .* cannot change so"):
        step(optimizer, weight)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"rank": 8}, {"rank": 16}),
        ({"rank": 8}, {"rank": None}),
        ({"proj_type": "left"}, {"proj_type": "right"}),
        ({"proj_type": "std"}, {"proj_type": "left"}),
        ({"projector": "columns"}, {"projector": "rows"}),
        ({"projector": "columns"}, {"projector": "dct"}),
        ({"projector": "descend"}, {"projector": "sketch"}),
        ({"rule": "rmsprop"}, {"rule": "adamw"}),
        ({"rule": "lion"}, {"rule": "sgd"}),
    ],
)
def test_a_refused_change_that_is_set_back_leaves_no_trace(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Numbers of the same shape may be those of another side, basis or rule: on a square matrix all are."""
    found = []
    for changes in (False, True):
        params = [nn.Parameter(randn(48, 48)), nn.Parameter(randn(48, 32))]
        optimizer = GaLore(params, **{"rank": 8, "lr": 1e-2, "update_proj_gap": 3, **before})
        for seed in range(6):
            for param in params:
                param.grad = randn(*param.shape, seed=seed)
            if changes and seed == 4:
                old = {name: optimizer.param_groups[0][name] for name in after}
                optimizer.param_groups[0].update(after)
                with pytest.raises(ValueError, match="cannot change so after the first step; set back"):
                    optimizer.step()
                optimizer.param_groups[0].update(old)
            optimizer.step()
        found.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_refused_change_opens_no_window_of_blocks() -> None:
    """The step that is refused would have opened one, which drops the state of what was active."""
    found = []
    for changes in (False, True):
        params = [nn.Parameter(randn(12, 8, seed=i)) for i in range(3)]
        optimizer = Frugal(params, projector="blocks", rank=1, update_proj_gap=2, carry="keep")
        for seed in range(5):
            for index, param in enumerate(params):
                param.grad = randn(*param.shape, seed=10 * seed + index)
            if changes and seed in (2, 3):
                optimizer.param_groups[0]["rule"] = "adafactor"
                with pytest.raises(ValueError, match="Invalid rule: 'adafactor'"):
                    optimizer.step()
                optimizer.param_groups[0]["rule"] = "adamw"
            optimizer.step()
        found.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("build", "before", "after", "message"),
    [
        (Fira, {"proj_type": "full", "scale_mode": "matrix"}, {"scale_mode": "row"}, "mixes the rows"),
        (Apollo, {"proj_type": "full", "scale_mode": "matrix"}, {"scale_mode": "row"}, "mixes the rows"),
        (
            LowRank,
            {"residual": "norm", "projector": "descend", "gamma": None},
            {"gamma": 1.01},
            "only nearly orthonormal",
        ),
        (Frugal, {}, {"free_rule": "freeze"}, "is for whole tensors"),
    ],
)
def test_options_that_depend_on_others_are_checked_when_they_change(
    build: Build, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    weight = nn.Parameter(randn(48, 32))
    optimizer = build([weight], rank=8, **before)
    step(optimizer, weight)
    optimizer.param_groups[0].update(after)
    with pytest.raises(ValueError, match=message):
        step(optimizer, weight)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_know_what_their_state_stands_for(how: Callable[[Any], Any]) -> None:
    weight = nn.Parameter(randn(96, 96))
    optimizer = LowRank([weight], rank=64, rule="rmsprop", betas=(0.0, 0.9), state_dtype="8bit")
    step(optimizer, weight)
    twin = how(optimizer)
    twin.param_groups[0]["state_dtype"] = "bnb8"
    with pytest.raises(ValueError, match="in another code, dynamic"):
        step(twin, twin.param_groups[0]["params"][0])


def test_a_failed_load_leaves_everything_as_it_was() -> None:
    other, _ = trained("galore", dtype=F32, weight_norm=True)
    optimizer, weight = trained("galore")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(TypeError, match="weight_norm=True scales weights in place"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(value, after["state"][0][name]) for name, value in before["state"][0].items())
    step(optimizer, weight)


def test_a_checkpoint_of_adam_with_decay_in_the_gradient_is_refused() -> None:
    weight = nn.Parameter(randn(8, 8))
    adam = torch.optim.Adam([weight], weight_decay=0.1)
    step(adam, weight)
    with pytest.raises(ValueError, match=r"torch.optim.Adam's with weight_decay=0\.1 in the gradient"):
        GaLore([weight], rank=None).load_state_dict(adam.state_dict())


def test_a_first_step_at_rate_zero_counts_where_any_gradient_is_not_zero() -> None:
    """LoRA under linear warm-up: the gradient of A is zero while B is, and the rate starts at zero."""
    found = []
    for build in (torch.optim.AdamW, lambda p, **o: GaLore(p, rank=None, **o)):
        params = [nn.Parameter(randn(8, 4)), nn.Parameter(torch.zeros(4, 8))]
        optimizer = build(params, lr=0.0)
        for seed in range(4):
            params[0].grad = randn(8, 4, seed=seed) * (seed > 0)
            params[1].grad = randn(4, 8, seed=seed)
            optimizer.param_groups[0]["lr"] = 1e-2 * seed
            optimizer.step()
        found.append(params)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_momentum_may_be_switched_on_and_off() -> None:
    weight = nn.Parameter(randn(96, 96))
    optimizer = GaLore([weight], rank=64, rule="sgd", betas=(0.0, 0.9), lr=1e-3)
    step(optimizer, weight)
    for momentum in (0.9, 0.0):
        optimizer.param_groups[0]["betas"] = (momentum, 0.9)
        step(optimizer, weight)
        assert ("exp_avg" in optimizer.state[weight]) == (momentum > 0)


def test_corrections_convert_between_eight_and_sixteen_bits() -> None:
    exact = randn(1000)
    weight, sixteen = split(exact)
    eight = converted(sixteen, torch.int8)
    assert ((join(weight, eight) - exact).abs() <= exact.abs() * 2.0**-15).all()
    assert torch.equal(converted(converted(eight, torch.int16), torch.int8), eight)
    assert torch.equal(join(weight, converted(eight, torch.int16)), join(weight, eight))
    edges = torch.tensor([-(2**15), 2**15 - 1, 0, -1, 127, 128], dtype=torch.int16)
    assert converted(edges, torch.int8).tolist() == [-128, 127, 0, 0, 0, 1]


@pytest.mark.parametrize(("saved", "here"), [("nearest", "compensated"), ("compensated", "stochastic")])
def test_a_checkpoint_of_another_compensation_is_refused(saved: str, here: str) -> None:
    optimizer, weight = trained("galore", rounding=saved)
    twin = GaLore([nn.Parameter(weight.detach().clone())], rank=32, update_proj_gap=3, rounding=here)
    with pytest.raises(ValueError, match=f"the checkpoint has rounding='{saved}', this optimizer rounding='{here}'"):
        twin.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_from_before_there_were_corrections_loads_with_none_to_add() -> None:
    optimizer, weight = trained("galore")
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["rounding"]
    param = nn.Parameter(weight.detach().clone())
    twin = GaLore([param], rank=32, update_proj_gap=3, rounding="compensated")
    twin.load_state_dict(saved)
    assert torch.equal(value(twin, param), weight.float())
    step(twin, param)
    assert twin.state[param]["correction"].any()


@pytest.mark.parametrize(
    ("build", "option"),
    [(Adafactor, "basis_dtype"), (Adafactor, "gemm_dtype"), (Flora, "basis_dtype")],
)
def test_a_numeric_option_that_an_optimizer_does_not_have_is_refused(build: Build, option: str) -> None:
    weight = nn.Parameter(randn(9, 9))
    with pytest.raises(ValueError, match=f"{option}='int8' is not an option of this optimizer: drop it; it has"):
        build([{"params": [weight], option: "int8"}], lr=1e-3)


def test_adafactor_has_the_backends_of_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = nn.Parameter(randn(40, 30))
    optimizer = Adafactor([weight], lr=1e-3, backend="triton")
    with pytest.raises(ValueError, match=r"has no .square_means. for torch\.float32 on cpu"):
        step(optimizer, weight)


@pytest.mark.parametrize(
    "switch",
    [{"amsgrad": True}, {"is_paged": True}, {"percentile_clipping": 5}, {"min_8bit_size": 1}, {"block_wise": False}],
)
def test_switches_of_bitsandbytes_are_taken_at_their_defaults_only(switch: dict[str, Any]) -> None:
    params = [nn.Parameter(randn(64, 64))]
    GaLoreAdamW8bit(params, 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, 32, None, 4096, 100, True, False)
    with pytest.raises(ValueError, match=f"{next(iter(switch))}=.* is not supported: drop it"):
        GaLoreAdamW8bit(params, **switch)


def test_full_precision_weights_are_asked_of_our_optimizers_only() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"got a AdamW, need an optimizer of lowmem.optim"):
        full_precision_state_dict(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
