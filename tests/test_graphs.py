"""Steps that are captured once and replayed are those that run: by a stand-in for CUDA graphs on a pretended device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lowmem import optim
from lowmem.kernels import capture, pick, random
from lowmem.optim import GraphedStep
from lowmem.optim.core.lifecycle import Lifecycle
from torch import Tensor
from torch.nn import Parameter

from tests import recorder
from tests.helpers import randn
from tests.recorder import CpuGraphs, OnDevice, Pretend, on_device

SHAPES = ((24, 16), (16, 40), (24, 16), (7,), (3, 4, 5, 5))
LARGE = ((64, 72), (300, 24), (7,))
"""Of which moments are coded: the plain ones, those of a subspace of the second, and none."""
GAP = 5

Shapes = tuple[tuple[int, ...], ...]

Build = Callable[..., Lifecycle]

METHODS: dict[str, Build] = {
    "galore": optim.GaLore,
    "galore lion": lambda params, **o: optim.GaLore(params, rule="lion", **o),
    "galore sgd, both sides": lambda params, **o: optim.GaLore(params, rule="sgd", proj_type="full", **o),
    "galore rmsprop, track": lambda params, **o: optim.GaLore(params, rule="rmsprop", projector="track", **o),
    "galore columns, rotate": lambda params, **o: optim.GaLore(params, projector="columns", **o),
    "galore entries": lambda params, **o: optim.GaLore(params, projector="randk", carry="reset", **o),
    "galore int8 bases": lambda params, **o: optim.GaLore(params, basis_dtype="int8", **o),
    "galore lazy, ascending": lambda params, **o: optim.GaLore(params, lazy=0.0, maximize=True, **o),
    "galore stagger": lambda params, **o: optim.GaLore(params, stagger=True, **{**o, "update_proj_gap": 20}),
    "plain": lambda params, rank, **o: optim.GaLore(params, rank=None, **o),
    "plain, no form of torch": lambda params, rank, **o: optim.GaLore(params, rank=None, fused=False, **o),
    "plain lion": lambda params, rank, **o: optim.GaLore(params, rank=None, rule="lion", **o),
    "adamw 8 bit": lambda params, rank, update_proj_gap, **o: optim.AdamW8bit(params, **o),
    "galore plus": lambda params, **o: optim.GaLorePlus(params, residual_warmup=2, residual_density=0.1, **o),
    "galore plus additive": lambda params, **o: optim.GaLorePlus(
        params, residual="additive", residual_warmup=2, residual_density=0.1, **o
    ),
    "galore plus, all entries": lambda params, **o: optim.GaLorePlus(params, residual_density=1.0, **o),
    "galore plus, no entries": lambda params, **o: optim.GaLorePlus(params, residual=None, **o),
    "fira": optim.Fira,
    "fira matrix": lambda params, **o: optim.Fira(params, scale_mode="matrix", gamma=None, **o),
    "apollo": optim.Apollo,
    "apollo mini": lambda params, rank, **o: optim.Apollo.mini(params, **o),
    "frugal columns": lambda params, rank, **o: optim.Frugal(params, density=0.25, **o),
    "frugal sketch": lambda params, **o: optim.Frugal(params, projector="sketch", **o),
    "frugal complement": lambda params, **o: optim.Frugal(params, projector="sketch", free_space="complement", **o),
    "frugal sgd": lambda params, **o: optim.Frugal(params, projector="sketch", free_rule="sgd", **o),
    "frugal blocks": lambda params, rank, **o: optim.Frugal(params, density=0.4, projector="blocks", **o),
    "badam": lambda params, rank, **o: optim.BAdam(params, density=0.4, block_by="tensor", **o),
    "descent": lambda params, update_proj_gap, **o: optim.OnlineSubspaceDescent(params, **o),
    "descent lion": lambda params, update_proj_gap, **o: optim.OnlineSubspaceDescent(params, proj_rule="lion", **o),
    "low rank norm": lambda params, **o: optim.LowRank(params, residual="norm", **o),
    "low rank signs": lambda params, **o: optim.LowRank(params, residual="signsgd", projector="columns", **o),
    "low rank channel": lambda params, **o: optim.LowRank(params, residual="channel", **o),
}


class Run:
    """An optimizer on a pretended device, with gradients that stay where they are.

    Args:
        build: The optimizer.
        dtype: Of the weights.
        shapes: Of the weights.
        graphed: Step by `GraphedStep`.
        options: Those of the optimizer.
    """

    def __init__(
        self,
        build: Build,
        dtype: torch.dtype = torch.float32,
        shapes: Shapes = SHAPES,
        *,
        graphed: bool = False,
        **options: Any,
    ) -> None:
        self.params = [Parameter(on_device(randn(*shape, seed=i, dtype=dtype))) for i, shape in enumerate(shapes)]
        options = {
            "rank": 4,
            "update_proj_gap": GAP,
            "lr": on_device(torch.tensor(1e-2)),
            "capturable": True,
            **options,
        }
        with Pretend():
            self.optimizer = build(options.pop("groups", None) or self.params, **options)
        self.graphs = CpuGraphs(self.optimizer)
        self.graphed = GraphedStep(self.optimizer, graphs=self.graphs, warmup=1) if graphed else None

    def step(self) -> None:
        with Pretend():
            (self.graphed or self.optimizer.step)()

    def feed(self, seed: int, skip: Sequence[int] = ()) -> None:
        """Copy new gradients in, or make them, for all parameters but some."""
        for i, param in enumerate(self.params):
            grad = on_device(randn(*param.shape, seed=1000 * seed + i, dtype=param.dtype))
            if i in skip:
                continue
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)

    def train(self, steps: int, start: int = 0, skip: Sequence[int] = ()) -> None:
        """Step with a learning rate that changes where it is a tensor."""
        for number in range(start, start + steps):
            self.feed(number, skip)
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(1e-2 / (1 + number))
            self.step()

    def tensors(self) -> list[Tensor]:
        """Weights and state, counters of the host too."""
        held = (self.optimizer.state[param] for param in self.params)
        return [*self.params, *(value for state in held for _, value in sorted(state.items()))]


def pair(build: Build, dtype: torch.dtype = torch.float32, shapes: Shapes = SHAPES, **options: Any) -> tuple[Run, Run]:
    """The same optimizer, stepped and graphed."""
    one, other = copy.deepcopy(options), copy.deepcopy(options)
    return Run(build, dtype, shapes, **one), Run(build, dtype, shapes, graphed=True, **other)


def assert_same(one: Run, other: Run) -> None:
    for left, right in zip(one.tensors(), other.tensors(), strict=True):
        assert left.dtype == right.dtype
        assert left.ndim == 0 or left.isfinite().all()
        assert torch.equal(left, right)
    for mine, theirs in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        assert {**mine, "params": 0} == {**theirs, "params": 0}  # the windows of blocks are in them


def both(runs: tuple[Run, Run], steps: int, start: int = 0, skip: Sequence[int] = ()) -> int:
    """Train both, compare them, and tell how many steps of the second were replays."""
    before = runs[1].graphed.replays
    for run in runs:
        run.train(steps, start, skip)
    assert_same(*runs)
    return runs[1].graphed.replays - before


# ------------------------------------------------------------------------------------------------- trajectories

BF16 = (
    "galore",
    "galore entries",
    "plain",
    "galore plus",
    "fira",
    "apollo",
    "frugal columns",
    "frugal sketch",
    "badam",
)
FP64 = ("galore", "fira", "frugal sketch", "descent", "plain")


@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)
def test_replayed_steps_are_those_that_run(build: Build) -> None:
    runs = pair(build)
    assert both(runs, 2 * GAP) + both(runs, GAP, 2 * GAP) >= 3  # between refreshes, of which there are three


@pytest.mark.parametrize("name", BF16)
def test_replayed_steps_are_those_that_run_in_bf16(name: str) -> None:
    runs = pair(METHODS[name], torch.bfloat16, rounding="compensated")
    assert both(runs, 2 * GAP) >= GAP


ROUNDED = {
    "stochastic": {"rounding": "stochastic"},
    "24 bits": {"rounding": "compensated8"},
    "bf16 moments": {"state_dtype": torch.bfloat16},
    "8 bits": {"state_dtype": "8bit", "rounding": "stochastic"},
    "codes of bitsandbytes": {"state_dtype": "bnb8"},
}


@pytest.mark.parametrize("options", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("name", ["galore", "galore lion", "plain", "galore plus", "fira", "adamw 8 bit"])
def test_random_bits_of_a_replay_are_those_of_its_step(name: str, options: dict[str, Any]) -> None:
    options = {"rank": 16, **options}
    runs = pair(METHODS[name], torch.bfloat16, LARGE, **options)
    assert both(runs, 2 * GAP) >= GAP
    if options.get("state_dtype") in ("8bit", "bnb8"):
        assert any("exp_avg_scale" in held for held in runs[1].optimizer.state.values())
    ordinary = Run(METHODS[name], torch.bfloat16, LARGE, capturable=False, **options)
    ordinary.train(2 * GAP)
    for left, right in zip(ordinary.params, runs[1].params, strict=True):
        assert (left != right).float().mean() < 0.01  # where another rounding in fp32 turns one to bf16


@pytest.mark.parametrize("name", FP64)
def test_replayed_steps_are_those_that_run_in_fp64(name: str) -> None:
    runs = pair(METHODS[name], torch.float64, weight_decay=0.1)
    assert both(runs, 2 * GAP) >= GAP


@pytest.mark.parametrize("name", ["galore", "fira", "frugal sketch", "descent", "galore plus", "low rank signs"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_a_bad_gradient_in_a_replay_is_what_it_is_in_a_step(name: str, bad: float) -> None:
    runs = pair(METHODS[name])
    both(runs, GAP - 1)
    for run in runs:
        run.feed(GAP - 1)
        run.params[0].grad[3, 4] = bad
        run.params[1].grad.fill_(bad)
        run.step()
    assert_same(*runs)
    assert both(runs, GAP, GAP) > 0


@pytest.mark.parametrize("name", ["galore", "plain", "fira", "frugal sketch", "descent", "galore plus"])
def test_capturable_steps_are_those_of_the_ordinary_optimizer(name: str) -> None:
    runs = [Run(METHODS[name], torch.float64, capturable=flag) for flag in (False, True)]
    for run in runs:
        run.train(2 * GAP + 2)
    for left, right in zip(*(run.params for run in runs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)  # rates and counts are in fp32


def test_a_graph_that_froze_a_count_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedStep, "_check", lambda self: None)
    monkeypatch.setattr("lowmem.optim.core.lifecycle.check_capture", lambda optimizer: None)
    monkeypatch.setattr(recorder, "ASKS", ())
    runs = pair(optim.GaLore, capturable=False)
    with pytest.raises(AssertionError):
        both(runs, GAP)


@pytest.mark.parametrize(
    ("operation", "complaint"),
    [
        (lambda x: x.sum().item(), "asks a device"),
        (lambda x: bool(x.any()), "asks a device"),
        (lambda x: x.nonzero(), "asks a device"),
        (lambda x: x + torch.ones(3), "mixes devices"),
        (lambda x: x * torch.tensor(2.0, device=x.device), "copies from the host"),
    ],
    ids=["item", "if", "nonzero", "two devices", "copy"],
)
def test_what_no_graph_captures_is_seen(operation: Callable[[Tensor], Any], complaint: str) -> None:
    tensor = on_device(torch.ones(3))
    with pytest.raises(AssertionError, match=complaint), Pretend(), recorder.Recording(set(), set()):
        operation(tensor)


def test_a_recording_has_no_effect_and_its_replays_read_and_write_the_same_memory() -> None:
    one, other = on_device(torch.ones(3)), on_device(torch.zeros(3))
    recording = recorder.Recording(set(), set())
    with recording:
        other[1:].add_(one[1:] * 2)
        one.mul_(3)
    recording.undo()
    assert (one.tolist(), other.tolist()) == ([1, 1, 1], [0, 0, 0])
    one.fill_(2)
    recording.replay()
    recording.replay()
    assert (one.tolist(), other.tolist()) == ([18, 18, 18], [0, 16, 16])


# ------------------------------------------------------------------------------------ what is replayed, and when


def test_steps_run_until_one_is_captured_and_where_a_refresh_is_due() -> None:
    run = Run(optim.GaLore, graphed=True)
    seen = []
    for number in range(3 * GAP):
        run.train(1, number)
        seen.append((run.graphed.captures, run.graphed.replays, run.graphs.warmed))
    first = [(0, 0, 0), (0, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1)]
    later = [(1, 3 + 4 * n + k, 1) for n in range(2) for k in range(GAP)]
    assert seen == first + later


def test_groups_with_intervals_of_their_own_and_staggered_refreshes() -> None:
    def build(params: list[Parameter], **options: Any) -> Lifecycle:
        first = {"params": params[:2], "rank": 4, "update_proj_gap": 7}
        groups = [first, {"params": params[2:3], "rank": 4, "stagger": True}]
        return optim.GaLore([*groups, {"params": params[3:], "rank": None, "lr": 1e-3}], **options)

    runs = pair(build)
    assert both(runs, 16) == 16 - 6  # refreshes at 0, 2, 7, 12 and 14, and one step warms up


def test_frozen_parameters_and_gradients_that_come_and_go() -> None:
    runs = pair(optim.Fira)
    for run in runs:
        run.params[2].requires_grad_(False)
    assert both(runs, 4, skip=(2, 3)) == 2
    assert both(runs, 6, 4, skip=(2,)) == 3  # a bias joins at 4, a refresh is due at 5, one warms up
    for run in runs:
        run.params[1].grad = None
    assert both(runs, 5, 10, skip=(1, 2)) == 3
    assert runs[1].graphed.captures == 3


def test_options_that_change_are_captured_anew() -> None:
    runs = pair(optim.GaLore, lr=1e-2, update_proj_gap=50)
    assert both(runs, 6) == 4
    for number, change in enumerate(({"lr": 3e-3}, {"weight_decay": 0.3}, {"betas": (0.8, 0.99)}, {"scale": 1.0})):
        for run in runs:
            run.optimizer.param_groups[0].update(change)
        assert both(runs, 3, 6 + 3 * number) == 2
    assert runs[1].graphed.captures == 5


def test_another_parameter_and_another_group_are_captured_anew() -> None:
    runs = pair(optim.GaLore, update_proj_gap=50)
    both(runs, 4)
    for run in runs:
        run.params[0].data = on_device(run.params[0].data.clone())
        run.params.append(Parameter(on_device(randn(20, 12))))
        with Pretend():
            run.optimizer.add_param_group({"params": [run.params[-1]]})
    assert both(runs, 5, 4) == 3  # one makes state, one warms up


def test_ranks_that_gradients_choose() -> None:
    runs = pair(optim.GaLore, rank="auto", energy=0.8)
    assert both(runs, GAP) == GAP - 2


def test_gradients_that_moved_are_an_error_until_they_are_known() -> None:
    runs = pair(optim.GaLore, update_proj_gap=50)
    both(runs, 5)
    for run in runs:
        run.feed(5)
        for param in run.params:
            param.grad = param.grad.clone()
    runs[0].step()
    with pytest.raises(RuntimeError, match=r"no longer where the graph reads them.*step\.zero_grad\(\)"):
        runs[1].step()
    runs[1].graphed.reset()
    runs[1].step()
    assert both(runs, 3, 6) == 3
    runs[1].graphed.zero_grad()
    assert all(not param.grad.any() for param in runs[1].params)


def test_a_rate_of_the_host_that_always_changes_is_correct_and_told() -> None:
    runs = pair(optim.GaLore, lr=1e-2, update_proj_gap=50)
    schedulers = [torch.optim.lr_scheduler.LinearLR(run.optimizer, total_iters=50) for run in runs]

    def train() -> None:
        for number in range(14):
            assert both(runs, 1, number) == 0
            for scheduler in schedulers:
                scheduler.step()

    with pytest.warns(UserWarning, match=r"replays nothing, lr was another in 10 steps.*lr=torch\.tensor"):
        train()


def test_hooks_are_refused() -> None:
    run = Run(optim.GaLore, graphed=True)
    handle = run.optimizer.register_step_post_hook(lambda *_: None)
    run.train(2)
    with pytest.raises(RuntimeError, match=r"hooks of optimizer\.step would not run.*handle\.remove\(\)"):
        run.train(1, 2)
    handle.remove()
    run.train(1, 2)
    assert run.graphed.replays == 1
    handle = run.optimizer.register_step_pre_hook(lambda *_: None)  # after the capture
    with pytest.raises(RuntimeError, match=r"hooks of optimizer\.step would not run"):
        run.train(1, 3)
    handle.remove()
    run.train(1, 3)
    assert run.graphed.replays == 2


def test_a_basis_that_is_due_in_every_step_is_told() -> None:
    run = Run(optim.GaLore, graphed=True)

    def train() -> None:
        for number in range(50):
            run.feed(number)
            run.params[0].grad.zero_()
            run.step()

    with pytest.warns(UserWarning, match=r"replayed nothing in 50 steps, a basis was due in each.*param\.grad = None"):
        train()
    assert run.optimizer.skipped_refreshes() == 50


def test_an_optimizer_without_parameters_is_refused() -> None:
    optimizer = optim.GaLore([Parameter(randn(4, 4))], capturable=True)
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match=r"without parameters: add them, optimizer\.add_param_group"):
        GraphedStep(optimizer)


# ------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("name", ["galore", "fira", "descent", "galore plus", "plain"])
@pytest.mark.parametrize("at", [2, GAP, GAP + 3])
def test_resuming_from_a_replay_is_the_uninterrupted_run(name: str, at: int) -> None:
    whole, first = pair(METHODS[name])
    both((whole, first), at)
    saved = copy.deepcopy(first.optimizer.state_dict())
    later = Run(METHODS[name], graphed=True)
    for param, value in zip(later.params, first.params, strict=True):
        param.data.copy_(value)
    with Pretend():
        later.optimizer.load_state_dict(saved)
    assert both((whole, later), GAP + 2, at) > 0


def test_a_state_dict_that_is_loaded_is_captured_anew() -> None:
    runs = pair(optim.GaLore, update_proj_gap=50)
    both(runs, 4)
    saved = [copy.deepcopy(run.optimizer.state_dict()) for run in runs]
    both(runs, 3, 4)
    for run, state in zip(runs, saved, strict=True):
        with Pretend():
            run.optimizer.load_state_dict(state)
    assert both(runs, 4, 7) == 3
    assert runs[1].graphed.captures == 2


@pytest.mark.parametrize("name", ["galore", "descent", "galore plus", "frugal columns", "plain"])
@pytest.mark.parametrize("saves", [True, False])
def test_checkpoints_with_and_without_it_are_exchanged(name: str, saves: bool) -> None:
    one, other = Run(METHODS[name], capturable=saves), Run(METHODS[name], capturable=not saves)
    one.train(4)
    other.train(1)
    with Pretend():
        other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    assert_counts(other, on_device=saves)  # the option is the checkpoint's, as in torch.optim
    for param, value in zip(other.params, one.params, strict=True):
        param.data.copy_(value)
    other.train(2, 4)
    one.train(2, 4)
    assert_same(one, other)
    for group in other.optimizer.param_groups:
        group["capturable"] = not saves
    other.train(1, 6)
    assert_counts(other, on_device=not saves)


def assert_counts(run: Run, *, on_device: bool) -> None:
    """Counts that enter formulas lie where they should, those of schedules on the host."""
    for held in run.optimizer.state.values():
        for name, value in held.items():
            if name in ("step", "residual_step", "basis_step"):
                assert isinstance(value, OnDevice) == on_device
                assert float(value) > 0
            if name in recorder.HOST:
                assert not isinstance(value, OnDevice)


def test_a_loaded_group_without_it_is_told() -> None:
    run, other = Run(optim.GaLore, graphed=True), Run(optim.GaLore, capturable=False)
    for one in (run, other):
        one.train(2)
    with Pretend():
        run.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"group\['capturable'\] = True"):
        run.train(1, 2)
    for group in run.optimizer.param_groups:
        group["capturable"] = True
    run.train(3, 2)
    assert run.graphed.replays == 2


# ------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Build, dict[str, Any]]] = {
    "backend='compile'.*pass backend='auto'": (optim.GaLore, {"backend": "compile", "state_dtype": "8bit"}),
    "compat='official'.*pass compat=None": (optim.GaLoreAdamW, {}),
    "rule='adafactor'.*pass rule='adamw'": (optim.GaLore, {"rule": "adafactor"}),
    "proj_rule='adafactor'.*pass proj_rule='adam'": (optim.OnlineSubspaceDescent, {"proj_rule": "adafactor"}),
    "weight_norm=True.*pass weight_norm=False": (optim.GaLore, {"weight_norm": True}),
    "projector='dct'.*pass projector='columns'": (optim.GaLore, {"projector": "dct"}),
    r"num_heads=\[.*pass residual='exact'": (optim.GaLorePlus, {"num_heads": [(24, 2)], "residual": "additive"}),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items())
def test_numbers_of_the_host_are_refused_by_name(message: str, case: tuple[Build, dict[str, Any]]) -> None:
    build, options = case
    with pytest.raises(ValueError, match=f"capturable=True does not go with {message}"):
        build([{"params": [Parameter(randn(24, 16))], "rank": 2, "capturable": True}], **options)
    optimizer = build([{"params": [Parameter(randn(24, 16))], "rank": 2}], **options)
    with pytest.raises(ValueError, match="capturable"):
        GraphedStep(optimizer, graphs=CpuGraphs(optimizer))


@pytest.mark.parametrize("build", [optim.Adafactor, optim.Flora])
def test_optimizers_without_it_say_so(build: Build) -> None:
    with pytest.raises(ValueError, match="capturable=True is not supported by this optimizer"):
        build([{"params": [Parameter(randn(24, 16))], "capturable": True}])


def test_gradient_release_is_refused() -> None:
    model = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="capturable=True is for steps of all parameters"):
        optim.enable_gradient_release(model, optim.GaLore(model.parameters(), capturable=True))


def test_what_is_no_cuda_device_is_refused() -> None:
    params = [Parameter(randn(6, 4)), Parameter(torch.empty(6, 4, device="meta"))]
    with pytest.raises(RuntimeError, match=r"parameters are on cpu.*model\.to\('cuda'\)"):
        GraphedStep(optim.GaLore(params[:1], rank=2, capturable=True))
    with pytest.raises(ValueError, match="got parameters on cpu, meta"):
        GraphedStep(optim.GaLore(params, rank=2, capturable=True))
    with pytest.raises(TypeError, match="got a AdamW"):
        GraphedStep(torch.optim.AdamW(params[:1], capturable=False))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid warmup: 0"):
        GraphedStep(optim.GaLore(params[:1], rank=2, capturable=True), warmup=0)


@pytest.mark.parametrize(("options", "message"), [({}, "capturable=True"), ({"capturable": True}, "GraphedStep")])
def test_a_capture_that_could_not_be_replayed_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    param = Parameter(randn(24, 16))
    param.grad = randn(24, 16, seed=1)
    optimizer = optim.GaLore([param], rank=4, **options)
    monkeypatch.setattr("lowmem.optim.core.schedule.capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"captured in a CUDA graph.*{message}"):
        optimizer.step()
    assert not optimizer.state


# ---------------------------------------------------------------------------------------- numbers of kernels


def test_numbers_of_a_captured_kernel_are_those_of_a_launch() -> None:
    common = pytest.importorskip("lowmem.kernels.triton_common")
    words = tuple(common.pack(torch.device("cpu"), [0.5, -1e-3, 0.0], [7, -1, 1 << 31]).tolist())
    assert capture.constant(words, torch.device("cpu")).tolist() == list(words)
    with capture.sharing():
        assert capture.constant(words, torch.device("cpu")) is capture.constant(words, torch.device("cpu"))
    assert capture.constant(words, torch.device("cpu")) is not capture.constant(words, torch.device("cpu"))


def test_seeds_on_a_device_are_those_of_the_host() -> None:
    seeds = random.mix(1, 1 << 31, 40, 7), random.mix(1, 1 << 31, torch.tensor(40.0), 7)
    assert isinstance(seeds[1], Tensor)
    assert seeds[0] == int(seeds[1])
    for large in (*seeds, (1 << 32) - 5, torch.tensor((1 << 32) - 5)):
        assert 0 <= int(large) < 1 << 32
    for one, other in (seeds, ((1 << 32) - 5, torch.tensor((1 << 32) - 5))):
        assert torch.equal(random.noise(one, range(2, 9), range(1, 6)), random.noise(other, range(2, 9), range(1, 6)))
        cells = torch.arange(9)[:, None], torch.arange(4)
        assert torch.equal(random.noise_at(one, *cells), random.noise_at(other, *cells))
        common = pytest.importorskip("lowmem.kernels.triton_common")
        packed = [common.pack(torch.device("cpu"), [0.5], [3, seed]) for seed in (one, other)]
        assert torch.equal(*packed)


@pytest.mark.parametrize("options", [{"state_dtype": "8bit", "rounding": "stochastic"}, {"rounding": "compensated8"}])
def test_kernels_of_triton_take_counts_seeds_and_rates_as_tensors(options: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    found = []
    for capturable in (False, True):
        params = [Parameter(randn(*shape, seed=i, dtype=torch.bfloat16)) for i, shape in enumerate(LARGE[:2])]
        groups = [{"params": params[:1]}, {"params": params[1:], "rank": 16}]
        rate = torch.tensor(1e-3)
        optimizer = optim.GaLore(groups, lr=rate, capturable=capturable, backend="triton", **options)
        for number in range(3):
            for i, param in enumerate(params):
                param.grad = randn(*param.shape, seed=10 * number + i, dtype=param.dtype)
            optimizer.step()
        found.append([*params, *(value for held in optimizer.state.values() for value in held.values())])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_adam_takes_counts_as_tensors(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    found = []
    for t in (3, torch.tensor(3.0)):
        grad, first, second, out = (randn(8, 8, seed=seed).abs_() for seed in range(4))
        pick("adam", grad, backend)([grad], ([first], [second]), [t], [out], (0.9, 0.999), 1e-8)
        found.append((first, second, out))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0)
