"""The static picture of an ablation: loss curves, loss by learning rate, loss by optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from ..report import COLOURS, MARKERS, Curve, draw, finish_losses, subplots
from ..rundir import Record

LINES = ("-", "--", ":")


def write_picture(path: Path, figures: Record) -> None:
    """Write the best point of every series as curves, all points by rate, and the best by bytes of state."""
    figure, axes = subplots(3)
    rows = [row for row in figures["rows"] if row["val_loss"] is not None]
    best = sorted((row for row in rows if row["best"]), key=lambda row: row["val_loss"])
    names = figures["series"]
    curves = [_curve(row, names) for row in best]
    for row, curve in zip(best, curves, strict=True):
        draw(axes[0], curve, *_style(row)[:2])
    if curves:
        finish_losses(axes[0], curves)
        axes[0].legend(frameon=False, fontsize=9)
    _rates(axes[1], rows, names)
    _states(axes[2], best, names)
    figure.savefig(path)


def front(rows: Sequence[Record]) -> list[Record]:
    """Return the rows to which no other is better in loss without more state, by bytes of state."""
    found: list[Record] = []
    for row in sorted(rows, key=lambda row: (row["state_bytes"], row["val_loss"])):
        if not found or row["val_loss"] < found[-1]["val_loss"]:
            found.append(row)
    return found


def _style(row: Record) -> tuple[str, str, str]:
    index = row["series"]
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index // len(COLOURS) % len(LINES)]


def _curve(row: Record, names: Sequence[str]) -> Curve:
    curve = row["curve"]
    band = (curve["low"], curve["high"]) if curve["low"] != curve["high"] else None
    train = (curve["train_tokens"], curve["train_loss"])
    return Curve(names[row["series"]], train, (curve["tokens"], curve["loss"]), band)


def _rates(axis: Any, rows: Sequence[Record], names: Sequence[str]) -> None:
    for index in range(len(names)):
        points = sorted((r["lr"], r["val_loss"], r["val_std"] or 0) for r in rows if r["series"] == index and r["lr"])
        if points:
            colour, marker, line = _style({"series": index})
            rates, losses, errors = zip(*points, strict=True)
            axis.errorbar(rates, losses, errors, color=colour, marker=marker, ls=line, markersize=5, capsize=3)
    axis.set(xlabel="learning rate", title="Validation loss by learning rate")
    axis.set_xscale("log")
    axis.grid(alpha=0.25)


def _states(axis: Any, best: Sequence[Record], names: Sequence[str]) -> None:
    edge = front(best)
    axis.step([r["state_bytes"] for r in edge], [r["val_loss"] for r in edge], where="post", color="#8C8C8C", lw=1)
    for row in best:
        colour, marker, _ = _style(row)
        axis.plot(row["state_bytes"], row["val_loss"], color=colour, marker=marker, markersize=7)
        text = {"xytext": (7, 4), "textcoords": "offset points", "fontsize": 9}
        axis.annotate(names[row["series"]], (row["state_bytes"], row["val_loss"]), **text)
    axis.set(xlabel="optimizer state (bytes)", title="Best validation loss by optimizer state")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.margins(x=0.2)
    axis.grid(alpha=0.25)
