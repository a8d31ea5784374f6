"""Whole optimizer steps on the layers of a LLaMA, beside the neighbours'; refreshes apart."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import optim
from ..optim.plan import by_kind
from .floors import LR
from .gpu_device import Bench
from .models import SHAPES, Shape
from .optimizers import state_bytes
from .peers import NEVER

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Model:
    """A model of which some layers are measured.

    Args:
        name: A name of `SHAPES`.
        rank: Rank of the projections.
        layers: Layers that are measured.
        seconds: Time that one contender may take.
    """

    name: str
    rank: int
    layers: int
    seconds: float

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return SHAPES[self.name]


MODELS = (Model("60m", 128, 8, 3), Model("130m", 256, 12, 4), Model("1b", 512, 4, 5), Model("7b", 1024, 2, 8))
TINY_MODELS = (Model("tiny", 16, 1, 1),)
SVD_SECONDS = {"60m": 15, "130m": 25, "1b": 60, "7b": 150, "tiny": 1}
"""Time that the bases of galore-torch may take: it computes an exact SVD of every matrix in its first step."""


def ours() -> dict[str, Build]:
    """The optimizers of this package, in the order in which they are measured; 8-bit ones round stochastically."""
    shared: dict[str, Any] = {"lr": LR, "update_proj_gap": NEVER}
    coded: dict[str, Any] = {"state_dtype": "8bit", "rounding": "stochastic"}
    return {
        "AdamW8bit": lambda groups: optim.AdamW8bit(_flat(groups), lr=LR, rounding="stochastic"),
        "GaLore fp32": lambda groups: optim.GaLore(groups, **shared),
        "GaLore 8bit": lambda groups: optim.GaLore(groups, **shared, **coded),
        "Fira 8bit": lambda groups: optim.Fira(groups, **shared, **coded),
        "Frugal": lambda groups: optim.Frugal(_by_density(groups), **shared),
        "Flora": lambda groups: optim.Flora(groups, **shared),
        "OnlineSubspaceDescent": lambda groups: optim.OnlineSubspaceDescent(groups, lr=LR),
        "Adafactor": lambda groups: optim.Adafactor(_flat(groups), lr=LR),
    }


def neighbours() -> dict[str, Build]:
    """Other packages' optimizers; they raise ImportError where they are not installed."""

    def galore_torch(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        build: Any = importlib.import_module("galore_torch").GaLoreAdamW
        extra = {"update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
        made = [group | extra if group["rank"] else {"params": group["params"]} for group in groups]
        found: torch.optim.Optimizer = build(made, lr=LR, no_deprecation_warning=True)
        return found

    def coded(module: str) -> Build:
        return lambda groups: importlib.import_module(module).AdamW8bit(_flat(groups), lr=LR)

    return {
        "torch AdamW fused": lambda groups: torch.optim.AdamW(_flat(groups), lr=LR, fused=True),
        "bitsandbytes AdamW8bit": coded("bitsandbytes.optim"),
        "torchao AdamW8bit": coded("torchao.optim"),
        "galore-torch": galore_torch,
    }


def _flat(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _by_density(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"params": group["params"], "density": 0.25 if group["rank"] else None} for group in groups]


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time all contenders, galore-torch last: its exact SVDs take longer than everything else."""
    models = TINY_MODELS if bench.interpreted else MODELS
    for late in (False, True):
        for model in models:
            found = {**ours(), **neighbours()}
            for name, build in found.items():
                if late != (name == "galore-torch"):
                    continue
                row = {"model": model.name, "rank": model.rank, "optimizer": name, "layers": model.layers}
                needed = model.seconds + (SVD_SECONDS[model.name] if late else 0)
                if bench.budget.left() < needed:
                    yield row | {"skipped": f"needs up to {needed} s"}
                    continue
                yield row | outcome(bench, lambda model=model, build=build: _time(bench, model, build))  # type: ignore[misc]


def outcome(bench: Bench, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found of one contender, or why nothing is."""
    try:
        return run()
    except ImportError as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def parameters(bench: Bench, model: Model) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of some layers and all that is not projected, bf16 with gradients."""
    hidden, ffn, _, layers, vocabulary = model.shape
    sides = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    made = []
    for shapes in (sides * model.layers, [(vocabulary, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)):
        params: list[Tensor] = [nn.Parameter(0.02 * bench.normal(*shape).bfloat16()) for shape in shapes]
        for param in params:
            param.grad = 1e-3 * bench.normal(*param.shape).bfloat16()
        made.append(params)
    return made[0], made[1]


def _time(bench: Bench, model: Model, build: Build) -> dict[str, Any]:
    """Milliseconds of projected layers, scaled to all of them, and of the rest."""
    matrices, rest = parameters(bench, model)
    scale = model.shape.layers / model.layers
    layers = _one(bench, model, build([{"params": matrices, "rank": model.rank}]), scale)
    gc.collect()
    plain = _one(bench, model, build([{"params": rest, "rank": None}]), 1.0)
    whole = {name: layers[name] + plain[name] for name in ("ms", "floor_ms", "state_bytes")}
    return whole | {
        "layers_ms": layers["ms"],
        "rest_ms": plain["ms"],
        "refresh_ms": layers.get("refresh_ms"),
        "first_ms": layers["first_ms"],
        "over_floor": whole["ms"] / whole["floor_ms"],
        "bound": layers["bound"],
    }


def _one(bench: Bench, model: Model, optimizer: torch.optim.Optimizer, scale: float) -> dict[str, Any]:
    repeats = 1 if bench.interpreted else 10
    first = bench.time_steps(optimizer.step, 1)[0]
    bench.time_steps(optimizer.step, 0 if bench.interpreted else 3)
    steps = bench.time_steps(optimizer.step, repeats)
    waits = [state["until_refresh"] for state in optimizer.state.values() if "until_refresh" in state]
    refreshable = bool(waits) and all(bool(torch.isfinite(wait)) for wait in waits)

    def due() -> None:
        for wait in waits:
            wait.zero_()

    found: dict[str, Any] = {"ms": scale * float(np.median(steps)), "first_ms": scale * first}
    if type(optimizer).__module__.startswith("galore_torch") and model.rank in _ranks(optimizer):
        found["refresh_ms"] = scale * first  # an exact SVD of every matrix, too slow to be repeated
    if refreshable:
        found["refresh_ms"] = scale * float(
            np.median(bench.time_steps(optimizer.step, 1 if bench.interpreted else 2, due))
        )
    found["state_bytes"] = scale * state_bytes(optimizer)
    floor = bench.floor(scale * _traffic(optimizer), scale * _flops(optimizer, model.rank))
    return found | {"floor_ms": floor.ms, "bound": floor.bound}


def _ranks(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [group.get("rank") for group in optimizer.param_groups]


def _traffic(optimizer: torch.optim.Optimizer) -> float:
    """Weights read and written, gradients read, moments read and written, bases read."""
    sizes = sum(param.nbytes for group in optimizer.param_groups for param in group["params"])
    bases = by_kind(optimizer.state.values())["bases"]
    return float(3 * sizes + 2 * (state_bytes(optimizer) - bases) + bases)


def _flops(optimizer: torch.optim.Optimizer, rank: int) -> float:
    """Two products for every matrix that has a dense basis."""
    flops = 0.0
    for param, state in optimizer.state.items():
        basis = state.get("basis")
        if isinstance(basis, Tensor) and basis.ndim == 2:
            flops += 4.0 * param.numel() * rank
    return flops
