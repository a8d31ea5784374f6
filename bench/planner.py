"""Plans of training runs: models by name, settings, and what else could be set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..optim.plan import Needs, Pass, TrainingPlan, needs
from ..optim.planning.model import trace
from .errors import UserError, one_line
from .models import SHAPES
from .optimizers import build_optimizer, run_options

MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What is planned.

    Args:
        model: A name of `bench.models.SHAPES` or a Hugging Face config JSON.
        optimizer: A name of `lowmem optimizers`.
        options: Its options.
        dtype: Dtype of weights, gradients and activations.
        batch_size: Sequences of a micro-batch.
        length: Tokens of a sequence.
        checkpointing: Recompute layers in the backward pass.
        release: Step every parameter in the backward pass.
        budget: Bytes that there are; None does not judge.
    """

    model: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    batch_size: int = 1
    length: int = 256
    checkpointing: bool = False
    release: bool = False
    budget: int | None = None

    @property
    def title(self) -> str:
        """The optimizer and its options."""
        return " ".join([self.optimizer, *(f"{name}={value}" for name, value in self.options.items())])

    def but(self, changes: Mapping[str, Any]) -> Settings:
        """The same with other values of its fields and of the optimizer's options."""
        own = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        options = {name: value for name, value in changes.items() if name not in own}
        return replace(self, **own, options={**self.options, **options})


@dataclass(frozen=True)
class Knob:
    """What could be set otherwise.

    Args:
        flag: How it is written.
        peak: Peak with it.
        fits: Whether that is within the budget.
    """

    flag: str
    peak: int
    fits: bool


class Planner:
    """Plans for settings of one model; what they have in common is found once."""

    def __init__(self, model: str, dtype: str) -> None:
        self._model = skeleton(model, MODEL_DTYPES[dtype])
        self._needs: dict[Any, Needs] = {}
        self._passes: dict[Any, Pass] = {}

    def plan(self, settings: Settings, make: Callable[[nn.Module], Optimizer] | None = None) -> TrainingPlan:
        """Plan the optimizer of the settings, or another one in its place.

        Raises:
            UserError: The optimizer cannot be planned, or the model not be traced.
        """
        title = settings.title if make is None else make
        try:
            if title not in self._needs:
                made = (make or build(settings))(self._model)
                self._needs[title] = needs(made)
            return self._needs[title].train(self._model, self.passes(settings))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise UserError(f"{settings.title} cannot be planned: {one_line(error)}") from error

    def passes(self, settings: Settings) -> Pass:
        """The forward and backward pass."""
        shape, on = (settings.batch_size, settings.length), settings.checkpointing
        if (shape, on) not in self._passes:
            self._passes[shape, on] = trace(self._model, shape, checkpointing=on)
        return self._passes[shape, on]

    def peak(self, settings: Settings) -> int:
        """Bytes at the peak.

        Raises:
            UserError: Gradient release is asked of an optimizer that does not allow it.
        """
        found = self.plan(settings)
        if not settings.release:
            return found.peak
        if found.peak_released is None:
            raise UserError(f"--release: {settings.optimizer} cannot step parameters one by one; leave --release out")
        return found.peak_released

    def knobs(self, settings: Settings) -> list[Knob]:
        """What each knob does by itself and, if none is enough, those together that lower the peak until it fits."""
        budget = settings.budget or 0
        peaks = {flag: self.peak(settings.but(changes)) for flag, changes in self._choices(settings)}
        found = [Knob(flag, peak, peak <= budget) for flag, peak in peaks.items()]
        if any(knob.fits for knob in found):
            return found
        together, names, lowest = settings, list[str](), self.peak(settings)
        while lowest > budget:
            for flag, changes in self._choices(settings):
                tried = together.but(changes)
                if flag not in names and (peak := self.peak(tried)) < lowest:
                    together, lowest, names = tried, peak, [*names, flag]
                    break
            else:
                break
        return [*found, Knob(" ".join(names), lowest, lowest <= budget)] if len(names) > 1 else found

    def _choices(self, settings: Settings) -> list[tuple[str, dict[str, Any]]]:
        """Those that change no result first, then those that change it little."""
        options = run_options(settings.optimizer)
        found: list[tuple[str, dict[str, Any]]] = []
        if not settings.release and self.plan(settings).peak_released is not None:
            found.append(("--release", {"release": True}))
        if not settings.checkpointing:
            found.append(("--checkpointing", {"checkpointing": True}))
        if settings.batch_size > 1:
            found.append((f"--batch-size {settings.batch_size // 2}", {"batch_size": settings.batch_size // 2}))
        if "state_dtype" in options and settings.options.get("state_dtype", "float32") == "float32":
            found.append(("--state-dtype 8bit", {"state_dtype": "8bit"}))
        rank = settings.options.get("rank", getattr(options.get("rank"), "default", None))
        if isinstance(rank, int) and rank > 1:
            found.append((f"--rank {rank // 2}", {"rank": rank // 2}))
        if settings.length > 1:
            found.append((f"--length {settings.length // 2}", {"length": settings.length // 2}))
        return found


def build(settings: Settings) -> Callable[[nn.Module], Optimizer]:
    """What makes the optimizer of a model."""
    return lambda model: build_optimizer(settings.optimizer, settings.options, model, seed=0)


def skeleton(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a model without data: a named shape by torch alone, others by transformers.

    Raises:
        UserError: The name is unknown, or its file no configuration of a causal language model.
    """
    with torch.device("meta"):
        if name in SHAPES:
            from .skeleton import Skeleton

            return Skeleton(SHAPES[name], dtype)
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise UserError(f"unknown model {name!r}: choose {', '.join(SHAPES)}, or give a config JSON")
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config = AutoConfig.for_model(values.pop("model_type", "missing"), **values)
            config.use_cache = False
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # validators of configurations raise many kinds
            raise UserError(f"{path} is no configuration of a language model: {one_line(error)}") from error
    return model.train()
