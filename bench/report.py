"""Pictures and tables of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.filesize import decimal
from rich.table import Table

from .rundir import Record, RunFolder
from .tables import markdown_table, terminal_table

# Okabe and Ito's palette without its yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Curve:
    """Losses by tokens seen: of one run, or the mean of several with the lowest and highest validation losses."""

    label: str
    train: tuple[list[int], list[float]]
    held_out: tuple[list[int], list[float]]
    band: tuple[list[float], list[float]] | None = None


@dataclass(frozen=True)
class Row:
    """One entry in a comparison: the summary of its best point, and that point's validation losses over the seeds."""

    label: str
    options: str
    summary: Mapping[str, Any]
    losses: Sequence[float]
    seeds: int

    @property
    def statistics(self) -> Record:
        """Mean and sample standard deviation of the validation losses; one loss alone has no deviation."""
        deviation = stdev(self.losses) if len(self.losses) > 1 else None
        return {"val_loss_mean": fmean(self.losses), "val_loss_std": deviation}

    @property
    def val_loss(self) -> str:
        """The validation loss as text, with the number of seeds where it is not that of all."""
        mean, deviation = self.statistics.values()
        text = f"{mean:.4f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"
        return text if len(self.losses) == self.seeds else f"{text} ({len(self.losses)} of {self.seeds} seeds)"


def read_curve(folder: RunFolder, label: str) -> Curve:
    """Return the curve of a run folder."""
    series = []
    for kind in ("train", "eval"):
        records = folder.records(kind)
        series.append(([record["tokens"] for record in records], [record["loss"] for record in records]))
    return Curve(label, series[0], series[1])


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the curves of one configuration with several seeds."""
    first = curves[0]
    if len(curves) == 1:
        return first
    train, held_out = (np.array([getattr(curve, kind)[1] for curve in curves]) for kind in ("train", "held_out"))
    return replace(
        first,
        train=(first.train[0], train.mean(0).tolist()),
        held_out=(first.held_out[0], held_out.mean(0).tolist()),
        band=(held_out.min(0).tolist(), held_out.max(0).tolist()),
    )


def loss_picture(path: Path, curve: Curve) -> None:
    """Write the losses of one run."""
    figure, axes = subplots(1)
    _draw(axes[0], curve, COLOURS[0], MARKERS[0])
    _finish_losses(axes[0], [curve])
    figure.savefig(path)


def comparison_picture(path: Path, curves: Sequence[Curve], rows: Sequence[Row]) -> None:
    """Write all curves, and the optimizer states as bars beside them."""
    figure, axes = subplots(2, width_ratios=[2.2, 1])
    for index, curve in enumerate(curves):
        _draw(axes[0], curve, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
    _finish_losses(axes[0], curves)
    sizes = [row.summary["optimizer_state_bytes"] / 1e6 for row in rows]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(rows))]
    bars = axes[1].barh([row.label for row in rows], sizes, height=0.5, color=colours)
    axes[1].bar_label(bars, labels=[f"{size:,.3g}" for size in sizes], padding=3)
    axes[1].invert_yaxis()
    axes[1].margins(x=0.18)
    axes[1].set(xlabel="megabytes", title="Optimizer state")
    figure.savefig(path)


COLUMNS = (
    "optimizer",
    "options",
    "state",
    "state %",
    "peak memory",
    "val loss",
    "vs first",
    "optimizer step",
    "whole step",
    "tokens/s",
)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the text of the comparison's table; shares and differences are against the first row."""
    first, first_loss = rows[0].summary, rows[0].statistics["val_loss_mean"]
    table: list[tuple[str, ...]] = []
    for row in rows:
        summary = row.summary
        state = summary["optimizer_state_bytes"]
        table.append(
            (
                row.label,
                row.options,
                decimal(state),
                f"{100 * state / first['optimizer_state_bytes']:.1f} %" if first["optimizer_state_bytes"] else "-",
                decimal(summary["peak_memory_bytes"]),
                row.val_loss,
                f"{100 * (row.statistics['val_loss_mean'] / first_loss - 1):+.2f} %",
                f"{1e3 * summary['optimizer_step_s']['median']:.1f} ms",
                f"{1e3 * summary['step_s']['median']:.1f} ms",
                f"{summary['tokens_per_s']:,.0f}",
            )
        )
    return table


def comparison_table(rows: Sequence[Row]) -> Table:
    """Return the comparison for a terminal."""
    return terminal_table(COLUMNS, cells(rows))


def comparison_markdown(rows: Sequence[Row]) -> str:
    """Return the comparison as a Markdown table."""
    return markdown_table(COLUMNS, cells(rows))


def subplots(count: int, **layout: Any) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, side by side."""
    figure = Figure(figsize=(4 + 4 * count, 4.8), dpi=120, layout="constrained")
    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        axes = figure.subplots(1, count, squeeze=False, **layout)
    return figure, list(axes[0])


def _draw(axis: Any, curve: Curve, colour: str, marker: str) -> None:
    tokens, losses = curve.train
    width = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axis.plot(tokens[width - 1 :], smooth, color=colour, alpha=0.35, linewidth=1)
    if curve.band:
        axis.fill_between(curve.held_out[0], *curve.band, color=colour, alpha=0.2, linewidth=0)
    axis.plot(*curve.held_out, color=colour, marker=marker, markersize=5, linewidth=1.8, label=curve.label)


def _finish_losses(axis: Any, curves: Sequence[Curve]) -> None:
    axis.set(xlabel="tokens", ylabel="loss (nats a token)", title="Validation (marked) and training (thin) loss")
    # The first steps from random weights would flatten everything else.
    shown = [loss for curve in curves for series in (curve.band or curve.held_out[1:]) for loss in series]
    lowest = min(shown + [loss for curve in curves for loss in curve.train[1][-len(curve.train[1]) // 2 :]])
    highest = max(shown)
    margin = 0.06 * (highest - lowest) or 0.1
    axis.set_ylim(lowest - margin, highest + margin)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
