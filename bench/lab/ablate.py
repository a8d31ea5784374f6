"""`lowmem ablate`: every point of a grid with every seed, side by side, and one report of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..errors import UserError, one_line
from ..runs import raise_failures
from ..search import Outcome
from .execute import Executor, executor_of, run_all
from .lock import locked
from .outcomes import MISSING, Trial, failures
from .points import all_runs, points_of
from .progress import LabProgress
from .report import report
from .spec import Lab


@dataclass(frozen=True)
class Settings:
    """How an ablation is run, none of which changes a result.

    Args:
        out: Folder of all runs and of the report.
        jobs: Runs at a time.
        executor: `processes` of this machine, or `ray`.
        save_every: Steps between checkpoints; 0 saves at the end only.
        prune: Whether to delete weights and checkpoints of runs that are finished, or have diverged.
        run: Whether to run what is missing, rather than to report what is there.
        command: What was written, for the report.
    """

    out: Path
    jobs: int = 1
    executor: str = "processes"
    save_every: int = 0
    prune: bool = False
    run: bool = True
    command: str = ""


def ablate(lab: Lab, settings: Settings) -> None:
    """Run what is missing of an ablation, and write its report.

    Runs that are finished, or have diverged, are not run again; unfinished ones go on from their checkpoint.

    Args:
        lab: The ablation.
        settings: How it is run.

    Raises:
        UserError: If a point of the grid is no good, another ablation works in the folder, or a report is asked for and
            there is nothing to report (before anything runs), or runs failed (after all are through).
    """
    points = points_of(lab)
    trials = [Trial(point, run, settings.out) for point, run in all_runs(lab, points)]
    with locked(settings.out) if settings.run else nullcontext():
        try:
            outcomes = [trial.known() for trial in trials]
        except OSError as error:
            raise UserError(f"--out {settings.out}: {one_line(error)}") from error
        _run_and_report(lab, settings, trials, outcomes)
    raise_failures(failures(outcomes), len(outcomes))


def _run_and_report(lab: Lab, settings: Settings, trials: Sequence[Trial], outcomes: list[Outcome]) -> None:
    try:
        if settings.run and any(outcome.error == MISSING for outcome in outcomes):
            _run(trials, outcomes, settings, Console(highlight=False, soft_wrap=True))
    finally:
        for trial, outcome in zip(trials, outcomes, strict=True) if settings.prune else ():
            if outcome.summary or outcome.diverged:
                trial.folder.prune()
        if any(outcome.error != MISSING for outcome in outcomes):
            report(lab, trials, outcomes, settings.out, settings.command)
        elif not settings.run:
            what = f"holds none of the {len(trials)} runs, such as {trials[0].run.folder}"
            raise UserError(f"--report-only: {settings.out} {what}; choose another --out, or leave --report-only out")


def _run(trials: Sequence[Trial], outcomes: list[Outcome], settings: Settings, console: Console) -> None:
    """Run what is missing, noting how it ended in `outcomes`."""
    missing = [index for index, outcome in enumerate(outcomes) if outcome.error == MISSING]
    tasks = [trials[index].task(settings.save_every) for index in missing]
    executor: Executor = executor_of(settings.executor, min(settings.jobs, len(missing)))
    with (
        LabProgress(console, len(trials), len(trials) - len(missing)) as progress,
        closing(run_all(tasks, executor, lambda number: progress.start(trials[missing[number]].label))) as ends,
    ):
        for number, end in ends:
            index = missing[number]
            outcomes[index] = trials[index].ended(end)
            if settings.prune and (outcomes[index].summary or outcomes[index].diverged):
                trials[index].folder.prune()
            progress.end(trials[index].label, outcomes[index])
