"""A 7B model trained in the memory of a 24 GB card: GaLore with 8-bit moments, gradient release, bf16 weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim
from ..optim.plan import by_kind
from .gpu_device import Bench
from .models import build_model

GIGABYTE = 10**9


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        model: A name of `bench.models.SHAPES`.
        rank: Rank of the projections.
        lr: Learning rate.
        steps: Steps, of which the budget may leave some out.
        least: Steps below which it is no test.
        batch: Sequences.
        length: Tokens of a sequence.
        gap: Steps between refreshes, so that some refreshes carry moments over.
        cap: Gigabytes that the process may take on the device.
    """

    model: str = "7b"
    rank: int = 1024
    lr: float = 1e-3
    steps: int = 60
    least: int = 50
    batch: int = 1
    length: int = 1024
    gap: int = 40
    cap: float = 24.0


TINY = Training("tiny", rank=16, lr=5e-3, steps=8, least=8, length=32, gap=5)


def train(bench: Bench) -> dict[str, Any]:
    """Train with the memory of the device capped, which ends in an error where it does not suffice.

    Returns:
        Figures, and as "failed" what is wrong with them, or None.
    """
    what = TINY if bench.interpreted else Training()
    bench.release()
    _empty(bench.device)
    with _capped(bench.device, what.cap):
        figures = asdict(what) | _steps(bench, what)
    _empty(bench.device)
    return figures | {"failed": _verdict(figures, what)}


def _steps(bench: Bench, what: Training) -> dict[str, Any]:
    with torch.device(bench.device):
        model = build_model(what.model, max_length=what.length, dtype=torch.bfloat16, checkpointing=True)
    optimizer = optim.GaLore(
        optim.param_groups(model, rank=what.rank, update_proj_gap=what.gap),
        lr=what.lr,
        weight_decay=0.0,
        state_dtype="8bit",
        rounding="stochastic",
    )
    weights = sum(param.nbytes for param in model.parameters())
    handle = optim.enable_gradient_release(model, optimizer)
    losses: list[float] = []
    seconds: list[float] = []
    try:
        for batch in _batches(bench, what, model):
            start = perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            losses.append(float(loss.detach()))  # waits for the device
            bench.sync()
            seconds.append(perf_counter() - start)
            if bench.budget.left() < 5 + 3 * _median(seconds):
                break
    finally:
        handle.remove()
    state = by_kind(optimizer.state.values())
    later = seconds[1:] or seconds
    return {
        "losses": losses,
        "step_s": _median(later),
        "first_step_s": seconds[0],
        "slowest_step_s": max(later),
        "tokens_per_s": what.batch * what.length / _median(later),
        "weights_bytes": weights,
        "state_bytes": sum(state.values()),
        "state": state,
        "unreleased_gradients": sum(param.grad is not None for param in model.parameters()),
        **_peaks(bench.device),
    }


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _batches(bench: Bench, what: Training, model: nn.Module) -> Iterator[Tensor]:
    """Rows that repeat a pattern of 16 random tokens from somewhere in it: easy to predict once it is known."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randint(vocabulary, (16,), generator=generator)
    for _ in range(what.steps):
        starts = torch.randint(16, (what.batch, 1), generator=generator)
        yield pattern[(starts + torch.arange(what.length)) % 16].to(bench.device)


def _verdict(figures: dict[str, Any], what: Training) -> str | None:
    """What is wrong, if anything."""
    losses: list[float] = figures["losses"]
    few = max(1, len(losses) // 6)
    if not all(map(math.isfinite, losses)):
        return "a loss is not finite"
    if len(losses) < what.least:
        return f"only {len(losses)} of {what.least} steps fitted the time"
    if sum(losses[-few:]) > 0.9 * sum(losses[:few]):
        return "the loss does not fall"
    if figures["unreleased_gradients"]:
        return f"{figures['unreleased_gradients']} gradients were not released"
    return None


def _peaks(device: torch.device) -> dict[str, int | None]:
    if device.type != "cuda":
        return {"peak_bytes": None, "peak_reserved_bytes": None}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


@contextmanager
def _capped(device: torch.device, gigabytes: float) -> Iterator[None]:
    """Give this process so much of the device's memory and no more."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    cap: Callable[..., None] = torch.cuda.set_per_process_memory_fraction
    cap(min(1.0, gigabytes * GIGABYTE / total), device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        cap(1.0, device)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
