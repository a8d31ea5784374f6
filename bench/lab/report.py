"""The report of an ablation: one page for a browser, a picture, a summary in Markdown, and all figures as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from ..pretrain import perplexity
from ..rundir import Record
from ..search import Outcome
from ..tables import markdown_table, terminal_table
from .figures import collect
from .outcomes import Trial
from .page import write_page
from .picture import write_picture
from .spec import Lab

TABLE_WIDTH = 140
LISTED = 8
COLUMNS = ("optimizer", "options", "state", "val loss", "perplexity", "paper", "optimizer step", "whole step")


def report(lab: Lab, trials: Sequence[Trial], outcomes: Sequence[Outcome], out: Path, command: str) -> None:
    """Write `ablate.json`, `.html`, `.png` and `.md` into `out`, and print the best points."""
    figures = collect(lab, trials, outcomes, command)
    (out / "ablate.json").write_text(json_text(figures), encoding="utf-8")
    write_page(out / "ablate.html", figures)
    lines = cells(figures)
    (out / "ablate.md").write_text(summary(figures, lines), encoding="utf-8")
    console = Console()
    table = Console(width=None if console.is_terminal else TABLE_WIDTH)
    if lines:
        write_picture(out / "ablate.png", figures)
        table.print(terminal_table(columns(figures), lines))
    table.print(f"report: {out / 'ablate.html'}", markup=False, highlight=False, soft_wrap=True)


def json_text(figures: Record) -> str:
    """Return JSON with every list of numbers on a line of its own."""
    text = json.dumps(figures, indent=2, allow_nan=False)
    return re.sub(r"\[\n([-+.\de,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def columns(figures: Record) -> list[str]:
    """Return the heads of the table; a paper's column stands where there is a paper."""
    return [name for name in COLUMNS if name != "paper" or figures["paper"]]


def cells(figures: Record) -> list[tuple[str, ...]]:
    """Return the text of the table: the best point of every series, the one of lowest loss first."""
    kind = (figures["paper"] or {"loss": "val"})["loss"]
    rows = sorted((row for row in figures["rows"] if row["best"]), key=lambda row: row["val_loss"])
    return [
        (
            row["optimizer"],
            row["options"],
            decimal(row["state_bytes"]),
            loss_text(row),
            "-" if row[f"{kind}_loss"] is None else f"{perplexity(row[f'{kind}_loss']):.2f}",
            *([f"{row['paper']:.2f}" if row["paper"] else "-"] if figures["paper"] else []),
            f"{1e3 * row['optimizer_s']:.1f} ms",
            f"{1e3 * row['step_s']:.1f} ms",
        )
        for row in rows
    ]


def loss_text(row: Record) -> str:
    """Return a point's loss with its deviation, and the number of seeds where it is not that of all."""
    text = f"{row['val_loss']:.4f}" if row["val_std"] is None else f"{row['val_loss']:.4f} ± {row['val_std']:.4f}"
    count = sum(run["val_loss"] is not None for run in row["runs"])
    return text if count == row["planned"] else f"{text} ({count} of {row['planned']} seeds)"


def edge_text(figures: Record) -> str:
    """Return which series are best at an edge of their rates, so that a better one may lie beyond it."""
    names = [figures["series"][row["series"]] for row in figures["rows"] if row["edge"]]
    return f"Best at an edge of the rates that were tried: {', '.join(names)}.\n" if names else ""


def summary(figures: Record, lines: Sequence[Sequence[str]]) -> str:
    """Return the summary in Markdown: conditions, the best point of every series, what failed."""
    shared = ", ".join(f"{name} {value}" for name, value in figures["shared"].items() if value != "")
    seeds, devices = len(figures["seeds"]), "; ".join(figures["devices"])
    parts = [f"# {figures['title']}\n", f"`{figures['command']}`\n" if figures["command"] else ""]
    counted = f"{len(figures['rows'])} points, {seeds} {'seeds' if seeds > 1 else 'seed'}"
    parts.append("; ".join(filter(None, (shared, counted, devices))) + ".\n")
    if lines:
        over = "; mean and sample deviation over the seeds" if seeds > 1 else ""
        parts.append(f"The best learning rate of every series{over}:\n")
        parts.append(markdown_table(columns(figures), lines))
        parts.append(edge_text(figures))
    else:
        parts.append("No point has a loss yet, or all of them have diverged.\n")
    if figures["paper"]:
        parts.append(f"Paper: {figures['paper']['source']}, beside our {figures['paper']['loss']} perplexity.\n")
    for kind in ("diverged", "failed", "missing"):
        runs = [f"{item['run']} seed {item['seed']}" for item in figures["failures"] if item["kind"] == kind]
        if runs:
            more = f"; and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
            parts.append(f"{len(runs)} {kind}: {'; '.join(runs[:LISTED])}{more}.\n")
    parts.append("".join(f"- {note}\n" for note in figures["notes"]))
    return "\n".join(part for part in parts if part)
