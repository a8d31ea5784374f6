"""The tables of `lowmem plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..optim.plan import TrainingPlan
from ..optim.planning.model import LAYERS

if TYPE_CHECKING:
    from .plan_rank import RankPlan
    from .plan_world import Cost, World
    from .planner import Knob, Settings

TABLE_WIDTH = 110

PARTS: dict[str, Callable[[TrainingPlan], int | None]] = {
    "weights": lambda p: p.weights,
    "gradients": lambda p: p.optimizer.gradients,
    "  with release, the largest": lambda p: p.optimizer.largest_gradient,
    "moments": lambda p: p.optimizer.moments,
    "bases": lambda p: p.optimizer.bases,
    "scales of moments": lambda p: p.optimizer.scales,
    "corrections of weights": lambda p: p.optimizer.corrections,
    "other state": lambda p: p.optimizer.other,
    "all state": lambda p: p.optimizer.state,
    "workspace of a step": lambda p: p.optimizer.step.plain,
    "  of one with a refresh": lambda p: p.optimizer.step.refresh,
    "  R and N in it": lambda p: p.optimizer.step.buffers,
    "  with release, of one matrix": lambda p: p.optimizer.released.largest,
}


def show(settings: Settings, plans: Mapping[str, Sequence[TrainingPlan]], peak: int, knobs: Sequence[Knob]) -> None:
    """Print what training takes by part, by layer and at its peak, and whether that fits.

    Args:
        settings: What is planned.
        plans: By optimizer, without and with checkpointing; the first is that of the settings.
        peak: The peak of the settings.
        knobs: What could be set otherwise.
    """
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    shape = f"batches of {settings.batch_size} x {settings.length} tokens"
    console.print(f"{settings.model}, weights in {settings.dtype}, {shape}, GB of tensors on one GPU")
    console.print(_optimizers(plans))
    console.print(_activations(next(iter(plans.values()))))
    console.print(
        "A step's workspace is that of torch's operations; a CUDA context and fragments come on top of peaks."
    )
    if settings.budget is not None:
        _verdict(console, settings, peak, knobs)


RANK: dict[str, Callable[[RankPlan], int | None]] = {
    "weights": lambda p: p.weights,
    "gradients": lambda p: p.gradients,
    "moments": lambda p: p.state["moments"],
    "bases": lambda p: p.state["bases"],
    "scales of moments": lambda p: p.state["scales"],
    "corrections of weights": lambda p: p.state["corrections"],
    "other state": lambda p: p.state["other"],
    "weights, gradients, state": lambda p: p.resident,
    "workspace of a step": lambda p: p.workspace,
    "  of one with a refresh": lambda p: p.workspace_refresh,
}

SENT: dict[str, Callable[[RankPlan], Cost]] = {
    "the optimizer, a step": lambda p: p.step,
    "a refresh, beside that": lambda p: p.refresh,
    "the wrapper itself, a step": lambda p: p.own,
    "  no reshard_after_forward": lambda p: p.own_kept,
}


def show_ranks(settings: Settings, world: World, plans: Mapping[str, RankPlan]) -> None:
    """Print what the first of many ranks keeps, and what it sends."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    parts = f", {world.shard} to a copy" if world.shard else ""
    kept = ", the longer side of matrices sharded" if world.kept else ""
    console.print(
        f"{settings.model}, weights in {settings.dtype}, one of {world.size} ranks by {world.parallel}{parts}{kept}"
    )
    console.print(_ranks(plans))
    title, found = next(iter(plans.items()))
    console.print(f"{title}: {_share(found)}")
    console.print(
        "Computed by running the optimizer's code without data; nothing is measured. All-reduces count twice;"
    )
    console.print("searches for bases run to their end. Activations and weights gathered for a layer are not in it.")


def _ranks(plans: Mapping[str, RankPlan]) -> Table:
    table = Table()
    table.add_column("of a rank")
    for title in plans:
        table.add_column(title, justify="right")
    for name, read in RANK.items():
        sizes = (gigabytes(read(found)) for found in plans.values())
        table.add_row(f"{name}, GB", *sizes, end_section=name == list(RANK)[-1])
    for name, cost in SENT.items():
        costs = [cost(found) for found in plans.values()]
        table.add_row(f"{name}, GB", *(gigabytes(each.bytes) for each in costs))
        table.add_row("    M elements", *(f"{each.elements / 1e6:,.3f}" for each in costs))
        if any(each.calls for each in costs):
            table.add_row("    collectives", *(f"{each.calls:,}" for each in costs))
    return table


def _share(found: RankPlan) -> str:
    """Traffic beside the wrapper's, and the work of a rank."""
    sent = found.step.bytes + found.amortised
    beside = (
        f"sends {100 * sent / found.own.bytes:.2f} % of what the wrapper does" if found.own.bytes else "sends nothing"
    )
    work = (
        f"{found.step.flops / 1e12:,.3f} TFLOP of products a step, {found.refresh.flops / 1e12:,.3f} more in a refresh"
    )
    return f"{beside}, refreshes spread over their interval; {work}"


def _optimizers(plans: Mapping[str, Sequence[TrainingPlan]]) -> Table:
    table = Table()
    table.add_column("GB")
    for title in plans:
        table.add_column(title, justify="right")
    last = list(PARTS)[-1]
    for name, read in PARTS.items():
        table.add_row(name, *(gigabytes(read(pair[0])) for pair in plans.values()), end_section=name == last)
    for place, mode in enumerate(("", ", checkpointing")):
        pairs = [pair[place] for pair in plans.values()]
        table.add_row(f"peak{mode}", *(gigabytes(found.peak) for found in pairs))
        table.add_row(f"peak{mode}, release", *(gigabytes(found.peak_released) for found in pairs))
    return table


def _activations(pair: Sequence[TrainingPlan]) -> Table:
    table = Table()
    for title in ("activations kept, GB", *LAYERS, "sum"):
        table.add_column(title, justify="left" if title.endswith("GB") else "right")
    for found, title in zip(pair, ("all", "checkpointing"), strict=True):
        sizes = found.passes.activations
        table.add_row(title, *(gigabytes(sizes[name]) for name in LAYERS), gigabytes(sum(sizes.values())))
    return table


def _verdict(console: Console, settings: Settings, peak: int, knobs: Sequence[Knob]) -> None:
    budget = settings.budget or 0
    chosen = [flag for flag, on in (("--release", settings.release), ("--checkpointing", settings.checkpointing)) if on]
    how = f" with {' '.join(chosen)}" if chosen else ""
    if peak <= budget:
        console.print(f"fits: {gigabytes(peak)} of {gigabytes(budget)} GB{how}, {gigabytes(budget - peak)} GB to spare")
        return
    console.print(f"does not fit: {gigabytes(peak)} of {gigabytes(budget)} GB{how}. Knobs, alone and together:")
    table = Table()
    for title in ("turn", "peak, GB", ""):
        table.add_column(title, justify="right" if "GB" in title else "left")
    for knob in knobs:
        table.add_row(knob.flag, gigabytes(knob.peak), "fits" if knob.fits else "does not fit")
    console.print(table)
    if not any(knob.fits for knob in knobs):
        console.print("nothing of this fits: take another --optimizer or --rank, a smaller model or a larger card")


def gigabytes(size: int | None) -> str:
    """A size in 10^9 bytes; small ones with more digits."""
    return "-" if not size else f"{size / 1e9:,.3f}" if size >= 1e6 else f"{size / 1e9:.6f}"
