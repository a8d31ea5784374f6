"""Several optimizers on the same model, data, seed and budget, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from .config import RunConfig
from .errors import UserError
from .optimizers import run_options
from .options import pairs_to_texts, parse_options
from .report import Row, comparison_markdown, comparison_picture, comparison_table, read_curve
from .rundir import RunFolder, write_json

TABLE_WIDTH = 150


@dataclass(frozen=True)
class Entry:
    """One optimizer of a comparison, as it was written."""

    optimizer: str
    texts: Mapping[str, str]

    @property
    def options(self) -> str:
        """The options as text."""
        return " ".join(f"{name}={text}" for name, text in self.texts.items())

    @property
    def folder(self) -> str:
        """Name of the run folder inside the comparison's."""
        return re.sub(r"[^\w.+-]+", "_", f"{self.optimizer} {self.options}".strip())

    @property
    def flags(self) -> list[str]:
        """The options as flags of `lowmem pretrain`."""
        return [f"--{name.replace('_', '-')}={text}" for name, text in self.texts.items()]


def parse_entry(text: str) -> Entry:
    """Read `"NAME option=value ..."`."""
    words = text.split()
    if not words or "=" in words[0]:
        raise UserError(f'{text!r}: write "NAME option=value ...", for example "galore lr=1e-2 rank=32"')
    return Entry(words[0], pairs_to_texts(words[1:]))


def compare(texts: Sequence[str], shared: RunConfig, out: Path, save_every: int = 0) -> None:
    """Run every entry in its own process, then write table and picture; finished runs of `out` are reused.

    Args:
        texts: Entries as `"NAME option=value ..."`; the first one is the reference of the table.
        shared: The configuration of all runs but for optimizer and options.
        out: Folder of the comparison, with one run folder an entry.
        save_every: Steps between the checkpoints of a run.

    Raises:
        UserError: If an entry cannot be read, or one of the runs failed.
    """
    entries = [parse_entry(text) for text in texts]
    if not entries or len({entry.folder for entry in entries}) < len(entries):
        raise UserError('give every optimizer once, for example lowmem compare adamw "galore lr=1e-2 rank=32"')
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    failures = {}
    for index, entry in enumerate(entries, 1):
        console.print(f"[{index}/{len(entries)}] {entry.optimizer} {entry.options}".rstrip(), markup=False)
        try:
            _run_entry(entry, shared, out, save_every, console)
        except UserError as error:
            failures[entry.folder] = str(error)
            console.print(f"failed: {error}", markup=False)
    _report([entry for entry in entries if entry.folder not in failures], out)
    if failures:
        listed = "; ".join(f"{name}: {message}" for name, message in failures.items())
        raise UserError(f"{len(failures)} of {len(entries)} runs failed: {listed}")


def labels(entries: Sequence[Entry]) -> list[str]:
    """Return short distinct labels: the name, and where it occurs twice the options that differ."""
    counts = Counter(entry.optimizer for entry in entries)
    found = []
    for entry in entries:
        namesakes = [other.texts for other in entries if other.optimizer == entry.optimizer]
        differing = [f"{key}={text}" for key, text in entry.texts.items() if any(o.get(key) != text for o in namesakes)]
        words = [entry.optimizer, *differing] if counts[entry.optimizer] > 1 else [entry.optimizer]
        found.append(" ".join(words))
    return found


def _run_entry(entry: Entry, shared: RunConfig, out: Path, save_every: int, console: Console) -> None:
    options = run_options(entry.optimizer)
    config = replace(shared, optimizer=entry.optimizer, options=parse_options(entry.optimizer, options, entry.texts))
    folder = RunFolder(out / entry.folder)
    if folder.finished and _holds(folder, config):
        console.print(f"{folder.path} holds this run already", markup=False)
        return
    command = [sys.executable, "-m", "lowmem.bench", "pretrain", f"--optimizer={entry.optimizer}", *entry.flags]
    command += [*_shared_flags(shared), f"--out={folder.path}", f"--save-every={save_every}"]
    command += ["--resume"] if folder.started and not folder.finished else []
    sys.stdout.flush()
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"the process ended with {child.returncode}"]
        raise UserError(lines[-1].removeprefix("lowmem: "))
    sys.stderr.write(child.stderr)


def _holds(folder: RunFolder, config: RunConfig) -> bool:
    from .data import load_source
    from .job import identity

    return folder.holds(identity(config, load_source(config)))


def _shared_flags(shared: RunConfig) -> list[str]:
    flags = []
    for name, value in shared.to_json().items():
        flag = name.replace("_", "-")
        if name in ("optimizer", "options"):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def _report(entries: Sequence[Entry], out: Path) -> None:
    if not entries:
        return
    folders = [RunFolder(out / entry.folder) for entry in entries]
    names = labels(entries)
    rows = [
        Row(name, entry.options, folder.summary()) for name, entry, folder in zip(names, entries, folders, strict=True)
    ]
    curves = [read_curve(folder, name) for name, folder in zip(names, folders, strict=True)]
    comparison_picture(out / "compare.png", curves, rows)
    (out / "compare.md").write_text(comparison_markdown(rows), encoding="utf-8")
    listed = [{"label": row.label, "folder": e.folder, **row.summary} for row, e in zip(rows, entries, strict=True)]
    write_json(out / "compare.json", listed)
    console = Console()
    table = Console(width=None if console.is_terminal else TABLE_WIDTH)
    table.print(comparison_table(rows))
    table.print(f"picture: {out / 'compare.png'}", markup=False, highlight=False, soft_wrap=True)
