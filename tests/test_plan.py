"""What training takes, told before it is allocated: formula, plan and allocation agree to the byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.bench.models import SHAPES, build_model
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
    head_groups,
    param_groups,
)
from lowmem.optim.plan import KINDS, Plan, Watch, by_kind, kind, plan
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers import randn
from tests.test_bench_commands import lowmem

RANK = 1024
SEVEN = SHAPES["7b"]
PROJECTED = [(SEVEN.hidden, SEVEN.hidden)] * 4 + [(SEVEN.ffn, SEVEN.hidden)] * 2 + [(SEVEN.hidden, SEVEN.ffn)]
PLAIN = [(SEVEN.vocabulary, SEVEN.hidden)] * 2 + [(SEVEN.hidden,)] * (2 * SEVEN.layers + 1)
FEW = SHAPES["tiny"]._replace(layers=2)


def formula(projected: list[tuple[int, int]], plain: list[tuple[int, ...]], rank: int, itemsize: int) -> dict[str, int]:
    """The one in the docstring of `lowmem.optim.plan`."""
    found = dict.fromkeys(KINDS, 0)
    for shape in projected:
        found["bases"] += itemsize * min(shape) * rank
        found["moments"] += 2 * max(shape) * rank
        found["scales"] += 8 * max(shape) * math.ceil(rank / 128)
    for shape in plain:
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        coded = len(shape) == 2 and rows * cols >= 4096 and cols >= 16
        found["moments"] += (2 if coded else 8) * rows * cols
        found["scales"] += 8 * rows * math.ceil(cols / 128) if coded else 0
    return found


def state(found: Plan) -> dict[str, int]:
    return {name: getattr(found, name) for name in KINDS}


def without_data(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


def galore(projected: list[Any], plain: list[Any], **options: Any) -> GaLore:
    groups = [{"params": plain}, {"params": projected, "rank": RANK}]
    return GaLore(groups, state_dtype="8bit", rounding="stochastic", **options)


@pytest.mark.slow
def test_the_formula_the_plan_and_a_step_agree_on_the_7b_model() -> None:
    matrices = without_data(torch.bfloat16, PROJECTED * SEVEN.layers)
    rest = without_data(torch.bfloat16, PLAIN)
    optimizer = galore(matrices, rest)
    expected = formula(PROJECTED * SEVEN.layers, PLAIN, RANK, itemsize=2)
    found = plan(optimizer)
    assert state(found) == expected
    assert found.state == optimizer.summary().state_bytes == sum(expected.values())
    assert not optimizer.state
    assert found.weights == found.gradients == 2 * sum(math.prod(s) for s in [*PROJECTED * SEVEN.layers, *PLAIN])
    assert found.largest_gradient == 2 * SEVEN.vocabulary * SEVEN.hidden

    for param in [*matrices, *rest]:
        if param in set(rest) or param in set(matrices[: len(PROJECTED)]):
            param.grad = torch.empty_like(param)
    with Watch():
        optimizer.step()
    stepped = by_kind(optimizer.state.values())
    assert stepped == formula(PROJECTED, PLAIN, RANK, itemsize=2)


@pytest.mark.slow
def test_a_7b_model_fits_a_card_of_24_gb_with_room_for_activations() -> None:
    with torch.device("meta"):
        model = build_model("7b", dtype=torch.bfloat16)
    groups = param_groups(model, rank=RANK)
    found = plan(GaLore(groups, state_dtype="8bit", rounding="stochastic"))
    assert found.total_released < 21e9
    assert plan(torch.optim.AdamW(model.parameters())).state == 2 * found.weights
    assert plan(AdamW8bit(model.parameters(), state_dtype="float32")).state == 4 * found.weights


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters()),
    "adamw8bit": lambda m: AdamW8bit(m.parameters(), rounding="compensated"),
    "galore": lambda m: GaLore(param_groups(m, rank=32), state_dtype="8bit", rounding="compensated8"),
    "galore-bnb8": lambda m: GaLore(param_groups(m, rank=32), state_dtype="bnb8"),
    "galore-track": lambda m: GaLore(param_groups(m, rank=32), projector="track", update_proj_gap=10),
    "galore-full": lambda m: GaLore(param_groups(m, rank=32, proj_type="full")),
    "galore-lazy": lambda m: GaLore(param_groups(m, rank=32), lazy=0.9, lr=torch.tensor(1e-3)),
    "galore-plus": lambda m: GaLorePlus(head_groups(m, rank=32)),
    "fira": lambda m: Fira(param_groups(m, rank=32)),
    "frugal": lambda m: Frugal(param_groups(m, density=0.25)),
    "frugal-randk": lambda m: Frugal(param_groups(m, density=0.25), projector="randk"),
    "frugal-blocks": lambda m: Frugal(param_groups(m, density=0.25), projector="blocks"),
    "online": lambda m: OnlineSubspaceDescent(param_groups(m, rank=32)),
    "lowrank-dct": lambda m: LowRank(param_groups(m, rank=32), projector="dct", residual="norm", carry="keep"),
    "flora": lambda m: Flora(param_groups(m, rank=32)),
    "adafactor": lambda m: Adafactor(m.parameters(), beta1=0.9, state_dtype="8bit"),
}


def small(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Two layers of the shapes of the smallest LLaMA, by torch alone."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            h, f = FEW.hidden, FEW.ffn
            self.q_proj, self.k_proj = nn.Linear(h, h, bias=False), nn.Linear(h, h, bias=False)
            self.up, self.down, self.norm = nn.Linear(h, f), nn.Linear(f, h, bias=False), nn.LayerNorm(h)

    model = nn.ModuleDict({"embed": nn.Embedding(FEW.vocabulary, FEW.hidden), "layers": nn.ModuleList()})
    model["layers"].extend(Layer() for _ in range(FEW.layers))  # type: ignore[operator]
    model.config = type("Config", (), {"num_attention_heads": 4})()  # type: ignore[assignment]
    return model.to(dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_is_what_a_step_allocates(name: str) -> None:
    model = small()
    optimizer = OPTIMIZERS[name](model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = plan(optimizer)
    assert not optimizer.state
    assert all(param.grad is None for param in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found.step.plain >= found.released.plain > 0
    for index, param in enumerate(model.parameters()):
        param.grad = randn(*param.shape, seed=index).to(param.dtype)
    optimizer.step()
    assert state(found) == by_kind(optimizer.state.values())
    allocated = sum(value.untyped_storage().nbytes() for value in tensors(optimizer) if value.ndim)
    assert abs(found.state - allocated) <= 4 * len(optimizer.state)  # numbers of no dimension: ages, limits, counts


def tensors(optimizer: Optimizer) -> list[Tensor]:
    return [value for held in optimizer.state.values() for value in held.values()]


def test_plans_do_not_depend_on_whether_there_is_data_or_state() -> None:
    model = small()
    optimizer = OPTIMIZERS["galore"](model)
    first = plan(optimizer)
    for index, param in enumerate(model.parameters()):
        param.grad = randn(*param.shape, seed=index).to(param.dtype)
    optimizer.step()
    assert plan(optimizer) == first
    with torch.device("meta"):
        assert plan(OPTIMIZERS["galore"](small())) == first


def test_weights_with_gaps_in_memory_are_planned() -> None:
    """As a slice of a fused weight is one, which torch does not copy with its gaps."""
    weight = nn.Parameter(randn(48, 40)[:, 4:36])
    optimizer = GaLore([weight, nn.Parameter(randn(9, 6)[:, :1])], rank=8)
    found = plan(optimizer, device="cpu")
    for index, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = randn(*param.shape, seed=index)
    optimizer.step()
    assert state(found) == by_kind(optimizer.state.values())


def test_the_buffers_of_a_bucket_are_in_what_a_step_allocates() -> None:
    weights = without_data(torch.bfloat16, [(512, 256)] * 3)
    found = plan(GaLore(weights, rank=64))
    assert found.step.buffers == 3 * 2 * 512 * 64 * 4
    assert found.released.buffers == 2 * 512 * 64 * 4
    assert found.step.plain >= found.step.buffers
    assert found.step.refresh is not None
    assert found.step.refresh >= found.step.buffers


def test_counting_sees_copies_and_not_what_was_there() -> None:
    weight = torch.empty(1000, device="meta")
    with Watch() as watch:
        weight.mul_(2.0)
        assert watch.now == watch.peak == 0
        copy = weight + 1
        view = copy[10:]
        del copy
        assert watch.now == 4000
        del view
        assert watch.now == 0
        assert (weight * 3).sum().item() == 1.0
    assert watch.peak == 4004


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exp_avg", "moments"),
        ("exp_avg_sq_scale", "scales"),
        ("basis_exp_avg", "moments"),
        ("basis_left", "bases"),
        ("correction", "corrections"),
        ("limit_norm", "other"),
    ],
)
def test_kinds_of_state(name: str, expected: str) -> None:
    assert kind(name) == expected


def test_ranks_that_are_open_are_refused() -> None:
    with pytest.raises(RuntimeError, match="rank='auto'"):
        plan(GaLore(without_data(torch.float32, [(64, 32)]), rank="auto", energy=0.9))


def test_the_command_prints_and_writes(tmp_path: Any) -> None:
    flags = ["--model=tiny", "--optimizer=galore", "--rank=32", "--state-dtype=8bit", "--out=plan.json"]
    run = lowmem("plan", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "peak, checkpointing, release" in run.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["options"] == {"rank": 32, "state_dtype": "8bit"}
    ours, fp32, theirs = written["plans"].values()
    assert ours["state"] == ours["moments"] + ours["bases"] + ours["scales"] < theirs["state"] < fp32["state"]
    assert ours["peak_released_checkpointing"] < ours["peak_checkpointing"] < ours["peak"] == written["peak"]
    assert theirs["peak_released"] is None
    assert written["fits"] is None


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Any) -> None:
    for flags, message in (
        (["--rank=auto", "--energy=0.9"], "cannot be planned"),
        (["--rnk=3"], "Did you mean --rank"),
        (["--dtype=x"], "--dtype is x: it must be fp32 or bf16"),
        (["--optimizer=adamw", "--release"], "adamw cannot step parameters one by one"),
        (["--budget=24ZB"], "takes a size such as 24GB or 24GiB"),
        (["--budget=1e999GB"], "takes a size such as 24GB or 24GiB"),
        (["--relase"], "unknown flag --relase. Did you mean --release"),
        (["--state=8bit", "--state-dtype=bnb8"], "--state is short for --state-dtype: give one of them"),
        (["--state"], "--state needs a value"),
        (["--out=."], "--out . is a folder: name a file"),
    ):
        run = lowmem("plan", "--model=tiny", *flags, cwd=tmp_path)
        assert run.returncode == 1
        assert message in run.stderr
        assert run.stderr.count("\n") == 1
        assert not run.stdout
