"""The commands of `lowmem`; what they need is imported when they run, so that `--help` is fast."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import DTYPES, RunConfig
from .errors import UserError, did_you_mean

app = typer.Typer(
    name="lowmem",
    help="Memory-efficient optimizers: pre-train a LLaMA with one, compare several.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
OPEN_ENDED = {"allow_extra_args": True, "ignore_unknown_options": True}

Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/MODEL-OPTIMIZER")]
GridNames = Annotated[str, typer.Option(help="Add the grids of bench/grids.py: all, or names such as adamw,galore.")]
GridRank = Annotated[int | None, typer.Option(min=1, help="Rank in --optimizers.", show_default="hidden size / 4")]
GridGap = Annotated[int | None, typer.Option(min=1, help="update_proj_gap in --optimizers.", show_default="50")]
SaveEvery = Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 saves at the end only.")]

Parallel = Annotated[
    str,
    typer.Option(
        help="none, or for the processes that torchrun starts: ddp copies the model, fsdp2 shards it, hsdp shards it "
        "over each half of them, tp splits its matrices. A step has --batch-size x --accumulation x ranks sequences; "
        "all ranks of tp read the same ones, and count as one."
    ),
]


def run_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command, in place of its `**shared`, one flag for every field of `RunConfig`."""
    hints = typing.get_type_hints(RunConfig)
    flags = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(help=field.metadata["help"])],
        )
        for field in fields(RunConfig)
        if "help" in field.metadata
    ]
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=own + flags)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in own + flags}
    return command


@app.command(
    context_settings=OPEN_ENDED,
    epilog="Every option of the optimizer is a flag too, such as --lr 1e-2 --rank 64: see lowmem optimizers NAME.",
)
@run_flags
def pretrain(
    context: typer.Context,
    *,
    optimizer: Annotated[str, typer.Option(help="One of those that `lowmem optimizers` lists.")] = "adamw",
    out: Out = None,
    save_every: SaveEvery = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    stop_after: Annotated[int, typer.Option(min=0, help="Stop early, with a checkpoint, after so many steps.")] = 0,
    parallel: Parallel = "none",
    **shared: Any,
) -> None:
    """Pre-train a LLaMA on real text with one optimizer."""
    config = RunConfig(**shared, optimizer=optimizer, options=_options(context, optimizer))
    from .pretrain import Session
    from .pretrain import pretrain as run

    folder = out or Path("runs") / f"{Path(config.model).stem}-{optimizer}"
    run(config, folder, Session(resume, save_every, stop_after, parallel))


@app.command()
@run_flags
def compare(
    entries: Annotated[
        list[str] | None, typer.Argument(help='Such as "adamw lr=1e-3|2e-3" "galore lr=1e-2 rank=32".', metavar="ENTRY")
    ] = None,
    *,
    optimizers: GridNames = "",
    rank: GridRank = None,
    gap: GridGap = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every best point: --seed and those after it.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/compare"),
    save_every: SaveEvery = 0,
    **shared: Any,
) -> None:
    """Run several optimizers, every run in its own process, and write a table and a picture.

    Values with | between make a grid; of its points, the one of lowest final validation loss stands for the entry.
    """
    config = RunConfig(**shared)
    from .compare import Plan
    from .compare import compare as run
    from .grids import published
    from .search import parse_entry

    chosen = [parse_entry(text) for text in entries or []]
    run(chosen + published(optimizers, config, rank, gap), Plan(config, out, seeds, save_every))


@app.command("step-time")
def step_time(
    *,
    model: Annotated[str, typer.Option(help="A model name or a config JSON; several with commas between.")] = "60m",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the projections.")] = 128,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, of weights and gradients; or fp32,bf16.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=3, help="Timed steps of each contender; they take turns.")] = 12,
    gap: Annotated[int, typer.Option(min=1, help="Interval of the run with staggered refreshes.")] = 200,
    peers: Annotated[bool, typer.Option("--peers", help='Time the neighbours too (extra "peers").')] = False,
    methods: Annotated[bool, typer.Option("--methods", help="Time every method of the package.")] = False,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Time moments in 8 bits too.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file, with a picture.", show_default="not written")] = None,
) -> None:
    """Time optimizer steps side by side: floors, ours, torch's, the neighbours."""
    for one in dtype.split(","):
        _check_dtype(one)
    from .step_time import Settings
    from .step_time import step_time as run

    run(Settings(model, rank, dtype, rounds, gap, peers, methods, eight_bit), out)


