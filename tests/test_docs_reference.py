"""The reference is complete, and what the pages say in figures and defaults is what code and results say."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lowmem.optim
import pytest
import torch
from lowmem.bench import plan_picture
from lowmem.optim.core.hyper import Hyper
from torch import nn

ROOT = Path(__file__).parents[1]

MADE_FOR_YOU = ("GradientRelease", "Matched")
"""Classes that a caller is handed and does not construct."""

INHERITED = set(inspect.signature(lowmem.optim.GaLore).parameters)


def test_defaults_in_the_tables_of_migration_are_those_of_the_code() -> None:
    checked = {"ours": 0, "theirs": 0}
    for title, rows in tables((ROOT / "docs" / "migration.md").read_text(encoding="utf-8")):
        for names, values in ((0, 1), (2, 3)) if len(title) == 5 else ():
            found = re.fullmatch(r"(ours|theirs) \(`([\w.]+)`(, as ours of that name)?\)", title[names])
            defaults = defaults_of(found[2]) if found else None
            if defaults is None:
                continue
            for row in rows:
                for name, value in written(row[names], row[values]):
                    assert said(defaults[name]) == value, f"{title[names]}: {name}={defaults[name]!r}, not {value}"
                    checked[found[1]] += 1
    assert checked["ours"] > 80
    assert checked["theirs"] > 35


def test_the_picture_of_memory_is_that_of_the_planner(tmp_path: Path) -> None:
    figures = json.loads((plan_picture.RESULTS / "memory_7b.json").read_text(encoding="utf-8"))
    assert list(figures) == list(plan_picture.METHODS)
    names = ["FRUGAL, density 0.25", "GaLore 8bit, r = 1024, release"]
    found = plan_picture.bars("7b", names)
    for bar in found:
        kept = {name: size for name, size in asdict(bar).items() if name != "rest"}
        assert kept == {name: figures[bar.name][name] for name in kept}
        assert bar.peak == pytest.approx(figures[bar.name]["peak"], rel=0.02)  # the workspace is the code's of its day
    plan_picture.picture(found, tmp_path / "memory.png", "two")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_measured_figures_of_choosing_are_those_of_the_results() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = {row[0]: row for title, table in tables(text) for row in table if "fine-tuning" in title[-2]}
    assert len(rows) == 7
    tuned = (plan_picture.RESULTS / "finetune.md").read_text(encoding="utf-8")
    points = {entry[0]: entry[3] for title, table in tables(tuned) if title[0] == "optimizer" for entry in table}
    trained = json.loads((plan_picture.RESULTS / "compare_all_tiny.json").read_text(encoding="utf-8"))
    runs = {run["label"]: run for run in trained}
    for name, row in rows.items():
        label = name.lower().replace("+", "plus").replace(" ", "")
        loss, state = (runs[label][key] / runs["adamw"][key] for key in ("val_loss_mean", "optimizer_state_bytes"))
        assert row[1:4] == [f"{100 * (loss - 1):+.1f} %", f"{100 * state:.1f} %", points[label]]


def test_times_of_choosing_are_those_of_the_results() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = {row[0]: row[4] for title, table in tables(text) for row in table if "fine-tuning" in title[-2]}
    figures = json.loads((plan_picture.RESULTS / "step_time_130m.json").read_text(encoding="utf-8"))
    (run,) = (run for run in figures["runs"] if run["settings"]["dtype"] == "fp32")
    steps = {step["name"]: step["plain"] / run["floors"]["products"] for step in run["projected"]}
    names = {"GaLore+": "GaLorePlus", "FRUGAL": "Frugal, columns", "Online Subspace Descent": "OnlineSubspaceDescent"}
    assert rows == {name: f"{steps[names.get(name, name)]:.2f}" for name in rows}
    fused, foreach = (steps[f"torch AdamW {form}"] for form in ("fused", "foreach"))
    assert f"torch's AdamW takes {fused:.2f} fused, {foreach:.2f} foreach" in text
    stalls = run["staggered"]["worst"] / run["staggered"]["median"]
    assert f"the worst step takes {stalls:.2f} times the median" in text


def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "api.py"), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "lowmem" / "optim.html").read_text(encoding="utf-8")
    missing = [name for name in lowmem.optim.__all__ if f'<section id="{name}">' not in page]
    assert missing == []
    assert 'id="GaLore.update"' not in page


@pytest.mark.parametrize("name", lowmem.optim.__all__)
def test_public_names_document_their_arguments(name: str) -> None:
    found = getattr(lowmem.optim, name)
    text = inspect.cleandoc(found.__doc__ or "")
    assert text
    section = re.match(r"(?: .*\n|\n)*", text.partition("Args:\n")[2] + "\n")
    documented = set(re.findall(r"^    (\w+): ", section[0] if section else "", flags=re.MULTILINE))
    parameters = set(inspect.signature(found).parameters)
    if name == "GaLore":
        assert documented == parameters  # those that all others share
    elif name in MADE_FOR_YOU or (isinstance(found, type) and "__init__" not in vars(found)):
        assert documented <= parameters | INHERITED
    else:
        assert parameters <= documented <= parameters | (INHERITED if "options" in parameters else set())


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Titles and rows of every table."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield cells[0], cells[2:]


def written(names: str, values: str) -> Iterator[tuple[str, str]]:
    """Names of arguments with their defaults, several in a cell; cells without a default, or of prose, have none."""
    if names.startswith("`") and "(" not in names and values not in ("", "needed"):
        yield from zip(re.findall(r"`(\w+)`", names), re.split(r", (?![^(]*\))", values), strict=True)


def defaults_of(path: str) -> dict[str, Any] | None:
    """Defaults of a constructor by name, those that it hands on included; None of a class that is not here."""
    package, _, name = path.rpartition(".")
    if package and package[0].islower():
        if importlib.util.find_spec(package.split(".")[0]) is None:
            return None
        made = getattr(importlib.import_module(package), name)
        return {key: parameter.default for key, parameter in inspect.signature(made).parameters.items()}
    cls, _, method = path.partition(".")
    owner = getattr(lowmem.optim, cls)
    found: dict[str, Any] = {}
    for made in [*([getattr(owner, method)] if method else []), *owner.__mro__]:
        parameters = inspect.signature(made).parameters
        found = {key: parameter.default for key, parameter in parameters.items()} | found
        if "options" not in parameters:
            break
    if owner is lowmem.optim.GaLore:  # None stands for what `compat` decides
        hyper = Hyper.of(owner([nn.Parameter(torch.zeros(1))]).param_groups[0])
        found |= {"carry": hyper.carry, "state_dtype": hyper.state_dtype}
    return found


def said(value: Any) -> str:
    """A default as the tables write it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(said, value))})"
    text = f"{value:g}" if isinstance(value, float) and 0 < value < 0.1 else str(value)
    return re.sub(r"^(\d)e-0(\d)$", r"\1e-\2", {"0.01": "1e-2", "0.001": "1e-3"}.get(text, text))
