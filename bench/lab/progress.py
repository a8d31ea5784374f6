"""Progress of an ablation: a bar with what runs on a terminal, a line for every run that ends elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from ..search import Outcome


class LabProgress:
    """Shows how many runs are finished, which ones are under way, and when all will be."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        """Take the number of all runs, and of those that were finished before."""
        self._console, self._total, self._done = console, total, done
        self._running: list[str] = []
        text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
        self._bar = Progress(*columns, text, console=console, disable=not console.is_terminal)
        # Runs take minutes to days: the usual window of 30 seconds would hold the end of none.
        self._bar.speed_estimate_period = 30 * 24 * 3600.0
        self._task = self._bar.add_task("", total=total, completed=done, text="")

    def __enter__(self) -> LabProgress:
        if self._done:
            self._say(f"{self._done} of {self._total} runs are there already")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, label: str) -> None:
        """Show a run that has been started."""
        self._running.append(label)
        self._show()

    def end(self, label: str, outcome: Outcome) -> None:
        """Show how a run ended."""
        self._running.remove(label)
        self._done += 1
        result = f"validation loss {outcome.val_loss:.4f}" if outcome.summary else outcome.error
        kind = "diverged: " if outcome.diverged else "failed: " if outcome.error else ""
        self._say(f"[{self._done}/{self._total}] {label}: {kind}{result}")
        self._bar.advance(self._task)
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, text="running " + ", ".join(self._running) if self._running else "")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)
