"""The GPU check runs whole in the interpreter, sees what is wrong, and says what it needs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.bench import gpu_check as check
from lowmem.bench.errors import UserError
from lowmem.bench.gpu_compare import codes, equal, relative, written
from lowmem.bench.gpu_device import Bench, Budget
from lowmem.bench.gpu_graphs import compare, contenders, measure
from lowmem.bench.gpu_report import COLUMNS, markdown, rows
from lowmem.bench.gpu_report import _graph as graph_row
from lowmem.bench.gpu_steps import TINY_MODELS
from lowmem.bench.gpu_targets import targets
from lowmem.kernels import reference
from lowmem.kernels.blockwise import Blocks
from lowmem.kernels.rounding import Target
from lowmem.optim import GraphedStep
from torch import Tensor

from tests.helpers import randn
from tests.recorder import CpuGraphs, Pretend, on_device
from tests.test_bench_commands import lowmem

pytest.importorskip("triton")
# Imported after the check for Triton, whose kernels they look up.
from lowmem.bench.gpu_kernels import KERNELS, cases, find

STEPS = {
    "AdamW8bit",
    "GaLore fp32",
    "GaLore 8bit",
    "Fira 8bit",
    "Frugal",
    "Flora",
    "OnlineSubspaceDescent",
    "Adafactor",
}


def bench() -> Bench:
    return Bench(torch.device("cpu"), True, Budget(5, 0.0))


@pytest.mark.slow
def test_all_parts_run_in_the_interpreter(tmp_path: Any) -> None:
    run = lowmem("gpu-check", "--interpret", "--out=check.json", cwd=tmp_path)
    figures = json.loads((tmp_path / "check.json").read_text())
    assert figures["failures"] == []
    assert run.returncode == 0, run.stdout + run.stderr
    assert "times mean nothing" in run.stdout
    assert set(figures["rates"]) == {"copy", "bf16", "tf32", "fp32"}

    checked = {case["op"] for case in figures["correctness"] if case["status"] == "right"}
    missing = {case["op"] for case in figures["correctness"] if case["status"] == "missing"}
    assert checked | missing == set(KERNELS)
    assert checked >= {"adam", "adam_blockwise", "adamw_blockwise_", "lion_blockwise", "project_back_", "basis"}
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in figures["times"])
    assert {row["implementation"] for row in figures["times"]} == {"triton", "torch"}

    timed = {row["optimizer"] for row in figures["steps"] if "ms" in row}
    assert timed >= {*STEPS, "torch AdamW fused"}
    assert all("ms" in row or "missing" in row for row in figures["steps"])
    refreshed = {row["optimizer"] for row in figures["steps"] if row.get("refresh_ms")}
    assert refreshed >= {"GaLore fp32", "GaLore 8bit", "Fira 8bit", "Frugal"}
    train = figures["train"]
    assert train["failed"] is None
    assert train["losses"][-1] < train["losses"][0]
    assert train["unreleased_gradients"] == 0
    assert train["state"]["scales"] > 0

    text = (tmp_path / "check.md").read_text()
    assert text.count("\n| ") == len(rows(figures)) + 2
    assert "interpreted" in text.lower()


def test_time_that_runs_out_leaves_parts_out_and_says_so(tmp_path: Any) -> None:
    run = lowmem("gpu-check", "--interpret", "--minutes=0.1", "--only=kernels,steps", "--out=check.json", cwd=tmp_path)
    figures = json.loads((tmp_path / "check.json").read_text())
    assert run.returncode == 0, run.stdout + run.stderr
    assert figures["parts"] == ["kernels", "steps"]
    assert "train" not in figures
    skipped = [case for case in figures["correctness"] + figures["steps"] if "skipped" in (case.get("status"), *case)]
    assert skipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed_in_one_line(tmp_path: Any) -> None:
    run = lowmem("gpu-check", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "needs an NVIDIA or AMD GPU" in run.stderr
    assert "--interpret" in run.stderr


def test_parts_are_named() -> None:
    assert check.Settings(only="train, kernels").parts == ("kernels", "train")
    with pytest.raises(UserError, match="kernels, times, steps, graphs, train"):
        _ = check.Settings(only="speed").parts


def spoiled(op: str) -> Callable[..., Any]:
    """A kernel that is a little wrong: it forgets an entry."""
    right = getattr(reference, op)

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        if op == "square_means":
            return (found[0] * 1.01, found[1])
        if op == "project_back_":
            args[0].weight[0] = 0.0
        elif op == "adamw_blockwise_":
            args[2][1].codes[0] += 2
        else:
            args[-1 if op == "lion" else 3 if op.startswith("adam") else 2][0][0] = torch.nan
        return found

    return wrong


@pytest.mark.parametrize(
    "op", ["adam", "adam_blockwise", "adamw_blockwise_", "lion_blockwise", "project_back_", "square_means"]
)
def test_a_wrong_kernel_is_seen_and_the_specification_is_right(op: str) -> None:
    found = [case for case in cases(bench()) if case.op == op and "bfloat16" not in case.name][:4]
    assert found
    for case in found:
        assert check._checked(lambda case=case: case.check(spoiled(op)))["status"] == "wrong", case.name
        right = getattr(reference, op)
        assert check._checked(lambda case=case, right=right: case.check(right))["status"] == "right", case.name


def test_a_kernel_that_fails_and_a_part_that_fails_are_written_down() -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("no")

    row = check._checked(lambda: fails())
    assert row == {"status": "error", "reason": "ZeroDivisionError: no"}
    figures: dict[str, Any] = {"failures": []}
    check._survive(figures, "train", lambda: fails())
    assert figures["failures"][0]["reason"] == "ZeroDivisionError: no"
    assert figures["train"] == {"error": "ZeroDivisionError: no"}
    figures |= {"versions": {}, "device": "none", "interpreted": False, "seconds": 1.0}
    assert "ZeroDivisionError" in markdown(figures)
    assert len(rows(figures)[0]) == len(COLUMNS)


class Pretended(Bench):
    """A bench on a pretended device."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return on_device(super().normal(*shape, dtype=dtype))


