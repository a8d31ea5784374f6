"""`lowmem plan`: what training a model with an optimizer takes, known before anything is allocated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import AdamW, Optimizer

from ..optim import AdamW8bit
from ..optim.plan import Pass, Plan, TrainingPlan
from .errors import UserError, one_line
from .out import ready_file
from .plan_report import show, show_ranks
from .planner import MODEL_DTYPES, Planner, Settings, build, skeleton

if TYPE_CHECKING:
    from .plan_rank import RankPlan
    from .plan_world import World

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Read a size such as 24GB (10^9 bytes), 24GiB (2^30) or 24e9.

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    try:
        size = float(found[1]) * UNITS[found[2]] if found else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size < math.inf:
        raise UserError(f"--budget {text}: it takes a size such as 24GB or 24GiB")
    return int(size)


def plan_memory(settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Print the bytes of an optimizer beside those of AdamW, and return (and write, if `out` is given) them.

    Raises:
        UserError: The optimizer refuses the model or an option, or `out` cannot be written.
    """
    ready_file(out)
    planner = Planner(settings.model, settings.dtype)
    makes: dict[str, Callable[[nn.Module], Optimizer] | None] = {
        settings.title: None,
        "AdamW, fp32 moments": lambda model: AdamW8bit(model.parameters(), state_dtype="float32"),
        "torch.optim.AdamW": lambda model: AdamW(model.parameters()),
    }
    both = [replace(settings, checkpointing=on) for on in (False, True)]
    plans = {title: [planner.plan(each, make) for each in both] for title, make in makes.items()}
    peak = planner.peak(settings)
    fits = None if settings.budget is None else peak <= settings.budget
    knobs = planner.knobs(settings) if fits is False else []
    figures = {
        **asdict(settings),
        "options": {name: _plain(value) for name, value in settings.options.items()},
        "plans": {title: bytes_of(pair[0].optimizer) | _peaks(pair) for title, pair in plans.items()},
        "activations": {_mode(pair): pair.activations for pair in map(planner.passes, both)},
        "peak": peak,
        "fits": fits,
        "knobs": [asdict(knob) for knob in knobs],
    }
    show(settings, plans, peak, knobs)
    _write(figures, out)
    return figures


def plan_ranks(settings: Settings, world: World, out: Path | None = None) -> dict[str, Any]:
    """Print what one rank of many keeps and sends beside AdamW, and return (and write, if `out` is given) it.

    Raises:
        UserError: The optimizer does not step such parameters, FSDP2 could not place them, or `out` cannot be written.
    """
    ready_file(out)
    adamw = replace(settings, optimizer="adamw8bit", options={"state_dtype": "float32"})
    alone = replace(world, replicas=False)  # it has no bases to share
    plans = {settings.title: _rank(settings, world), "AdamW, fp32 moments": _rank(adamw, alone)}
    figures = {
        "model": settings.model,
        "dtype": settings.dtype,
        "world": asdict(world),
        "plans": {title: asdict(found) | {"resident": found.resident} for title, found in plans.items()},
    }
    show_ranks(settings, world, plans)
    _write(figures, out)
    return figures


def _rank(settings: Settings, world: World) -> RankPlan:
    from .plan_rank import rank_plan  # torch.distributed is slow to import

    try:
        return rank_plan(skeleton(settings.model, MODEL_DTYPES[settings.dtype]), build(settings), world)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"{settings.title} cannot be planned: {one_line(error)}") from error


def _write(figures: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _mode(passes: Pass) -> str:
    return "checkpointing" if passes.checkpointing else "kept"


def _peaks(pair: list[TrainingPlan]) -> dict[str, int | None]:
    kept, again = pair
    return {
        "peak": kept.peak,
        "peak_released": kept.peak_released,
        "peak_checkpointing": again.peak,
        "peak_released_checkpointing": again.peak_released,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def bytes_of(found: Plan) -> dict[str, Any]:
    """A plan and its sums as JSON."""
    sums = {"state": found.state, "total": found.total, "total_released": found.total_released}
    return {**asdict(found), **sums}
