"""Several optimizers on the same model, data and budget, each run in a process of its own."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from rich.console import Console

from .config import RunConfig
from .errors import Diverged, UserError
from .optimizers import run_options
from .options import parse_options
from .out import ready_folder
from .report import Row, comparison_markdown, comparison_picture, comparison_table, mean_curve, read_curve
from .rundir import Record, RunFolder, write_json
from .runs import failure, identity_of, pretrain_words, raise_failures
from .search import Entry, Outcome, Result, Run, best, expand, first_runs, labels, refuse_repeats, repeat_runs

TABLE_WIDTH = 160


@dataclass(frozen=True)
class Plan:
    """What the runs of a comparison have in common, and how many seeds the best points get."""

    shared: RunConfig
    out: Path
    seeds: int = 1
    save_every: int = 0


def compare(entries: Sequence[Entry], plan: Plan) -> None:
    """Run every point of every entry, then the best ones with more seeds; write table, picture and JSON.

    Finished runs of `plan.out` are reused. A point whose loss is no longer finite is infinitely bad, no failure.

    Args:
        entries: The entries, whose options may be grids; the first one is the reference of the table.
        plan: What the runs have in common.

    Raises:
        UserError: If there is no entry, a point is there twice, `plan.out` cannot be written to, or runs failed that
            the comparison needs.
    """
    if not entries:
        raise UserError('give an ENTRY, for example lowmem compare adamw "galore lr=1e-2|2e-2", or --optimizers all')
    grids = [expand(entry) for entry in entries]
    refuse_repeats(point for grid in grids for point in grid)
    seed = plan.shared.seed
    # The last seed must be valid before hours are spent on the first.
    replace(plan.shared, seed=seed + plan.seeds - 1)
    ready_folder(plan.out)
    points = _run_all([first_runs(grid, seed) for grid in grids], plan)
    repeats = _run_all([repeat_runs(best(outcomes), plan.seeds) for outcomes in points], plan)
    results = [Result(*parts) for parts in zip(entries, points, repeats, strict=True)]
    _report(results, plan)
    failures = [outcome for result in results for outcome in result.failures]
    raise_failures(failures, sum(len(result.points) + len(result.repeats) for result in results))


def _run_all(groups: Sequence[Sequence[Run]], plan: Plan) -> list[list[Outcome]]:
    console = Console(highlight=False, soft_wrap=True)
    total, number = sum(map(len, groups)), count(1)

    def attempt(run: Run) -> Outcome:
        seed = f" seed {run.seed}" if run.seed != plan.shared.seed else ""
        console.print(f"[{next(number)}/{total}] {run.point.text}{seed}", markup=False)
        try:
            return Outcome(run, _run(run, plan, console))
        except UserError as error:
            diverged = isinstance(error, Diverged)
            console.print(f"{'diverged' if diverged else 'failed'}: {error}", markup=False)
            return Outcome(run, error=str(error), diverged=diverged)

    return [[attempt(run) for run in group] for group in groups]


def _run(run: Run, plan: Plan, console: Console) -> Record:
    name = run.point.optimizer
    options = parse_options(name, run_options(name), run.point.texts)
    config = replace(plan.shared, seed=run.seed, optimizer=name, options=options)
    folder = RunFolder(plan.out / run.folder)
    if folder.finished and folder.holds(identity_of(config)):
        console.print(f"{folder.path} holds this run already", markup=False)
    else:
        _train(run, config, folder, plan.save_every)
    summary = folder.summary()
    if not math.isfinite(summary["val_loss"]):
        raise Diverged(f"the validation loss is {summary['val_loss']}: lower --lr")
    return summary


def _train(run: Run, config: RunConfig, folder: RunFolder, save_every: int) -> None:
    command = [sys.executable, *pretrain_words(config, run.point.flags, folder, save_every)]
    sys.stdout.flush()
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise failure(child.returncode, child.stderr)
    sys.stderr.write(child.stderr)


def _report(results: Sequence[Result], plan: Plan) -> None:
    shown = [result for result in results if result.finished]
    points = [result.finished[0].run.point for result in shown]
    rows = [
        Row(label, point.options, r.finished[0].summary, [outcome.val_loss for outcome in r.finished], plan.seeds)
        for label, point, r in zip(labels(points), points, shown, strict=True)
    ]
    listed = [
        {"label": row.label, "folder": r.finished[0].run.folder, **row.summary, **row.statistics, **r.to_json()}
        for row, r in zip(rows, shown, strict=True)
    ]
    failed = [{"label": r.entry.text, **r.to_json()} for r in results if not r.finished]
    write_json(plan.out / "compare.json", listed + failed)
    if not rows:
        return
    curves = [
        mean_curve([read_curve(RunFolder(plan.out / outcome.run.folder), row.label) for outcome in r.finished])
        for row, r in zip(rows, shown, strict=True)
    ]
    comparison_picture(plan.out / "compare.png", curves, rows)
    (plan.out / "compare.md").write_text(comparison_markdown(rows), encoding="utf-8")
    console = Console()
    table = Console(width=None if console.is_terminal else TABLE_WIDTH)
    table.print(comparison_table(rows))
    table.print(f"picture: {plan.out / 'compare.png'}", markup=False, highlight=False, soft_wrap=True)
