"""What `step-time --peers` times of other packages, those that are installed and run on the device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .floors import LR
from .measure import timed
from .peers import NEVER, Contender

Build = Callable[[list[Tensor], int], Contender]


def projected(params: list[Tensor], rank: int) -> tuple[list[Contender], dict[str, str]]:
    """Neighbours that project: those that could be built, and why the others could not."""
    builds: dict[str, Build] = {
        "galore-torch": _galore_torch,
        "pytorch_optimizer GaLore": _pytorch_optimizer("GaLore"),
        "pytorch_optimizer Fira": _pytorch_optimizer("Fira"),
    }
    return _those_that_run(builds, params, rank)


def eight_bit(params: list[Tensor]) -> tuple[list[Contender], dict[str, str]]:
    """Neighbours whose AdamW has moments in 8 bits."""
    builds: dict[str, Build] = {
        "bitsandbytes AdamW8bit": _plain("bitsandbytes.optim", "AdamW8bit"),
        "torchao AdamW8bit": _plain("torchao.optim", "AdamW8bit"),
        "flashoptim FlashAdamW": _plain("flashoptim", "FlashAdamW"),
    }
    return _those_that_run(builds, params, 0)


def _those_that_run(
    builds: dict[str, Build], params: list[Tensor], rank: int
) -> tuple[list[Contender], dict[str, str]]:
    """Build and step each once: some packages tell only then that they need a GPU."""
    found, missing = [], {}
    for name, build in builds.items():
        try:
            contender = build(params, rank)
            first = timed(contender.stepper.step, params[0].device)
        except Exception as error:  # whatever another package raises, it is no reason to lose the others
            missing[name] = (str(error) or type(error).__name__).splitlines()[0]
        else:
            found.append(replace(contender, first=first))
    return found, missing


def _galore_torch(params: list[Tensor], rank: int) -> Contender:
    build = importlib.import_module("galore_torch").GaLoreAdamW
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    optimizer: Optimizer = build([group], lr=LR, weight_decay=0.01, no_deprecation_warning=True)

    def refresh() -> None:
        for state in optimizer.state.values():
            state["step"] = 0  # it refreshes where the count divides the gap

    return Contender("galore-torch", optimizer, refresh, ("products",))


def _pytorch_optimizer(name: str) -> Build:
    def build(params: list[Tensor], rank: int) -> Contender:
        group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "projection_type": "std"}
        made = getattr(importlib.import_module("pytorch_optimizer"), name)
        optimizer: Optimizer = made([group], lr=LR, weight_decay=0.01)

        def refresh() -> None:
            for own in optimizer.param_groups:
                own["step"] = NEVER - 1  # the next count divides the gap

        floor = ("products", "pass") if name == "Fira" else ("products",)
        return Contender(f"pytorch_optimizer {name}", optimizer, refresh, floor)

    return build


def _plain(module: str, name: str) -> Build:
    def build(params: list[Tensor], rank: int) -> Contender:
        made: Any = getattr(importlib.import_module(module), name)
        return Contender(f"{module.split('.')[0]} {name}", made(params, lr=LR))

    return build
