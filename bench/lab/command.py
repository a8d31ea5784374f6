"""The command `lowmem ablate`; what it needs is imported when it runs."""

from __future__ import annotations

import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..commands import SaveEvery, run_flags
from ..errors import Interrupted, UserError

Entries = Annotated[
    list[str] | None,
    typer.Argument(help='Such as "adamw lr=1e-3|2e-3" "galore lr=1e-2 rank=32|64 dtype=fp32|bf16".', metavar="ENTRY"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE or NAME=VALUE|VALUE: set an option in every run that has it; repeatable."),
]
JUST_REPORT = "Run nothing: make the report of what is there."

HELP = """Run every point of a grid with every seed, and write one report of all of them.

The grid comes from ENTRYs, whose values with | between are its points (options of the optimizer or of pretrain), from a
YAML --file, or from a --preset. Runs that are finished, or have diverged, are not run again, and unfinished ones go on
from their checkpoint; a run that fails does not stop the others. The report is a page (ablate.html), a picture, a
summary in Markdown and JSON, in --out.

A file:

\b
    shared: {model: 9m, steps: 100, dtype: [fp32, bf16]}  # options of pretrain;
    seeds: 3                                              # a list is an axis
    grid:
      - adamw lr=1e-3|2e-3                                # an ENTRY, or this:
      - {optimizer: galore, lr: [1e-2, 2e-2], rank: [32, 64], carry: [rotate, keep]}
    cases:                                                # what depends on others
      - {when: {dtype: bf16, optimizer: galore}, set: {rounding: stochastic}}
    title: Rounding of bf16                               # of the report
    notes: [What differs from the paper.]                 # under it
    paper:                                                # perplexities beside ours, of loss: val or train
      source: A paper, Table 2
      loss: val
      figures: [{optimizer: adamw, dtype: bf16, perplexity: 34.06}]

Values are compared as they are written: when: {lr: 0.001} asks for no lr=1e-3. What no point has is refused.
"""


@run_flags
def ablate(
    context: typer.Context,
    entries: Entries = None,
    *,
    file: Annotated[Path | None, typer.Option(help="YAML file of the grid.")] = None,
    preset: Annotated[str, typer.Option(help="A packaged file: those of the papers' tables and of our results.")] = "",
    put: Sets = None,
    seeds: Annotated[
        str,
        typer.Option(help="How many, --seed and those after it; or a list: 0,1,5. Without it the file's, or 1."),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs. Without it runs/NAME of the file, or runs/ablate.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share threads and GPUs.")] = 1,
    executor: Annotated[
        str, typer.Option(help='processes of this machine, or tasks of a ray cluster (extra "ray").')
    ] = "processes",
    save_every: SaveEvery = 0,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Delete weights and checkpoints of runs that are finished, or have diverged."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, their tokens and estimated state, and run nothing.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help=JUST_REPORT)] = False,
    **shared: Any,
) -> None:
    """Run every point of a grid with every seed, and write one report of all of them."""
    from .points import override, refuse_idle
    from .spec import Lab, parse_seeds, read_file, read_preset

    if file and preset:
        raise UserError(f"--file {file} --preset {preset}: give one of them")
    lab = read_file(file) if file else read_preset(preset) if preset else Lab("Ablation", [])
    lab = replace(lab, grid=[*lab.grid, *_entries(entries)])
    if lab.cases or lab.paper.figures:
        refuse_idle(lab)
    given = [(name, str(value)) for name, value in shared.items() if _said(context, name)]
    for name, text in [*given, *map(_pair, put or [])]:
        lab = override(lab, name, text)
    if seeds:
        lab = replace(lab, seeds=parse_seeds(seeds))
    if dry_run:
        from .dry_run import dry_run as show

        show(lab)
        return
    from .ablate import Settings
    from .ablate import ablate as run

    folder = out or Path("runs") / (file.stem if file else preset or "ablate")
    command = shlex.join(["lowmem", *sys.argv[1:]])
    settings = Settings(folder, jobs, executor, save_every, prune=prune, run=not report_only, command=command)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers of clusters end a job
    try:
        run(lab, settings)
    except KeyboardInterrupt:
        said = "interrupted; the same command goes on, from checkpoints where --save-every made some"
        raise Interrupted(said) from None
    finally:
        signal.signal(signal.SIGTERM, before)


ablate.__doc__ = HELP


def _entries(texts: list[str] | None) -> list[Any]:
    from ..search import parse_entry

    return [parse_entry(text) for text in texts or []]


def _said(context: typer.Context, name: str) -> bool:
    """Tell whether a flag was written, rather than left at its default, which a file may change."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write NAME=VALUE, for example --set model=60m")
    return name, value
