"""The report as one page that needs nothing else: template, style, scripts and figures in a single file."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path

from ..rundir import Record

PARTS = files(__package__)
SCRIPTS = ("charts.js", "plots.js", "report.js")


def write_page(path: Path, figures: Record) -> None:
    """Write the page of an ablation's figures."""
    path.write_text(page(figures), encoding="utf-8")


def page(figures: Record) -> str:
    """Return the page; what the figures say in text cannot end the element that holds them."""
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": escape(figures["title"]),
        "style": _part("report.css"),
        "script": "".join(map(_part, SCRIPTS)),
        "figures": data,
    }
    # In one pass: a text of the figures that looks like a place to fill stays as it is.
    return re.sub(r"\{(title|style|script|figures)\}", lambda place: parts[place[1]], _part("report.html"))


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
