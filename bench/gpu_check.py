"""`lowmem gpu-check`: every kernel checked and timed, whole steps beside the neighbours', and a 7B model in 24 GB."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .errors import UserError
from .gpu_device import Bench, Budget
from .gpu_report import markdown, table, title
from .measure import device_name
from .out import ready_file

PARTS = ("kernels", "times", "steps", "graphs", "train")
"""In the order in which they run: what is right comes before what is fast."""
SHARES = {"rates": 0.1, "kernels": 0.3, "times": 0.12, "steps": 0.6, "graphs": 0.1}
"""Share of the time that a part may take."""
RESERVED = 0.3
"""Share that is kept for the last part."""
TABLE_WIDTH = 150
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "torchao", "galore-torch")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Args:
        interpret: On a CPU, in Triton's interpreter, on tiny shapes.
        minutes: Time for all parts.
        only: Parts to run, with commas; empty runs all.
    """

    interpret: bool = False
    minutes: float = 10.0
    only: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are asked for."""
        chosen = [part.strip() for part in self.only.split(",") if part.strip()] or PARTS
        unknown = [part for part in chosen if part not in PARTS]
        if unknown:
            raise UserError(f"--only {self.only}: {unknown[0]} is no part, choose from {', '.join(PARTS)}")
        return tuple(part for part in PARTS if part in chosen)


def gpu_check(settings: Settings, out: Path | None = None) -> bool:
    """Run all parts, write JSON and Markdown, print the table and tell whether everything went well."""
    parts = settings.parts
    bench = Bench(
        _device(settings), settings.interpret, Budget(settings.minutes, RESERVED if "train" in parts else 0.0)
    )
    name = device_name(bench.device)
    path = out or Path("bench/results") / f"gpu_check_{'interpreted' if settings.interpret else _slug(name)}.json"
    ready_file(path)
    figures: Figures = {
        "device": name,
        "interpreted": settings.interpret,
        "versions": _versions(),
        "minutes": settings.minutes,
        "parts": list(parts),
        "failures": [],
        **_hardware(bench.device),
    }
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    for part, run in {"rates": _rates, **{part: RUN[part] for part in parts}}.items():
        console.print(f"{part} ({bench.budget.used:.0f} s)", highlight=False)
        bench.budget.begin(SHARES.get(part))
        _survive(figures, part, lambda run=run: run(bench, figures))  # type: ignore[misc]
        figures["seconds"] = bench.budget.used
        _write(path, figures)
    console.print(title(figures), highlight=False)
    console.print(table(figures))
    for failure in figures["failures"]:
        console.print(f"failed: {failure['part']}: {failure['reason']}", style="red", highlight=False, markup=False)
    console.print(f"written: {path} and {path.with_suffix('.md')}", highlight=False)
    return not figures["failures"]


def _rates(bench: Bench, figures: Figures) -> None:
    bench.measure_rates()
    figures["rates"] = bench.rates


def _kernels(bench: Bench, figures: Figures) -> None:
    from .gpu_kernels import cases, find

    figures["correctness"] = []
    for case in cases(bench):
        row: Figures = {"op": case.op, "name": case.name}
        figures["correctness"].append(row)
        kernel = find(case.op)
        if kernel is None:
            row |= {"status": "missing", "reason": "this version has no such kernel"}
        elif bench.budget.left() < 1.0:
            row |= {"status": "skipped", "reason": "no time left"}
        else:
            row |= _checked(lambda case=case, kernel=kernel: case.check(kernel))  # type: ignore[misc]
        if row["status"] in ("wrong", "error"):
            figures["failures"].append({"part": f"{case.op} {case.name}", "reason": row["reason"]})


def _checked(check: Callable[[], Any]) -> Figures:
    try:
        found = check()
    except Exception as error:
        return {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
    shares = [one.error / one.tolerance if one.tolerance else float(one.error > 0) for one in found]
    figures = {"errors": {one.what: one.error for one in found}, "share": max(shares)}
    wrong = [f"{one.what} {one.error:.2e} > {one.tolerance:.0e}" for one in found if not one.fine]
    return figures | ({"status": "wrong", "reason": ", ".join(wrong)} if wrong else {"status": "right"})


def _times(bench: Bench, figures: Figures) -> None:
    from .gpu_times import measure

    figures["times"] = []
    for row in measure(bench):
        _note(figures, "times", row, f"{row['op']} {row['name']} {row['implementation']}")


def _steps(bench: Bench, figures: Figures) -> None:
    from .gpu_steps import measure
    from .gpu_targets import targets

    figures["steps"] = []
    for row in measure(bench):
        _note(figures, "steps", row, f"{row['optimizer']} {row['model']}")
    figures["targets"] = list(targets(figures["steps"]))


def _graphs(bench: Bench, figures: Figures) -> None:
    from .gpu_graphs import measure

    figures["graphs"] = []
    for row in measure(bench):
        _note(figures, "graphs", row, f"{row['optimizer']} {row['model']}")


def _note(figures: Figures, part: str, row: Figures, name: str) -> None:
    figures[part].append(row)
    if "error" in row:
        figures["failures"].append({"part": f"{part}: {name}", "reason": row["error"][:300]})


def _train(bench: Bench, figures: Figures) -> None:
    from .gpu_train import train

    figures["train"] = train(bench)
    if figures["train"]["failed"]:
        figures["failures"].append({"part": "train", "reason": figures["train"]["failed"]})


RUN: dict[str, Callable[[Bench, Figures], None]] = {
    "kernels": _kernels,
    "times": _times,
    "steps": _steps,
    "graphs": _graphs,
    "train": _train,
}


def _survive(figures: Figures, part: str, run: Callable[[], None]) -> None:
    """Run a part; what goes wrong in it is written down, and the next one runs."""
    try:
        run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        figures["failures"].append({"part": part, "reason": reason, "trace": traceback.format_exc()})
        if part == "train":
            figures[part] = {"error": reason}


def _device(settings: Settings) -> torch.device:
    if settings.interpret:
        if os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
            raise UserError("--interpret: Triton is imported already, set TRITON_INTERPRET=1 before")
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torchao compiles its steps, on a CPU for minutes
        torch.set_num_threads(1)  # on shared cores the threads of tiny operations only wait for each other
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "gpu-check needs an NVIDIA or AMD GPU that torch can use (torch.cuda.is_available() is False); "
            "--interpret runs every part on a CPU, without times that mean anything"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("gpu-check compiles its kernels: unset TRITON_INTERPRET, or pass --interpret")
    return torch.device("cuda", torch.cuda.current_device())


def _hardware(device: torch.device) -> Figures:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {"memory_bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _write(path: Path, figures: Figures) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(figures), encoding="utf-8")
