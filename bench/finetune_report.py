"""The table of a fine-tuning comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from .rundir import Record
from .tables import markdown_table, terminal_table

COLUMNS = (
    "optimizer",
    "options",
    "test accuracy, %",
    "against first, points",
    "val accuracy, %",
    "state",
    "of matrices",
    "peak memory",
    "optimizer step",
    "whole step",
)


@dataclass(frozen=True)
class Row:
    """One optimizer: the summaries of its best point, one a seed, and the number of seeds that were wanted."""

    label: str
    options: str
    summaries: Sequence[Mapping[str, Any]]
    seeds: int

    @property
    def statistics(self) -> Record:
        """Means and sample standard deviations over seeds, medians of times, the largest peak above the start."""
        found: Record = {}
        for name in ("test_accuracy", "val_accuracy", "test_loss", "val_loss"):
            values = [summary[name] for summary in self.summaries]
            found[f"{name}_mean"] = fmean(values)
            found[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        for name in ("optimizer_step_s", "step_s"):
            found[name] = median(summary[name]["median"] for summary in self.summaries)
        for name in ("optimizer_state_bytes", "matrix_state_bytes", "peak_memory_bytes", "start_memory_bytes"):
            found[name] = max(summary[name] for summary in self.summaries)
        grown = (summary["peak_memory_bytes"] - summary["start_memory_bytes"] for summary in self.summaries)
        found["training_memory_bytes"] = max(grown)
        return found

    def difference(self, other: Row) -> tuple[float, float | None]:
        """Return mean and deviation of the test accuracy less the other's with the same seed, hence head and texts.

        Without a common seed both are not a number.
        """
        mine, theirs = ({s["config"]["seed"]: s["test_accuracy"] for s in row.summaries} for row in (self, other))
        values = [mine[seed] - theirs[seed] for seed in mine if seed in theirs] or [math.nan]
        return fmean(values), stdev(values) if len(values) > 1 else None


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the text of the table.

    Accuracies are in percent, their differences in points; peak memory is that above what the process had before it
    built the model.
    """
    lines: list[tuple[str, ...]] = []
    for row in rows:
        found = row.statistics
        missing = "" if len(row.summaries) == row.seeds else f" ({len(row.summaries)} of {row.seeds} seeds)"
        lines.append(
            (
                row.label,
                row.options,
                _percent(found["test_accuracy_mean"], found["test_accuracy_std"]) + missing,
                "" if row is rows[0] else _percent(*row.difference(rows[0]), sign="+"),
                _percent(found["val_accuracy_mean"], found["val_accuracy_std"]),
                decimal(found["optimizer_state_bytes"]),
                decimal(found["matrix_state_bytes"]),
                decimal(found["training_memory_bytes"]),
                f"{1e3 * found['optimizer_step_s']:.0f} ms",
                f"{1e3 * found['step_s']:.0f} ms",
            )
        )
    return lines


def _percent(mean: float, deviation: float | None, sign: str = "") -> str:
    text = f"{100 * mean:{sign}.1f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.1f}"


def table(rows: Sequence[Row]) -> Table:
    """Return the comparison for a terminal."""
    return terminal_table(COLUMNS, cells(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table."""
    return markdown_table(COLUMNS, cells(rows))
