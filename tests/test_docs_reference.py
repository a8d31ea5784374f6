"""The reference is complete, and what the pages say in figures and defaults is what code and results say."""

from __future__ import annotations

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
    checked = 0
    for title, rows in tables((ROOT / "docs" / "migration.md").read_text(encoding="utf-8")):
        constructor = re.fullmatch(r"ours \(`([\w.]+)`\)", title[2]) if len(title) > 3 else None
        if constructor is None:
            continue
        defaults = defaults_of(constructor[1])
        for _, _, names, values, _ in rows:
            if names == "-" or not values or "(" in names:
                continue
            split = re.split(r", (?![^(]*\))", values)
            for name, value in zip(re.findall(r"`(\w+)`", names), split, strict=True):
                assert said(defaults[name]) == value, f"{constructor[1]}: {name}={defaults[name]!r}, not {value}"
                checked += 1
    assert checked > 80


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
    if name in MADE_FOR_YOU or (isinstance(found, type) and "__init__" not in vars(found)):
        assert documented <= parameters | INHERITED
    else:
        assert parameters <= documented <= parameters | (INHERITED if "options" in parameters else set())


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Titles and rows of every table."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield cells[0], cells[2:]


def defaults_of(path: str) -> dict[str, Any]:
    """Defaults of a constructor by name, those that it hands on included."""
    cls, _, method = path.partition(".")
    owner = getattr(lowmem.optim, cls)
    chain = [*([getattr(owner, method)] if method else []), *owner.__mro__]
    found: dict[str, Any] = {}
    for made in chain:
        parameters = inspect.signature(made).parameters
        found = {name: parameter.default for name, parameter in parameters.items()} | found
        if "options" not in parameters:
            break
    if owner is lowmem.optim.GaLore:  # None stands for what `compat` decides
        group = owner([nn.Parameter(torch.zeros(1))]).param_groups[0]
        hyper = Hyper.of(group)
        found |= {"carry": hyper.carry, "state_dtype": hyper.state_dtype}
    return found


def said(value: Any) -> str:
    """A default as the tables write it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(said, value))})"
    text = f"{value:g}" if isinstance(value, float) and 0 < value < 0.1 else str(value)
    return re.sub(r"^(\d)e-0(\d)$", r"\1e-\2", {"0.01": "1e-2", "0.001": "1e-3"}.get(text, text))
