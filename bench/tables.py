"""Tables of a comparison, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def terminal_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Return a table for a terminal: two columns of text, then figures."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    for line in lines:
        table.add_row(*map(Text, line))  # no markup: [attn] is an option's value
    return table


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return the same in Markdown."""
    rules = ["---"] * 2 + ["---:"] * (len(columns) - 2)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rules, *lines))
