"""The figures of an ablation as JSON values: a row for every point, over its seeds, and the runs that gave none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ..report import Curve, mean_curve, read_curve
from ..rundir import Record
from ..search import Entry, Outcome, labels
from .outcomes import MISSING, Trial
from .points import Point, matches
from .spec import RUN_OPTIONS, Lab, Paper

LONGEST_CURVE = 60
"""Points of a training curve; every line in between is averaged."""


def collect(lab: Lab, trials: Sequence[Trial], outcomes: Sequence[Outcome], command: str) -> Record:
    """Return all figures of the report.

    A point's loss is the mean of its finished seeds. A point of which a seed diverged is never the best of its series:
    the points that differ in their learning rate alone. Numbers that are not finite are None.
    """
    by_point: dict[str, list[tuple[Trial, Outcome]]] = {}
    for trial, outcome in zip(trials, outcomes, strict=True):
        by_point.setdefault(trial.point.entry.folder, []).append((trial, outcome))
    points = [pairs[0][0].point for pairs in by_point.values()]
    series, names = _series(points)
    texts = labels([point.entry for point in points])
    pairs = zip(points, texts, by_point.values(), strict=True)
    rows = [_row(point, text, series[point.entry.folder], runs, lab.paper) for point, text, runs in pairs]
    _mark_best(rows)
    summaries = [outcome.summary for outcome in outcomes if outcome.summary]
    figures = {
        "title": lab.title,
        "command": command,
        "notes": list(lab.notes),
        "seeds": sorted({trial.run.seed for trial in trials}),
        "shared": _shared(points),
        "versions": _distinct([summary["versions"] for summary in summaries]),
        "devices": _distinct([summary["device"] for summary in summaries]),
        "paper": {"source": lab.paper.source, "loss": lab.paper.loss} if lab.paper.source else None,
        "series": names,
        "rows": rows,
        "failures": [_failure(t, o) for t, o in zip(trials, outcomes, strict=True) if o.error],
    }
    found: Record = _finite(figures)
    return found


def _finite(value: Any) -> Any:
    """Return JSON values with None for every number that JSON does not have; a page must not be lost for one."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _series(points: Sequence[Point]) -> tuple[dict[str, int], list[str]]:
    """Return the number of every point's series, by the point's folder, and the names of all series."""
    own = {point.entry.folder: _without_rate(point.entry) for point in points}
    distinct = {entry.text: entry for entry in own.values()}
    order = {text: index for index, text in enumerate(distinct)}
    return {folder: order[entry.text] for folder, entry in own.items()}, labels(list(distinct.values()))


def _without_rate(entry: Entry) -> Entry:
    return Entry(entry.optimizer, {name: text for name, text in entry.texts.items() if name != "lr"})


def _row(point: Point, label: str, series: int, runs: Sequence[tuple[Trial, Outcome]], paper: Paper) -> Record:
    finished = [(trial, outcome) for trial, outcome in runs if outcome.summary]
    summaries = [outcome.summary for _, outcome in finished]
    rate = point.config.options.get("lr")
    head = {
        "label": label,
        "series": series,
        "optimizer": point.entry.optimizer,
        "options": point.entry.options,
        "lr": float(rate) if rate is not None else None,
        "paper": published(point, paper),
        "planned": len(runs),
        "diverged": sum(outcome.diverged for _, outcome in runs),
        "best": False,
        "edge": False,
        "runs": [outcome.to_json() for _, outcome in runs],
    }
    if not summaries:
        return {**head, "val_loss": None}
    losses = [float(summary["val_loss"]) for summary in summaries]
    return {
        **head,
        "val_loss": fmean(losses),
        "val_std": stdev(losses) if len(losses) > 1 else None,
        "train_loss": fmean(summary["train_loss"] for summary in summaries),
        "state_bytes": max(summary["optimizer_state_bytes"] for summary in summaries),
        "peak_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
        "optimizer_s": fmean(summary["optimizer_step_s"]["median"] for summary in summaries),
        "step_s": fmean(summary["step_s"]["median"] for summary in summaries),
        "tokens_per_s": fmean(summary["tokens_per_s"] for summary in summaries),
        "curve": _curve(mean_curve([read_curve(trial.folder, label) for trial, _ in finished])),
    }


def published(point: Point, paper: Paper) -> float | None:
    """Return the paper's perplexity of a point; of several that match, the one with most conditions."""
    found = [(len(when), perplexity) for when, perplexity in paper.figures if matches(when, point.facts)]
    return max(found)[1] if found else None


def _curve(curve: Curve) -> Record:
    """Return a curve as lists: validation with the range of the seeds, training averaged to few points."""
    tokens, losses = (np.array(values, dtype=float) for values in curve.train)
    pieces = min(LONGEST_CURVE, len(tokens))
    low, high = curve.band or (curve.held_out[1], curve.held_out[1])
    return {
        "tokens": list(curve.held_out[0]),
        "loss": _short(curve.held_out[1]),
        "low": _short(low),
        "high": _short(high),
        "train_tokens": [int(part[-1]) for part in np.array_split(tokens, pieces)],
        "train_loss": _short([float(part.mean()) for part in np.array_split(losses, pieces)]),
    }


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _mark_best(rows: Sequence[Record]) -> None:
    """Mark the best point of every series, in place, and whether it lies at an edge of the rates that were tried."""
    for index in {row["series"] for row in rows}:
        own = [row for row in rows if row["series"] == index]
        best = min(own, key=_rank)
        if _rank(best) < math.inf:
            rates = [row["lr"] for row in own if row["lr"] is not None]
            best["best"], best["edge"] = True, len({*rates}) > 1 and best["lr"] in (min(rates), max(rates))


def _rank(row: Mapping[str, Any]) -> float:
    return math.inf if row["val_loss"] is None or row["diverged"] else float(row["val_loss"])


def _shared(points: Sequence[Point]) -> Record:
    """Return the options of `lowmem pretrain` in which all points agree, but the seed."""
    values = {name: [getattr(point.config, name) for point in points] for name in RUN_OPTIONS if name != "seed"}
    return {name: found[0] for name, found in values.items() if len({*found}) == 1}


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _failure(trial: Trial, outcome: Outcome) -> Record:
    kind = "diverged" if outcome.diverged else "missing" if outcome.error == MISSING else "failed"
    return {"run": trial.point.entry.text, "seed": trial.run.seed, "kind": kind, "error": outcome.error}
