"""What steps on a GPU should cost beside the neighbours': ratios of measured rows, and whether they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .measure import amortised

GAP = 200


@dataclass(frozen=True)
class Target:
    """`ours / theirs` is at most `most`, refreshes every `GAP` steps counted in."""

    ours: str
    theirs: str
    most: float


TARGETS = (Target("GaLore fp32", "torch AdamW fused", 1.0), Target("GaLore fp32", "galore-torch", 0.1))
MODELS = ("1b", "7b")


def targets(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compare what was measured with the targets.

    Args:
        rows: The rows of `gpu_steps.measure`.

    Yields:
        One record a model and target: `ratio` and `met`, or `missing`, the contender without a time.
    """
    timed = [row for row in rows if "ms" in row]
    times = {(row["model"], row["optimizer"]): amortised(row["ms"], row.get("refresh_ms"), GAP) for row in timed}
    for model in MODELS:
        for target in TARGETS:
            record = {"model": model, "ours": target.ours, "theirs": target.theirs, "most": target.most}
            absent = [name for name in (target.ours, target.theirs) if (model, name) not in times]
            if absent:
                yield record | {"missing": f"no time of {', '.join(absent)}"}
                continue
            ratio = times[model, target.ours] / times[model, target.theirs]
            yield record | {"ratio": ratio, "met": ratio <= target.most}
