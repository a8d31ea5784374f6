"""What a comparison plans and decides without running anything: entries, their grids, the best points."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from .errors import UserError
from .options import pairs_to_texts


@dataclass(frozen=True)
class Entry:
    """One optimizer of a comparison as it was written, or one point of its grid."""

    optimizer: str
    texts: Mapping[str, str]

    @property
    def options(self) -> str:
        """The options as text."""
        return " ".join(f"{name}={text}" for name, text in self.texts.items())

    @property
    def text(self) -> str:
        """The entry as it was written."""
        return f"{self.optimizer} {self.options}".rstrip()

    @property
    def folder(self) -> str:
        """Name of a point's run folder inside the comparison's."""
        return re.sub(r"[^\w.+-]+", "_", self.text)

    @property
    def flags(self) -> list[str]:
        """A point's options as flags of `lowmem pretrain`."""
        return [f"--{name.replace('_', '-')}={text}" for name, text in self.texts.items()]


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    point: Entry
    seed: int
    folder: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a summary, or with an error, which may be a loss that is not finite."""

    run: Run
    summary: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    diverged: bool = False

    @property
    def val_loss(self) -> float:
        """The final validation loss; a run without one is infinitely bad."""
        return float(self.summary["val_loss"]) if self.summary else math.inf

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values, without the summary, which the run folder holds."""
        run = {"folder": self.run.folder, "options": dict(self.run.point.texts), "seed": self.run.seed}
        if self.summary:
            return {**run, "val_loss": self.val_loss}
        return {**run, "val_loss": None, "diverged": self.diverged, "error": self.error}


@dataclass(frozen=True)
class Result:
    """How the runs of an entry ended: its points with the shared seed, then the best one with the other seeds."""

    entry: Entry
    points: Sequence[Outcome]
    repeats: Sequence[Outcome]

    @property
    def best(self) -> Outcome | None:
        """The best point."""
        return best(self.points)

    @property
    def finished(self) -> list[Outcome]:
        """The runs of the best point that ended with a validation loss, the one that was chosen first."""
        return [outcome for outcome in (self.best, *self.repeats) if outcome and outcome.summary]

    @property
    def failures(self) -> list[Outcome]:
        """The runs that the comparison misses: crashes, and where no point is left the diverged ones too."""
        outcomes = (*self.points, *self.repeats)
        return [outcome for outcome in outcomes if outcome.error and not (self.best and outcome.diverged)]

    def to_json(self) -> dict[str, Any]:
        """Return every point and, of the best one, every seed as JSON values."""
        seeds = [self.best, *self.repeats] if self.best else []
        return {
            "entry": self.entry.text,
            "points": [outcome.to_json() for outcome in self.points],
            "seeds": [outcome.to_json() for outcome in seeds],
        }


def parse_entry(text: str) -> Entry:
    """Read `"NAME option=value option=value|value ..."`."""
    words = text.split()
    if not words or "=" in words[0]:
        raise UserError(f'{text!r}: write "NAME option=value ...", for example "galore lr=1e-2|2e-2 rank=32"')
    return Entry(words[0], pairs_to_texts(words[1:]))


def expand(entry: Entry) -> list[Entry]:
    """Return the points of an entry: the product of the values that `|` separates, the last option fastest.

    Raises:
        UserError: If a `|` has no value on one side.
    """
    for name, text in entry.texts.items():
        if "|" in text and not all(text.split("|")):
            raise UserError(f"{name}={text}: every | needs a value on both sides, for example lr=1e-3|2e-3")
    grid = product(*(text.split("|") for text in entry.texts.values()))
    return [Entry(entry.optimizer, dict(zip(entry.texts, values, strict=True))) for values in grid]


def refuse_repeats(points: Iterable[Entry]) -> None:
    """Raise a `UserError` if two points would share a run folder."""
    for folder, count in Counter(point.folder for point in points).items():
        if count > 1:
            raise UserError(f"{folder} is there {count} times: give every optimizer and grid point once")


def first_runs(points: Sequence[Entry], seed: int) -> list[Run]:
    """Return the runs that decide about the best point."""
    return [Run(point, seed, point.folder) for point in points]


def repeat_runs(chosen: Outcome | None, seeds: int) -> list[Run]:
    """Return the runs of the best point, if there is one, with the seeds after its own, `seeds` in all."""
    if chosen is None:
        return []
    point, first = chosen.run.point, chosen.run.seed
    return [Run(point, seed, f"{point.folder}_seed{seed}") for seed in range(first + 1, first + seeds)]


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the outcome of lowest validation loss, the first one of equals; None if no run ended with a loss."""
    return min((outcome for outcome in outcomes if outcome.summary), key=lambda o: o.val_loss, default=None)


def labels(entries: Sequence[Entry]) -> list[str]:
    """Return short distinct labels: the name, and where it occurs twice the options that differ."""
    counts = Counter(entry.optimizer for entry in entries)
    found = []
    for entry in entries:
        namesakes = [other.texts for other in entries if other.optimizer == entry.optimizer]
        differing = [f"{key}={text}" for key, text in entry.texts.items() if any(o.get(key) != text for o in namesakes)]
        words = [entry.optimizer, *differing] if counts[entry.optimizer] > 1 else [entry.optimizer]
        found.append(" ".join(words))
    return found
