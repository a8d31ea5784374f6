"""Tables and picture of `lowmem step-time`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .turns import Timing

GAPS = (200, 50)

COLUMNS = (
    "step",
    "p95",
    "vs own floor",
    "refresh step",
    *(f"gap {gap}" for gap in GAPS),
    "worst",
    "first",
    "state",
    "temporaries",
)


@dataclass(frozen=True)
class Report:
    """Everything that was measured for one model and dtype.

    Args:
        counts: How many parameters are projected, and how many plain.
        projected: Timings on the projected ones.
        plain: Timings on the plain ones.
        floors: Milliseconds of bare products and passes on the projected ones.
        staggered: One interval with staggered refreshes.
        energy: What the sketch captures, see `captured_energy`.
        missing: Neighbours that could not run, and why.
    """

    counts: tuple[int, int]
    projected: Sequence[Timing]
    plain: Sequence[Timing]
    floors: dict[str, float]
    staggered: dict[str, float]
    energy: dict[str, float]
    missing: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        rows = [asdict(t) | {f"amortised_{gap}": t.amortised(gap) for gap in GAPS} for t in self.projected]
        return {
            "floors": self.floors,
            "projected": rows,
            "plain": [asdict(timing) for timing in self.plain],
            "staggered": self.staggered,
            "energy": self.energy,
            "missing": self.missing,
        }


def print_report(console: Console, report: Report) -> None:
    """Print both tables, the staggered interval, and who could not run."""
    bare = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in report.floors.items())
    console.print(f"floors, milliseconds: {bare}")
    console.print(_table(f"{report.counts[0]} projected matrices, milliseconds", report.projected))
    console.print(_table(f"{report.counts[1]} plain parameters, milliseconds", report.plain))
    steps, energy = report.staggered, report.energy
    console.print(
        f"staggered, gap {steps['gap']}: median {steps['median']:.1f} ms, worst {steps['worst']:.1f} ms, "
        f"ratio {steps['worst'] / steps['median']:.2f}; first step {steps['first']:.0f} ms"
    )
    console.print(
        f"energy of the sketch against the best basis: cold min {energy['cold_min']:.4f} mean {energy['cold_mean']:.4f}"
        f", warm min {energy['warm_min']:.4f} mean {energy['warm_mean']:.4f}"
    )
    for name, why in report.missing.items():
        console.print(f"not run: {name} ({why})", markup=False)


def _table(title: str, timings: Sequence[Timing]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for t in timings:
        table.add_row(
            t.name,
            f"{t.plain:.1f}",
            f"{t.p95:.1f}",
            "-" if t.floor is None else f"{t.plain / t.floor:.2f}x",
            "-" if t.refresh is None else f"{t.refresh:.0f}",
            *(f"{t.amortised(gap):.1f}" for gap in GAPS),
            f"{t.worst:.0f}",
            f"{t.first:.0f}",
            f"{t.state_mb:.1f} MB",
            f"{t.peak_mb:.1f} MB",
        )
    return table


def picture(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write a panel for every run: the step of every optimizer, and what refreshes every 50 steps add."""
    from .report import COLOURS, subplots

    figure, panels = subplots(len(runs))
    for axis, run in zip(panels, runs, strict=True):
        rows = sorted(run["projected"], key=lambda row: row["plain"])
        names = [row["name"] for row in rows]
        axis.barh(names, [row["plain"] for row in rows], color=COLOURS[0], label="step")
        added = [row["amortised_50"] - row["plain"] for row in rows]
        axis.barh(names, added, left=[row["plain"] for row in rows], color=COLOURS[1], label="refresh every 50 steps")
        own = [(index, row["floor"]) for index, row in enumerate(rows) if row["floor"] is not None]
        places, floors = zip(*own, strict=True) if own else ((), ())
        axis.scatter(floors, places, color=COLOURS[6], marker="|", s=220, zorder=3, label="floor of its own work")
        settings = run["settings"]
        title = f"{settings['model']}, rank {settings['rank']}, {settings['dtype']}"
        axis.set(xlabel="milliseconds a step", title=title)
        axis.legend(loc="lower right", frameon=False)
    figure.savefig(path)
