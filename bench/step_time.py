"""`lowmem step-time`: the cost of an optimizer step, side by side in one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..kernels import random
from ..optim import GaLore, param_groups
from ..optim.core import linalg
from . import peers
from .config import RunConfig
from .data import load_source
from .errors import UserError
from .measure import device_name, now, versions
from .models import build_model
from .optimizers import state_bytes

GAPS = (200, 50)
TABLE_WIDTH = 110


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        model: A name of `bench.models.SHAPES` or a config JSON.
        rank: Rank of the projections.
        dtype: Dtype of weights and gradients.
        rounds: Timed steps of each contender; they take turns, so that noise of the machine meets all alike.
        gap: Interval of the staggered run.
        peers: Measure the neighbours too.
        methods: Measure every method of the package, not GaLore alone.
        eight_bit: Measure moments in 8 bits, and with `peers` bitsandbytes' and torchao's where they are installed.
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


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender; refreshes are None where it has none."""

    name: str
    plain: float
    plain_spread: tuple[float, float]
    refresh: float | None
    worst: float
    state_mb: float

    def amortised(self, gap: int) -> float:
        """Mean step over an interval with one refresh of every basis."""
        return self.plain if self.refresh is None else self.plain + (self.refresh - self.plain) / gap


def step_time(settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Measure, print the tables and return (and write, if `out` is given) the figures."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"{settings.model}, rank {settings.rank}, {settings.dtype}, {device_name(device)}")
    console.print("real gradients: three AdamW steps on the standard library's source, then one backward pass")
    projected, plain = _parameters(settings, device)
    timings = _projected_timings(settings, projected, device)
    staggered = _staggered(settings, projected, device)
    plain_timings = _plain_timings(settings, plain, device)
    energy = captured_energy(projected, settings.rank)
    console.print(_table(f"{len(projected)} projected matrices", timings, timings[0].plain))
    console.print(_table(f"{len(plain)} plain parameters", plain_timings, plain_timings[0].plain))
    console.print(
        f"staggered, gap {settings.gap}: median {staggered['median']:.1f} ms, worst {staggered['worst']:.1f} ms, "
        f"ratio {staggered['worst'] / staggered['median']:.2f}; first step {staggered['first']:.0f} ms"
    )
    console.print(
        f"energy of the sketch against the best basis: cold min {energy['cold_min']:.4f} mean {energy['cold_mean']:.4f}"
        f", warm min {energy['warm_min']:.4f} mean {energy['warm_mean']:.4f}"
    )
    figures = {
        "settings": asdict(settings),
        "device": device_name(device),
        "versions": versions(),
        "projected": [asdict(t) | {f"amortised_{gap}": t.amortised(gap) for gap in GAPS} for t in timings],
        "plain": [asdict(t) for t in plain_timings],
        "staggered": staggered,
        "energy": energy,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _parameters(settings: Settings, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return the model's projected and plain parameters, with gradients of real text."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    model = build_model(settings.model, max_length=settings.length, dtype=dtype).to(device)
    *rest, group = param_groups(model, rank=settings.rank)
    smallest = min(min(param.shape) for param in group["params"])
    if settings.rank >= smallest:
        raise UserError(f"--rank is {settings.rank}: {settings.model} needs less than {smallest}, its smallest side")
    source = load_source(RunConfig(batch_size=settings.batch_size, length=settings.length))
    warm_up = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        model.zero_grad()
        tokens = source.train_batch(step, 0)[:, :-1].to(device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step < 3:
            warm_up.step()
    return group["params"], [param for plain in rest for param in plain["params"]]


def _projected_timings(settings: Settings, params: list[Tensor], device: torch.device) -> list[Timing]:
    contenders = [peers.Contender("GEMM floor", peers.GemmFloor(params, settings.rank))]
    contenders += [peers.ours(params, settings.rank), *peers.torch_adamw(params)]
    if settings.methods:
        contenders += peers.other_methods(params, settings.rank)
    if settings.eight_bit:
        contenders += peers.eight_bit(params, settings.rank)
    if settings.peers:
        contenders.append(peers.galore_torch(params, settings.rank))
    return _take_turns(contenders, settings.rounds, device)


def _plain_timings(settings: Settings, params: list[Tensor], device: torch.device) -> list[Timing]:
    fused = peers.torch_adamw(params)[-1]
    mine = peers.Contender("GaLore, plain group", GaLore([{"params": params, "rank": None}], lr=peers.LR))
    contenders = [fused, mine]
    if settings.eight_bit:
        contenders += peers.eight_bit_adamw(params)
        contenders += peers.eight_bit_peers(params) if settings.peers else []
    return _take_turns(contenders, settings.rounds, device)


def _take_turns(contenders: Sequence[peers.Contender], rounds: int, device: torch.device) -> list[Timing]:
    """Time all contenders round by round; the first step of each, which makes its state, is not counted."""
    for contender in contenders:
        contender.stepper.step()
    plain = {contender.name: list[float]() for contender in contenders}
    refreshes = {contender.name: list[float]() for contender in contenders}
    for turn in range(rounds):
        for contender in contenders:
            plain[contender.name].append(_timed(contender, device))
        for contender in contenders if turn % 3 == 2 else ():
            if contender.refresh is not None:
                contender.refresh()
                refreshes[contender.name].append(_timed(contender, device))
    return [_timing(contender, plain[contender.name], refreshes[contender.name]) for contender in contenders]


def _timing(contender: peers.Contender, steps: list[float], refreshes: list[float]) -> Timing:
    optimizer = contender.stepper if isinstance(contender.stepper, torch.optim.Optimizer) else None
    return Timing(
        name=contender.name,
        plain=float(np.median(steps)),
        plain_spread=(min(steps), max(steps)),
        refresh=float(np.median(refreshes)) if refreshes else None,
        worst=max(steps + refreshes),
        state_mb=0.0 if optimizer is None else state_bytes(optimizer) / 1e6,
    )


def _timed(contender: peers.Contender, device: torch.device) -> float:
    start = now(device)
    contender.stepper.step()
    return 1e3 * (now(device) - start)


def _staggered(settings: Settings, params: list[Tensor], device: torch.device) -> dict[str, float]:
    """Time one whole interval of staggered refreshes."""
    contender = peers.ours(params, settings.rank, update_proj_gap=settings.gap, stagger=True)
    first = _timed(contender, device)
    steps = [_timed(contender, device) for _ in range(settings.gap)]
    return {"first": first, "median": float(np.median(steps)), "worst": max(steps)}


def captured_energy(params: Sequence[Tensor], rank: int, at_most: int = 12) -> dict[str, float]:
    """Compare the energy that the sketch captures, cold and warm-started, with that of the best basis."""
    from ..optim.core.layout import Layout
    from ..optim.core.projector import Request, sketch
    from ..optim.core.view import MatrixView

    cold: list[float] = []
    warm: list[float] = []
    for index, param in enumerate(params[:: max(1, len(params) // at_most)]):
        assert param.grad is not None
        view = MatrixView.of(param.shape, rank, "std")
        matrix = view.orient(param.grad).float()
        scale = matrix.abs().amax()
        best = _energy(matrix, linalg.exact_basis(matrix, rank, scale.double()).float())
        old = linalg.orthonormal(random.normal(index, view.b, rank, matrix.device))
        for kind, start in ((cold, None), (warm, old)):
            found = sketch(Request(matrix, scale, view, view, Layout(), random.mix(index), start))
            kind.append(_energy(matrix, found.basis) / best)
    return {
        "cold_min": min(cold),
        "cold_mean": float(np.mean(cold)),
        "warm_min": min(warm),
        "warm_mean": float(np.mean(warm)),
    }


def _energy(matrix: Tensor, basis: Tensor) -> float:
    return float((matrix @ basis).double().square().sum())


def _table(title: str, timings: Sequence[Timing], floor: float) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("milliseconds")
    for column in ("step", "min - max", "vs first", "refresh step", *(f"gap {g}" for g in GAPS), "worst", "state"):
        table.add_column(column, justify="right")
    for t in timings:
        table.add_row(
            t.name,
            f"{t.plain:.1f}",
            f"{t.plain_spread[0]:.1f} - {t.plain_spread[1]:.1f}",
            f"{t.plain / floor:.2f}x",
            "-" if t.refresh is None else f"{t.refresh:.0f}",
            *(f"{t.amortised(gap):.1f}" for gap in GAPS),
            f"{t.worst:.0f}",
            f"{t.state_mb:.1f} MB" if t.state_mb else "-",
        )
    return table