@app.command(
    "plan",
    context_settings=OPEN_ENDED,
    epilog="Every option of the optimizer is a flag too, such as --rank 1024 --state-dtype 8bit (or --state 8bit).",
)
def plan_memory(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option(help="A model name or a config JSON.")] = "7b",
    optimizer: Annotated[str, typer.Option(help="One of those that `lowmem optimizers` lists.")] = "galore",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16: the type of weights, gradients, activations.")] = "bf16",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a micro-batch.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 256,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    release: Annotated[bool, typer.Option("--release", help="Step parameters in the backward pass.")] = False,
    budget: Annotated[str, typer.Option(help="Memory that there is, such as 24GB or 24GiB.")] = "",
    world: Annotated[int, typer.Option(min=0, help="Plan one of so many ranks, and its traffic; 0 is one GPU.")] = 0,
    parallel: Annotated[str, typer.Option(help="With --world: fsdp2, hsdp or ddp.")] = "fsdp2",
    shard: Annotated[int, typer.Option(min=0, help="With hsdp: ranks that share a copy.")] = 0,
    kept: Annotated[bool, typer.Option("--kept", help="Sharded by shard_placement_fn=kept_shard.")] = False,
    replicas: Annotated[bool, typer.Option("--replicas", help="With ddp: ranks share the search for bases.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.", show_default="not written")] = None,
) -> None:
    """Tell what training takes in memory, beside AdamW, without allocating it; with --budget also what to turn."""
    _check_dtype(dtype)
    values = _options(context, optimizer, state="state_dtype")
    from .compiler import postpone_compiler
    from .plan import parse_bytes, plan_ranks
    from .plan import plan_memory as run
    from .plan_world import World, refuse_together
    from .planner import Settings

    refuse_together(context, world)
    if world:
        ranks = World(world, parallel, shard or None, kept, replicas)
        plan_ranks(Settings(model, optimizer, values, dtype), ranks, out)
        return
    postpone_compiler()
    room = parse_bytes(budget) if budget else None
    run(Settings(model, optimizer, values, dtype, batch_size, length, checkpointing, release, room), out)


@app.command("gpu-check")
def gpu_check(
    *,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Run every part in Triton's interpreter on tiny shapes; no GPU needed.")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for all; what no longer fits is left out.")] = 10.0,
    only: Annotated[str, typer.Option(help="Parts, such as kernels,steps: kernels, times, steps, graphs, train.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON file.", show_default="bench/results/gpu_check_DEVICE.json")
    ] = None,
) -> None:
    """Check and time all kernels and optimizers on a GPU, and train a 7B model in 24 GB."""
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do
    from .gpu_check import Settings
    from .gpu_check import gpu_check as run

    if not run(Settings(interpret, minutes, only), out):
        raise typer.Exit(1)


@app.command()
def optimizers(
    name: Annotated[str, typer.Argument(help="An optimizer; without it all names are listed.")] = "",
) -> None:
    """List the optimizers, or the options of one."""
    from .optimizers import available, run_options

    if not name:
        typer.echo("\n".join(available()))
        return
    for option in run_options(name).values():
        typer.echo(f"{option.flag:<24} {'|'.join(option.takes):<24} default {option.default}")


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype}: it must be {' or '.join(DTYPES)}")


def _options(context: typer.Context, optimizer: str, **aliases: str) -> dict[str, Any]:
    """Read the flags that are the optimizer's options; `aliases` are short names of some."""
    from .optimizers import run_options
    from .options import flags_to_texts, parse_options

    options = run_options(optimizer)
    short = {alias: options[name] for alias, name in aliases.items() if name in options}
    texts = flags_to_texts(context.args, options | short)
    for alias in short.keys() & texts:
        if short[alias].name in texts:
            raise UserError(f"--{alias} is short for {short[alias].flag}: give one of them")
        texts[short[alias].name] = texts.pop(alias)
    _refuse_unknown(context, optimizer, texts, options)
    return parse_options(optimizer, options, texts)


def _refuse_unknown(context: typer.Context, optimizer: str, texts: dict[str, str], options: dict[str, Any]) -> None:
    fixed = [parameter.name or "" for parameter in context.command.params]
    for name in texts:
        if name not in options:
            flags = ["--" + other.replace("_", "-") for other in [*options, *fixed]]
            flag, valid = "--" + name.replace("_", "-"), " ".join(option.flag for option in options.values())
            said = f"unknown flag {flag}.{did_you_mean(flag, flags)} Flags of {optimizer}: {valid}"
            raise UserError(f"{said}; the others: lowmem {context.info_name} --help")
