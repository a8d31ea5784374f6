"""Progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINES = 20


class RunProgress:
    """Shows loss, tokens/s, optimizer state and peak memory of a run."""

    def __init__(self, label: str, done: int, total: int) -> None:
        """Take the run's label, the steps that are done and those of the whole run."""
        self._console = Console(highlight=False, soft_wrap=True)
        self._label = label
        self._total = total
        self._every = max(1, total // LINES)
        # The text comes last: it is what a narrow terminal cuts.
        fixed = Column(no_wrap=True, min_width=7)
        text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(8), MofNCompleteColumn(table_column=fixed), TimeRemainingColumn(table_column=fixed), text)
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("", total=total, completed=done, text="")

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def due(self, step: int) -> bool:
        """Tell whether `show` has something to do at this step: the numbers that it shows need not be free."""
        return self._console.is_terminal or step % self._every == 0 or step == self._total

    def show(self, step: int, loss: float, tokens_per_s: float, state: int, peak: int) -> None:
        """Show the state of the run after `step` steps."""
        text = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  state {decimal(state)}  peak {decimal(peak)}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, text=text)
        else:
            self.note(f"{self._label} {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)
