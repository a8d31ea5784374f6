"""What every method takes at 7B, as a picture: `python -m lowmem.bench.plan_picture` (or `make memory`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..optim.plan import TrainingPlan
from .planner import Planner, Settings
from .tables import markdown_table

RESULTS = Path(__file__).parent / "results"
EIGHT = {"state_dtype": "8bit"}
METHODS: dict[str, Settings] = {
    "AdamW": Settings("7b", "adamw8bit", {"state_dtype": "float32"}),
    "Online Subspace Descent, r = 1024": Settings("7b", "onlinesubspacedescent", {"rank": 1024}),
    "Fira, r = 1024": Settings("7b", "fira", {"rank": 1024}),
    "GaLore, r = 1024": Settings("7b", "galore", {"rank": 1024}),
    "FRUGAL, density 0.25": Settings("7b", "frugal", {"density": 0.25}),
    "AdamW8bit": Settings("7b", "adamw8bit"),
    "APOLLO, r = 256": Settings("7b", "apollo", {"rank": 256}),
    "GaLore 8bit, r = 1024": Settings("7b", "galore", {"rank": 1024, **EIGHT}),
    "FRUGAL 8bit, density 0.25": Settings("7b", "frugal", {"density": 0.25, **EIGHT}),
    "BAdam, one layer": Settings("7b", "badam", {"rank": 1}),
    "Flora, r = 256": Settings("7b", "flora", {"rank": 256}),
    "APOLLO-Mini 8bit": Settings("7b", "apollo", {"rank": 1, "scale": 128.0, "scale_mode": "matrix", **EIGHT}),
    "Adafactor": Settings("7b", "adafactor"),
    "AdamW8bit, release": Settings("7b", "adamw8bit", release=True),
    "GaLore 8bit, r = 1024, release": Settings("7b", "galore", {"rank": 1024, **EIGHT}, release=True),
    "Adafactor, release": Settings("7b", "adafactor", release=True),
}
"""Bars, and what `lowmem plan` is asked for each."""

# Okabe and Ito's palette, whose lightness falls from bar to bar too, so that it survives a grey copy.
COLOURS = {
    "weights": "#000000",
    "gradients": "#0072B2",
    "moments": "#D55E00",
    "bases": "#E69F00",
    "workspace, activations": "#C8C8C8",
}
CARDS = (24, 80)
"""Gigabytes of common cards."""


@dataclass(frozen=True)
class Bar:
    """Bytes at the peak of training, by what they hold; moments are with their scales."""

    name: str
    weights: int
    gradients: int
    moments: int
    bases: int
    rest: int

    @classmethod
    def of(cls, name: str, settings: Settings, found: TrainingPlan) -> Bar:
        """Split the peak of a plan; with gradient release one gradient is there at a time."""
        kept = found.optimizer
        peak = found.peak_released if settings.release else found.peak
        gradients = kept.largest_gradient if settings.release else kept.gradients
        moments = kept.state - kept.bases
        rest = (peak or 0) - found.weights - gradients - kept.state
        return cls(name, found.weights, gradients, moments, kept.bases, rest)

    @property
    def parts(self) -> tuple[int, ...]:
        """In the order of `COLOURS`."""
        return self.weights, self.gradients, self.moments, self.bases, self.rest

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.parts)


def bars(model: str = "7b", methods: Iterable[str] = METHODS) -> list[Bar]:
    """Plan the methods on a model."""
    planner = Planner(model, "bf16")
    chosen = ((name, replace(METHODS[name], model=model)) for name in methods)
    return [Bar.of(name, settings, planner.plan(settings)) for name, settings in chosen]


def picture(found: list[Bar], path: Path, title: str) -> None:
    """Draw the bars, stacked, with the peak at their ends."""
    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 0.42 * len(found) + 1.6), dpi=120, layout="constrained")
        axis: Any = figure.subplots()
        left = [0.0] * len(found)
        for place, (part, colour) in enumerate(COLOURS.items()):
            sizes = [bar.parts[place] / 1e9 for bar in found]
            style = {"height": 0.7, "color": colour, "edgecolor": "white", "linewidth": 0.6, "label": part}
            drawn = axis.barh([bar.name for bar in found], sizes, left=left, **style)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        labels = axis.bar_label(drawn, labels=[f"{bar.peak / 1e9:.1f}" for bar in found], padding=4)
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        for card in CARDS:
            axis.axvline(card, color="#555555", linewidth=1, linestyle="--", zorder=0)
            axis.annotate(
                f"{card} GB", (card, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#555555"
            )
        axis.invert_yaxis()
        axis.margins(x=0.06, y=0.02)
        axis.tick_params(axis="y", length=0)
        axis.set(xlabel="GB (10$^9$ bytes)")
        axis.set_title(title, loc="left", pad=24, fontsize=12, x=-0.28)
        axis.legend(loc="lower right", framealpha=1, edgecolor="none")
        figure.savefig(path)


def main(folder: Path = RESULTS) -> None:
    """Write `memory_7b.png` and its figures as `memory_7b.json`, and print them."""
    found = bars()
    folder.mkdir(parents=True, exist_ok=True)
    figures = {bar.name: {**asdict(bar), "peak": bar.peak} for bar in found}
    (folder / "memory_7b.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    title = "LLaMA-7B on one GPU at its peak: bf16 weights, a sequence of 256 tokens (planned, not measured)"
    picture(found, folder / "memory_7b.png", title)
    lines = [(bar.name, *(f"{size / 1e9:.1f}" for size in (*bar.parts, bar.peak))) for bar in found]
    print(markdown_table(("GB", *COLOURS, "peak"), lines), end="")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
