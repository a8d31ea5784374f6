"""What training with an optimizer takes in memory, known before anything is allocated.

State follows from its description. For GaLore with `state_dtype="8bit"` a projected weight (m, n) keeps

    basis      min(m, n) r                        elements of the weight's dtype, unless `basis_dtype` is another
    moments    2 max(m, n) r                      bytes of codes
    scales     8 max(m, n) ceil(r / 128)          bytes: fp32, one for 128 codes of a row, twice

with the default `proj_type="std"`, and a plain parameter of (rows, cols)

    moments    2 rows cols                        bytes of codes
    scales     8 rows ceil(cols / 128)            bytes
    or, of a vector, of fewer than 4096 elements or with rows of fewer than 16,
    moments    8 rows cols                        bytes: fp32

What a step takes besides, and the forward and backward pass, is measured: the optimizer's and the model's own code run
on tensors without data, every one of which is counted while it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .core.lifecycle import Lifecycle
from .planning.model import Loss, Pass, trace
from .planning.state import KINDS, by_kind, described, kept, kind
from .planning.steps import Step, alone, kind_of, largest, together, without_data
from .planning.watch import Watch, pieces_of

__all__ = [
    "KINDS",
    "Pass",
    "Plan",
    "Step",
    "TrainingPlan",
    "Watch",
    "by_kind",
    "kind",
    "plan",
    "plan_training",
]


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of training by what they hold.

    Args:
        weights: All parameters.
        gradients: One for every parameter.
        largest_gradient: The largest of them: about all that there is at a time with gradient release.
        moments: First and second moments, those of a basis included.
        bases: Projections and what they are coded with, or the indices that stand for them.
        scales: Scales of coded moments.
        corrections: What compensated bf16 weights keep.
        other: All other state, counters left out, which are a few numbers of the host.
        step: What a step of all parameters at once allocates.
        released: What the largest step of a single parameter allocates.
    """

    weights: int
    gradients: int
    largest_gradient: int
    moments: int
    bases: int
    scales: int
    corrections: int
    other: int
    step: Step
    released: Step

    @property
    def state(self) -> int:
        """All state that the optimizer keeps between steps."""
        return self.moments + self.bases + self.scales + self.corrections + self.other

    @property
    def total(self) -> int:
        """All but activations, in a loop that calls `step()`."""
        return self.weights + self.gradients + self.state + self.step.largest

    @property
    def total_released(self) -> int:
        """All but activations, with `enable_gradient_release`."""
        return self.weights + self.largest_gradient + self.state + self.released.largest


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Bytes of whole training steps on one device.

    Args:
        weights: All parameters and buffers of the model, frozen ones too.
        optimizer: What the optimizer takes.
        passes: What the forward and backward pass take.
        peak: The most at a time of a loop that calls `step()` after `backward()`.
        peak_released: The same with `enable_gradient_release`; None where the optimizer does not allow it.
    """

    weights: int
    optimizer: Plan
    passes: Pass
    peak: int
    peak_released: int | None

    def fits(self, budget: int, *, release: bool = False) -> bool:
        """Tell whether the peak is within so many bytes, with or without gradient release."""
        peak = self.peak_released if release else self.peak
        return peak is not None and peak <= budget


def plan_training(
    model: nn.Module | Any,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    shape: tuple[int, int] = (1, 1024),
    *,
    checkpointing: bool | None = None,
    loss: Loss | None = None,
    device: str = "cuda",
) -> TrainingPlan:
    """Tell what training steps of a model take at most, activations included, without allocating any of it.

        with torch.device("meta"):
            model = build()
        found = plan_training(model, GaLore(param_groups(model, rank=1024), state_dtype="8bit"), (1, 1024))
        print(found.peak_released, found.passes.activations)

    Args:
        model: A model, with data or without, or a configuration of transformers, which `AutoModelForCausalLM` builds.
        optimizer: An optimizer over its parameters, or a function that makes one of the model.
        shape: Sequences of a micro-batch, and their tokens.
        checkpointing: Recompute layers in the backward pass, for models of Hugging Face. Default: as the model does.
        loss: What is differentiated, from the model and int64 tokens of that shape. Default: `.loss` of
            `model(input_ids=tokens, labels=tokens)`.
        device: "cuda" or "cpu", as in `plan`.

    Returns:
        Bytes of tensors. What a device's context takes, and what its allocator loses between blocks, is not in them.

    Raises:
        RuntimeError: As `plan`.
        TypeError: The optimizer is ready-made, and the model only a configuration.
        ValueError: The device is another, the model cannot run without data or has no switch for checkpointing.
    """
    if not isinstance(model, nn.Module):
        if isinstance(optimizer, Optimizer):
            raise TypeError("got a configuration and an optimizer: pass a function, lambda model: GaLore(...)")
        model = _from_config(model)
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(model)
    needed = needs(made, device)
    return needed.train(model, trace(model, shape, checkpointing=checkpointing, loss=loss, device=device))


def _from_config(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def plan(optimizer: Optimizer, device: str = "cuda") -> Plan:
    """Tell what training with an optimizer takes, without allocating any of it.

        with torch.device("meta"):
            model = build()
        print(plan(GaLore(param_groups(model, rank=1024), state_dtype="8bit")).state)

    Args:
        optimizer: An optimizer of this package or of torch; its parameters may have data or none, and are not touched.
        device: "cuda" or "cpu": a step works in pieces of the size that the device gets. Default: a GPU.

    Returns:
        Bytes, for training on one device. What a step allocates is that of torch's operations: kernels of Triton
        allocate less.

    Raises:
        RuntimeError: Ranks are left to the gradients (`rank="auto"`) and not chosen yet.
        ValueError: The device is another.
    """
    return needs(optimizer, device).plan


@dataclass(frozen=True, slots=True)
class Needs:
    """What an optimizer takes, and what the step of each of its parameters allocates.

    Args:
        plan: What it takes.
        steps: Bytes by the identity of the parameter; None where parameters cannot be stepped one by one.
    """

    plan: Plan
    steps: dict[int, int] | None

    def train(self, model: nn.Module, passes: Pass) -> TrainingPlan:
        """Add the forward and backward pass of the model."""
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        resident, released = weights + self.plan.state, None
        peak = resident + max(passes.peak, self.plan.gradients + self.plan.step.largest)
        if self.steps is not None:
            positions = {position: self.steps.get(id(param), 0) for position, param in enumerate(model.parameters())}
            released = resident + passes.released(positions)
        return TrainingPlan(weights, self.plan, passes, peak, released)


def needs(optimizer: Optimizer, device: str = "cuda") -> Needs:
    """Plan an optimizer, for training with any pass."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"got device={device!r}: plans are for 'cuda' or 'cpu'")
    with pieces_of(device):
        if isinstance(optimizer, Lifecycle):
            state = described(optimizer)  # first, as it refuses what is not decided yet
            shadow = without_data(optimizer, device)
        else:
            shadow = without_data(optimizer, device)
            state = kept(shadow)
        every, single = together(shadow), alone(shadow)
    sizes = [param.nbytes for group in shadow.param_groups for param in group["params"]]
    found = Plan(
        weights=sum(sizes),
        gradients=sum(sizes),
        largest_gradient=max(sizes, default=0),
        **state,
        step=every,
        released=largest(single.values()),
    )
    steps = None
    if isinstance(optimizer, Lifecycle) and optimizer.needs_all_gradients() is None:
        groups = enumerate(optimizer.param_groups)
        params = [(index, param) for index, group in groups for param in group["params"]]
        # Gradient release takes the norm of a gradient before its step, on a CPU that of a copy in fp32.
        norms = {id(p): 4 * p.numel() if device == "cpu" and p.itemsize < 4 else 0 for _, p in params}
        steps = {id(p): max(single[kind_of(index, p)].largest, norms[id(p)]) for index, p in params}
    return Needs(found, steps)
