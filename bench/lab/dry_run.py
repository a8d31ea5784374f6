"""What an ablation would run: points, tokens, optimizer state and the paper's perplexities, without running it."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal

from ..tables import terminal_table
from .figures import published
from .points import points_of, seeds_of
from .spec import Lab

TABLE_WIDTH = 140
COLUMNS = ("optimizer", "options", "model", "steps", "tokens", "state", "paper")


def dry_run(lab: Lab) -> None:
    """Print every point of a grid, checked as before a run; neither data nor weights are loaded.

    Raises:
        UserError: If a point of the grid is no good.
    """
    points = points_of(lab)
    seeds = len(seeds_of(lab, points[0]))
    lines, total = [], 0
    for point in points:
        tokens = point.config.steps * point.config.tokens_per_step
        total += tokens * seeds
        paper = published(point, lab.paper)
        lines.append(
            (
                point.entry.optimizer,
                " ".join(f"{name}={text}" for name, text in point.texts.items()),
                point.config.model,
                f"{point.config.steps:,}",
                tokens_text(tokens),
                "-" if point.state_bytes is None else decimal(point.state_bytes),
                f"{paper:.2f}" if paper else "-",
            )
        )
    console = Console(highlight=False)
    table = Console(width=None if console.is_terminal else TABLE_WIDTH)
    table.print(f"{lab.title}", markup=False)
    table.print(terminal_table(COLUMNS, lines))
    counted = f"{len(points)} points x {seeds} {'seed' if seeds == 1 else 'seeds'} = {len(points) * seeds} runs"
    table.print(f"{counted}, {tokens_text(total)} tokens", markup=False)
    if lab.paper.source:
        table.print(f"paper: {lab.paper.source}, beside our {lab.paper.loss} perplexity", markup=False)
    for note in lab.notes:
        table.print(f"- {note}", markup=False)


def tokens_text(count: int) -> str:
    """Return a number of tokens in millions or, as papers have it, in billions."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"
