"""`lowmem step-time`: the cost of an optimizer step, side by side in one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..optim import GaLore, param_groups
from . import neighbours, peers
from .config import RunConfig
from .data import load_source
from .energy import captured_energy
from .errors import UserError
from .floors import FLOORS, LR
from .measure import device_name, timed, versions
from .models import build_model
from .out import ready_file
from .peers import Contender
from .rundir import write_json
from .step_time_report import Report, picture, print_report
from .turns import Timing, take_turns

TABLE_WIDTH = 140


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        model: A name of `bench.models.SHAPES` or a config JSON; several with commas between.
        rank: Rank of the projections.
        dtype: Dtype of weights and gradients, or several with commas between.
        rounds: Timed steps of each contender; they take turns, so that noise of the machine meets all alike.
        gap: Interval of the staggered run.
        peers: Measure the neighbours too.
        methods: Measure every method of the package, not GaLore alone.
        eight_bit: Measure moments in 8 bits, and with `peers` the neighbours' 8-bit AdamW.
        batch_size: Sequences of the batch that the gradients come from.
        length: Tokens of a sequence.
    """

    model: str = "60m"
    rank: int = 128
    dtype: str = "fp32"
    rounds: int = 12
    gap: int = 200
    peers: bool = False
    methods: bool = False
    eight_bit: bool = False
    batch_size: int = 4
    length: int = 256


def step_time(settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Measure, print the tables and return (and write, with a picture beside, if `out` is given) the figures.

    Raises:
        UserError: A model is unknown, a rank is too large for one, or `out` cannot be written; nothing has
            been measured then.
    """
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, runs = settings.model.split(","), list[dict[str, Any]]()
    for model in models:
        _check(replace(settings, model=model))
    ready_file(out)
    for model, dtype in product(models, settings.dtype.split(",")):
        chosen = replace(settings, model=model, dtype=dtype)
        console.print(f"{model}, rank {chosen.rank}, {dtype}, {device_name(device)}")
        console.print("real gradients: three AdamW steps on the standard library's source, then one backward pass")
        report = _measure(chosen, device)
        print_report(console, report)
        runs.append({"settings": asdict(chosen), **report.to_json()})
        if out is not None:  # after each, for the next may take an hour
            write_json(out, {"device": device_name(device), "versions": versions(), "runs": runs})
            picture(out.with_suffix(".png"), runs)
    return {"device": device_name(device), "versions": versions(), "runs": runs}


def _check(settings: Settings) -> None:
    """Refuse a model or a rank before the models in front of it have been measured; no weights are allocated."""
    with torch.device("meta"):
        model = build_model(settings.model, max_length=settings.length)
    *_, group = param_groups(model, rank=settings.rank)
    smallest = min(min(param.shape) for param in group["params"])
    if settings.rank >= smallest:
        raise UserError(f"--rank is {settings.rank}: {settings.model} needs less than {smallest}, its smallest side")


def _measure(settings: Settings, device: torch.device) -> Report:
    projected, plain = _parameters(settings, device)
    timings, floors, missing = _projected(settings, projected, device)
    plain_timings, absent = _plain(settings, plain, device)
    staggered = _staggered(settings, projected, device)
    return Report(
        (len(projected), len(plain)),
        timings,
        plain_timings,
        floors,
        staggered,
        captured_energy(projected, settings.rank),
        missing | absent,
    )


def _parameters(settings: Settings, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return the model's projected and plain parameters, with gradients of real text."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    model = build_model(settings.model, max_length=settings.length, dtype=dtype).to(device)
    *rest, group = param_groups(model, rank=settings.rank)
    source = load_source(RunConfig(batch_size=settings.batch_size, length=settings.length))
    warm_up = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        model.zero_grad()
        tokens = source.train_batch(step, 0)[:, :-1].to(device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step < 3:
            warm_up.step()
    return group["params"], [param for plain in rest for param in plain["params"]]


def _projected(
    settings: Settings, params: list[Tensor], device: torch.device
) -> tuple[list[Timing], dict[str, float], dict[str, str]]:
    contenders, missing = [peers.ours(params, settings.rank), *peers.torch_adamw(params)], dict[str, str]()
    if settings.methods:
        contenders += peers.other_methods(params, settings.rank)
        contenders.append(peers.torch_adafactor(params))
    if settings.eight_bit:
        contenders += peers.eight_bit(params, settings.rank)
    if settings.peers:
        found, missing = neighbours.projected(params, settings.rank)
        contenders += found
    wanted = {"pass", *(name for contender in contenders for name in contender.floor)}
    floors = {name: build(params, settings.rank) for name, build in FLOORS.items() if name in wanted}
    return *take_turns(contenders, floors, settings.rounds, device), missing


def _plain(settings: Settings, params: list[Tensor], device: torch.device) -> tuple[list[Timing], dict[str, str]]:
    mine = Contender("GaLore, plain group", GaLore([{"params": params, "rank": None}], lr=LR))
    contenders, missing = [peers.torch_adamw(params)[-1], mine], dict[str, str]()
    if settings.eight_bit:
        contenders += peers.eight_bit_adamw(params)
    if settings.eight_bit and settings.peers:
        found, missing = neighbours.eight_bit(params)
        contenders += found
    return take_turns(contenders, {}, settings.rounds, device)[0], missing


def _staggered(settings: Settings, params: list[Tensor], device: torch.device) -> dict[str, float]:
    """Time one whole interval of staggered refreshes."""
    stepper = peers.ours(params, settings.rank, update_proj_gap=settings.gap, stagger=True).stepper
    first = timed(stepper.step, device)
    steps = [timed(stepper.step, device) for _ in range(settings.gap)]
    return {"gap": settings.gap, "first": first, "median": float(np.median(steps)), "worst": max(steps)}
