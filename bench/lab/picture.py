"""The static picture of an ablation: loss curves, loss by learning rate, loss by optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter

from ..report import COLOURS, MARKERS, subplots
from ..rundir import Record

LINES = ("-", "--", ":")
INSIDE, NAMED = 6, 12
"""Series that a picture names inside its axes, and at all; more names would cover it."""


def write_picture(path: Path, figures: Record) -> None:
    """Write the best point of every series as curves, all points by rate, and the best by bytes of state."""
    figure, axes = subplots(3)
    rows = [row for row in figures["rows"] if row["val_loss"] is not None]
    best = sorted((row for row in rows if row["best"]), key=lambda row: row["val_loss"])
    names = [name.replace("$", r"\$") for name in figures["series"]]  # between two of them would be mathematics
    _curves(axes[0], best, names)
    _rates(axes[1], [row for row in rows if row["lr"] and not row["diverged"]])
    _states(axes[2], best, names)
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(path)


def front(rows: Sequence[Record]) -> list[Record]:
    """Return the rows of the Pareto front, by bytes of state: no other has less loss without more state."""
    found: list[Record] = []
    for row in sorted(rows, key=lambda row: (row["state_bytes"], row["val_loss"])):
        if not found or row["val_loss"] < found[-1]["val_loss"]:
            found.append(row)
    return found


def style(series: int) -> dict[str, Any]:
    """Return colour, marker and dash of a series, which tell it from all others."""
    index, dash = series % len(COLOURS), series // len(COLOURS) % len(LINES)
    return {"color": COLOURS[index], "marker": MARKERS[(index + dash) % len(MARKERS)], "ls": LINES[dash], "lw": 1.8}


def _curves(axis: Any, best: Sequence[Record], names: Sequence[str]) -> None:
    shown: list[float] = []
    for place, row in enumerate(best):
        look, label = style(row["series"]), names[row["series"]] if place < NAMED else None
        # A loss that is not finite is None, and leaves a gap.
        mean, low, high = (np.array(row["curve"][name], dtype=float) for name in ("loss", "low", "high"))
        axis.plot(row["curve"]["tokens"], mean, markersize=5, label=label, **look)
        axis.fill_between(row["curve"]["tokens"], low, high, color=look["color"], alpha=0.2, linewidth=0)
        # The first validation, of a model that knows nothing yet, would flatten all others.
        skip = len(mean) > 2
        shown += [float(loss) for loss in (*low[skip:], *high[skip:]) if np.isfinite(loss)]
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
        _legend(axis, len(best))
    axis.set(xlabel="tokens", ylabel="loss (nats a token)", title="Validation loss of the best points")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(axis: Any, count: int) -> None:
    """Name the series: inside the axes where a few names fit, or else those that have a name below all axes."""
    text: dict[str, Any] = {"frameon": False, "fontsize": 9, "title_fontsize": 9}
    if count <= INSIDE:
        axis.legend(**text)
        return
    title = f"the {NAMED} best of {count}" if count > NAMED else None
    axis.figure.legend(**text, title=title, loc="outside lower center", ncols=3)


def _rates(axis: Any, rows: Sequence[Record]) -> None:
    for series in sorted({row["series"] for row in rows}):
        points = sorted((r["lr"], r["val_loss"], r["val_std"] or 0) for r in rows if r["series"] == series)
        rates, losses, errors = zip(*points, strict=True)
        axis.errorbar(rates, losses, errors, markersize=5, capsize=3, **style(series))
    axis.set(xlabel="learning rate", title="Validation loss by learning rate")
    axis.set_xscale("log")


def _states(axis: Any, best: Sequence[Record], names: Sequence[str]) -> None:
    edge = front(best)
    axis.step([r["state_bytes"] for r in edge], [r["val_loss"] for r in edge], where="post", color="#8C8C8C", lw=1)
    sizes = [row["state_bytes"] for row in best if row["state_bytes"] > 0]
    if len(sizes) < len(best):  # no state at all, which a logarithm does not have
        axis.set_xscale("symlog", linthresh=min(sizes, default=1))
    else:
        axis.set_xscale("log")
    axis.margins(x=0.3, y=0.1)
    for row in best:
        axis.plot(row["state_bytes"], row["val_loss"], markersize=7, **style(row["series"]))
    axis.set(xlabel="optimizer state (bytes)", title="Best validation loss by optimizer state")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(best) <= NAMED:
        _names(axis, best, names)


def _names(axis: Any, best: Sequence[Record], names: Sequence[str]) -> None:
    """Write names beside marks, those that would touch above each other."""
    low, high = axis.get_ylim()
    line, free = (high - low) / 24, low
    for row in sorted(best, key=lambda row: row["val_loss"]):
        free = max(free + line, row["val_loss"])
        place, _ = (axis.transScale + axis.transLimits).transform((row["state_bytes"], row["val_loss"]))
        side, away = ("right", -8) if place > 0.5 else ("left", 8)
        text = {"fontsize": 9, "va": "center", "ha": side, "bbox": {"fc": "white", "ec": "none", "pad": 1}}
        end = (row["state_bytes"], free)
        axis.annotate(names[row["series"]], end, (away, 0), textcoords="offset points", **text)
