"""`lowmem plan`: what training a model with an optimizer takes in memory, before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import AdamW, Optimizer

from ..optim import AdamW8bit
from ..optim.plan import Plan, plan
from .errors import UserError, one_line
from .models import build_model
from .optimizers import build_optimizer

TABLE_WIDTH = 110
MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What is planned.

    Args:
        model: A name of `bench.models.SHAPES` or a config JSON.
        optimizer: A name of `lowmem optimizers`.
        options: Its options.
        dtype: Dtype of weights and gradients.
    """

    model: str
    optimizer: str
    options: Mapping[str, Any]
    dtype: str = "bf16"


def plan_memory(settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Print the bytes of an optimizer beside those of AdamW, and return (and write, if `out` is given) them."""
    with torch.device("meta"):
        model = build_model(settings.model, dtype=MODEL_DTYPES[settings.dtype])
    plans = {title: _plan(make(model), title) for title, make in _contenders(settings).items()}
    figures = {
        "model": settings.model,
        "dtype": settings.dtype,
        "optimizer": settings.optimizer,
        "options": {name: _plain(value) for name, value in settings.options.items()},
        "plans": {title: bytes_of(found) for title, found in plans.items()},
    }
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(f"{settings.model}, weights in {settings.dtype}, bytes on one GPU beside activations")
    console.print(_table(plans))
    console.print(
        "workspace: the most that a step allocates by torch's operations; with gradient release one gradient at a time"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _contenders(settings: Settings) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """The optimizer that was asked for, AdamW with fp32 moments, and torch's, whose moments have the weights' dtype."""
    title = " ".join([settings.optimizer, *(f"{name}={value}" for name, value in settings.options.items())])
    return {
        title: lambda model: build_optimizer(settings.optimizer, settings.options, model, seed=0),
        "AdamW, fp32 moments": lambda model: AdamW8bit(model.parameters(), state_dtype="float32"),
        "torch.optim.AdamW": lambda model: AdamW(model.parameters()),
    }


def _plan(optimizer: Optimizer, title: str) -> Plan:
    try:
        return plan(optimizer)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"{title} cannot be planned: {one_line(error)}") from error


def bytes_of(found: Plan) -> dict[str, Any]:
    """A plan and its sums as JSON."""
    sums = {"state": found.state, "total": found.total, "total_released": found.total_released}
    return {**asdict(found), **sums}


def _table(plans: Mapping[str, Plan]) -> Table:
    table = Table()
    table.add_column("GB")
    for title in plans:
        table.add_column(title, justify="right")
    rows: dict[str, Callable[[Plan], int | None]] = {
        "weights": lambda p: p.weights,
        "moments": lambda p: p.moments,
        "bases": lambda p: p.bases,
        "scales of moments": lambda p: p.scales,
        "corrections of weights": lambda p: p.corrections,
        "other state": lambda p: p.other,
        "all state": lambda p: p.state,
        "gradients": lambda p: p.gradients,
        "workspace of a step": lambda p: p.step.plain,
        "  of one with a refresh": lambda p: p.step.refresh,
        "  R and N in it": lambda p: p.step.buffers,
        "sum": lambda p: p.total,
        "largest gradient": lambda p: p.largest_gradient,
        "workspace of its step": lambda p: p.released.largest,
        "sum with gradient release": lambda p: p.total_released,
    }
    for name, read in rows.items():
        table.add_row(name, *(_gigabytes(read(found)) for found in plans.values()), end_section=name.startswith("sum"))
    return table


def _gigabytes(size: int | None) -> str:
    return "-" if not size else f"{size / 1e9:,.3f}" if size >= 1e6 else f"{size / 1e9:.6f}"
