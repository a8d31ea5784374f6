"""Several optimizers fine-tune the same weights: rates chosen on held-out texts, then more seeds of the best."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from shutil import rmtree

from rich.console import Console

from .errors import Diverged, UserError, did_you_mean
from .finetune_config import FinetuneConfig
from .finetune_data import load_texts
from .finetune_files import find_data, find_model
from .finetune_report import Row, markdown, table
from .optimizers import run_options
from .options import parse_options
from .out import ready_folder
from .rundir import Record, RunFolder, write_json
from .search import (
    Entry,
    Outcome,
    Result,
    Run,
    best,
    expand,
    first_runs,
    labels,
    parse_entry,
    refuse_repeats,
    repeat_runs,
)

GRIDS = {
    "adamw": "adamw lr=1e-4|3e-4|1e-3",
    "galore": "galore rank=8 update_proj_gap=20 lr=1e-3|3e-3|1e-2",
    "fira": "fira rank=8 update_proj_gap=20 lr=1e-3|3e-3|1e-2",
    "apollo": "apollo rank=8 update_proj_gap=20 lr=1e-3|3e-3|1e-2",
    "frugal": "frugal rank=8 update_proj_gap=20 lr=3e-4|1e-3|3e-3",
    "adafactor": "adafactor lr=3e-3|1e-2|3e-2",
    "galoreplus": "galoreplus rank=8 update_proj_gap=20 lr=1e-3|3e-3|1e-2",
    "onlinesubspacedescent": "onlinesubspacedescent rank=8 lr=1e-3|3e-3|1e-2",
    "flora": "flora rank=8 update_proj_gap=20 lr=3e-3|1e-2|3e-2",
    "random": "adamw init=random lr=3e-4|1e-3|3e-3",
}
"""Entries of `--optimizers`; `random` is AdamW from random weights, which tells what pre-training is worth."""

INITS = {"pretrained": True, "random": False}
TABLE_WIDTH = 170


@dataclass(frozen=True)
class Plan:
    """What the runs have in common, where they go, and the number of seeds of every best point."""

    shared: FinetuneConfig
    out: Path
    seeds: int


def published(names: str) -> list[Entry]:
    """Return the entries of `GRIDS` that `names` lists with commas between, `all`, or none for an empty string.

    Raises:
        UserError: If there is no entry of a name.
    """
    chosen = list(GRIDS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in GRIDS:
            raise UserError(
                f"--optimizers {name}: there is no grid.{did_you_mean(name, GRIDS)} Choose {', '.join(GRIDS)}"
            )
    return [parse_entry(GRIDS[name]) for name in chosen]


def finetune(entries: Sequence[Entry], plan: Plan) -> None:
    """Run every point of every entry, then the best by validation loss with more seeds; write a table and JSON.

    Finished runs of `plan.out` are reused. A point whose loss is no longer finite is infinitely bad, no failure.

    Args:
        entries: Optimizers with options, which may be grids, and `init=random` for random weights.
        plan: What the runs have in common.

    Raises:
        UserError: If there is no entry, one is wrong, files cannot be had or written, or a run failed.
    """
    if not entries:
        raise UserError('give an ENTRY, for example lowmem finetune adamw "galore lr=3e-3 rank=8", or --optimizers all')
    grids = [expand(entry) for entry in entries]
    refuse_repeats(point for grid in grids for point in grid)
    for point in (point for grid in grids for point in grid):
        configure(point, plan.shared)
    # The last seed and the texts must be valid before hours are spent.
    first = plan.shared.seed
    replace(plan.shared, seed=first + plan.seeds - 1)
    ready_folder(plan.out)
    model, data = find_model(plan.shared.model), find_data(plan.shared.data)
    load_texts(data, plan.shared.validation, plan.shared.test)
    digests = {"model": _digest(model), "data": _digest(data)}
    points = _run_all([first_runs(grid, first) for grid in grids], plan, digests)
    repeats = _run_all([repeat_runs(best(outcomes), plan.seeds) for outcomes in points], plan, digests)
    results = [Result(*parts) for parts in zip(entries, points, repeats, strict=True)]
    _report(results, plan)
    failed = [failure for result in results for failure in result.failures]
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first in {failed[0].run.folder}: {failed[0].error}")


def configure(point: Entry, shared: FinetuneConfig) -> FinetuneConfig:
    """Return the configuration of a point.

    Raises:
        UserError: If the optimizer or one of its options is unknown, or `init` has another value than its two.
    """
    texts = dict(point.texts)
    init = texts.pop("init", "pretrained")
    if init not in INITS:
        raise UserError(f"init={init}: write init=pretrained (default) or init=random")
    parse_options(point.optimizer, run_options(point.optimizer), texts)
    return replace(shared, optimizer=point.optimizer, options=texts, pretrained=INITS[init])


def _run_all(groups: Sequence[Sequence[Run]], plan: Plan, digests: Record) -> list[list[Outcome]]:
    console = Console(highlight=False, soft_wrap=True)
    total, number = sum(map(len, groups)), count(1)

    def attempt(run: Run) -> Outcome:
        head = f"[{next(number)}/{total}] {run.point.text} seed {run.seed}"
        try:
            outcome = Outcome(run, _run(run, plan, digests))
            accuracy = outcome.summary["val_accuracy"]
            text = f"validation loss {outcome.val_loss:.4f}, accuracy {100 * accuracy:.1f} %"
        except UserError as error:
            diverged = isinstance(error, Diverged)
            outcome = Outcome(run, error=str(error), diverged=diverged)
            text = f"{'diverged' if diverged else 'failed'}: {error}"
        console.print(f"{head}: {text}", markup=False)
        return outcome

    return [[attempt(run) for run in group] for group in groups]


def _run(run: Run, plan: Plan, digests: Record) -> Record:
    config = configure(run.point, replace(plan.shared, seed=run.seed))
    identity = {"config": config.to_json(), "digests": digests}
    folder = RunFolder(plan.out / run.folder)
    if not (folder.finished and folder.holds(identity)):
        if folder.finished:
            folder.check(identity, resume=False)
        # What an interrupted run left is worth less than a minute.
        rmtree(folder.path, ignore_errors=True)
        folder.start(identity)
        _start(folder)
    summary = folder.summary()
    if not math.isfinite(summary["val_loss"]):
        raise Diverged(f"the validation loss is {summary['val_loss']}: lower lr")
    return summary


def _start(folder: RunFolder) -> None:
    command = [sys.executable, "-m", "lowmem.bench.finetune_run", str(folder.path)]
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"the process ended with {child.returncode}"]
        kind = Diverged if child.returncode == Diverged.exit_code else UserError
        raise kind(lines[-1].removeprefix("lowmem: "))


def _digest(folder: Path) -> str:
    """Tell apart folders by the content of their files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _report(results: Sequence[Result], plan: Plan) -> None:
    shown = [result for result in results if result.finished]
    points = [result.finished[0].run.point for result in shown]
    rows = [
        Row(label, point.options, [outcome.summary for outcome in result.finished], plan.seeds)
        for label, point, result in zip(labels(points), points, shown, strict=True)
    ]
    facts = ("versions", "device", "parameters", "labels", "texts")
    write_json(
        plan.out / "finetune.json",
        {
            "config": plan.shared.to_json(),
            **({name: rows[0].summaries[0][name] for name in facts} if rows else {}),
            "optimizers": [
                {"label": row.label, **row.statistics, **_details(result)}
                for row, result in zip(rows, shown, strict=True)
            ],
            "failed": [result.to_json() for result in results if not result.finished],
        },
    )
    if rows:
        (plan.out / "finetune.md").write_text(markdown(rows), encoding="utf-8")
        console = Console()
        Console(width=None if console.is_terminal else TABLE_WIDTH).print(table(rows))


def _details(result: Result) -> Record:
    """Return every point and every seed of the best one with losses and accuracies."""
    values = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")

    def full(outcome: Outcome) -> Record:
        return {**outcome.to_json(), **{name: outcome.summary[name] for name in values if outcome.summary}}

    points, seeds = map(full, result.points), map(full, result.finished)
    return {"entry": result.entry.text, "points": list(points), "seeds": list(seeds)}
