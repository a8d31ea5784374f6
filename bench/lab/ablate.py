"""`lowmem ablate`: every point of a grid with every seed, side by side, and one report of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..runs import raise_failures
from ..search import Outcome
from .execute import Executor, executor_of, run_all
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
        prune: Whether to delete weights and checkpoints of runs that are finished.
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
        UserError: If a point of the grid is no good (before anything runs), or runs failed (after all are through).
    """
    points = points_of(lab)
    trials = [Trial(point, run, settings.out) for point, run in all_runs(lab, points)]
    console = Console(highlight=False, soft_wrap=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    outcomes = [trial.known() for trial in trials]
    try:
        if settings.run and any(outcome.error == MISSING for outcome in outcomes):
            _run(trials, outcomes, settings, console)
    finally:
        if any(outcome.error != MISSING for outcome in outcomes):
            report(lab, trials, outcomes, settings.out, settings.command)
    raise_failures(failures(outcomes), len(outcomes))


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
            if settings.prune and outcomes[index].summary:
                trials[index].folder.prune()
            progress.end(trials[index].label, outcomes[index])