def compared(name: str, graphs: Callable[[Any], Any]) -> dict[str, Any]:
    with Pretend():
        device = Pretended(torch.device("cpu"), True, Budget(5, 0.0))
        return compare(device, TINY_MODELS[0], contenders()[name], lambda o: GraphedStep(o, warmup=1, graphs=graphs(o)))


def test_captured_steps_are_compared_with_those_that_run() -> None:
    found = compared("Fira", CpuGraphs)
    assert found["difference"] == 0.0
    assert found["captures"] == 1
    assert found["replays"] == 8
    assert found["ms"] > 0
    assert found["eager_ms"] > 0
    text = graph_row({"optimizer": "Fira", "model": "tiny", "rank": 16, **found})
    assert "8 replays, 0.0e+00 apart" in text[-1]
    skipped = list(measure(bench()))
    assert len(skipped) == len(contenders())
    assert all(row["skipped"] == "needs a CUDA device" for row in skipped)


def test_a_graph_that_goes_astray_is_seen() -> None:
    class Standing(CpuGraphs):
        def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
            super().capture(step)
            return lambda: None

    found = compared("GaLore 8bit", Standing)
    assert found["error"].startswith("weights differ by")


def test_comparisons() -> None:
    one = randn(20, 30)
    assert relative("x", one, one, 1e-6).fine
    assert not relative("x", one * (1 + 1e-4), one, 1e-6).fine
    assert relative("x", one.clone().fill_(torch.nan), one, 1e-6).error == math.inf
    assert relative("x", one * 1.001, one, 1e-6, base=torch.zeros_like(one)).error == pytest.approx(1e-3, rel=1e-3)
    assert equal("x", one, one).fine
    assert not equal("x", one, one.flip(0)).fine
    blocks = Blocks(torch.ones(4, 300, dtype=torch.uint8), torch.ones(4, 3))
    moved = Blocks(blocks.codes.clone(), blocks.scale.clone())
    moved.codes[0, 0] = 2
    assert all(found.fine for found in codes("x", blocks, moved))
    moved.codes[0, 0] = 3
    assert not codes("x", blocks, moved)[0].fine
    weight = randn(20, 30).bfloat16()
    ours, theirs = Target(weight.clone()), Target(weight)
    assert written(ours, theirs, weight.float()).fine
    ours.weight[0, 0] *= 2
    assert not written(ours, theirs, weight.float()).fine


def test_shares_of_the_time() -> None:
    budget = Budget(1.0, 0.25)
    budget.begin(0.5)
    assert 29 < budget.left() <= 30
    budget.begin(0.9)
    assert 44 < budget.left() <= 45
    budget.begin(None)
    assert 59 < budget.left() <= 60


def test_kernels_that_a_version_lacks_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "adam", "triton_nothing")
    assert find("adam") is None
    assert find("project") is None
    assert find("basis") is not None


def test_targets_compare_steps_with_their_refreshes_counted_in() -> None:
    def row(optimizer: str, model: str, ms: float, refresh: float | None = None) -> dict[str, Any]:
        return {"optimizer": optimizer, "model": model, "ms": ms, "refresh_ms": refresh}

    rows = [row("GaLore fp32", "1b", 9.0, 109.0), row("torch AdamW fused", "1b", 9.5), row("GaLore fp32", "7b", 9.0)]
    rows += [row("galore-torch", "1b", 10.0, 20010.0), row("torch AdamW fused", "7b", 8.0)]
    first, second, third, fourth = targets(rows)
    assert (first["ratio"], first["met"]) == (pytest.approx(9.5 / 9.5), True)
    assert (second["ratio"], second["met"]) == (pytest.approx(9.5 / 110.0), True)
    assert (third["ratio"], third["met"]) == (pytest.approx(9.0 / 8.0), False)
    assert fourth["missing"] == "no time of galore-torch"
    text = markdown(
        {"targets": [first, third, fourth], "versions": {}, "device": "", "seconds": 0, "interpreted": False}
    )
    assert "1.000x: met" in text
    assert "1.125x: NOT MET" in text
