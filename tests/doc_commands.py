"""Command lines of the documentation: run, or handed to the parser of what they call."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowmem.bench import cli
from lowmem.bench.optimizers import run_options
from lowmem.bench.options import parse_options
from lowmem.bench.parallel import PARALLEL
from lowmem.bench.search import expand

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

AS_WRITTEN = ("plan", "optimizers")
"""Commands of `lowmem` that take seconds."""

WORK = {
    "pretrain": "lowmem.bench.pretrain:pretrain",
    "compare": "lowmem.bench.compare:compare",
    "ablate": "lowmem.bench.lab.ablate:ablate",
    "finetune": "lowmem.bench.finetune_compare:finetune",
    "step-time": "lowmem.bench.step_time:step_time",
    "gpu-check": "lowmem.bench.gpu_check:gpu_check",
}
"""Commands of `lowmem` that train or time for minutes: all of them runs but this function, where the work begins."""

ONLY_READ = ("apt-get", "zcat")
"""Programs outside of the project, of which the shell reads the line and no more."""

HAVE_RUN: set[tuple[str, ...]] = set()


def lines_of(block: str) -> list[str]:
    """Commands of a block, continued lines joined."""
    joined = str(block).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run or parse every command of a line."""
    subprocess.run(["bash", "-n", "-c", line], check=True)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word == ">":
            next(lexer)  # the file
        elif word in ("&&", "|"):
            commands.append([])
        else:
            commands[-1].append(word)
    for program, *words in commands:
        PROGRAMS[program](words, monkeypatch)


def lowmem_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command line, once for all pages; where its work takes minutes, all of it but the work."""
    if tuple(words) in HAVE_RUN:
        return
    calls: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patched:
        if words[0] in WORK:
            module, _, function = WORK[words[0]].partition(":")
            patched.setattr(importlib.import_module(module), function, lambda *given: calls.append(given) or True)
        elif words[0] not in AS_WRITTEN:
            raise AssertionError(f"lowmem {words[0]} is in neither AS_WRITTEN nor WORK")
        patched.setattr(sys, "argv", ["lowmem", *words])
        patched.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    if calls:
        check_call(words[0], *calls[0])
    else:
        assert words[0] not in WORK or "--dry-run" in words, f"lowmem {words[0]} has done nothing"
    HAVE_RUN.add(tuple(words))


def check_call(command: str, first: Any, *rest: Any) -> None:
    """What the work itself would refuse at once."""
    if command == "pretrain":
        assert rest[1].parallel in PARALLEL, f"--parallel {rest[1].parallel}"
    if command in ("compare", "finetune", "ablate"):
        entries = first.grid if command == "ablate" else first
        for point in (point for entry in entries for point in expand(entry)):
            texts = {name: text for name, text in point.texts.items() if name != "init"}
            parse_options(point.optimizer, run_options(point.optimizer), texts)


def torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own parser, then ours."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert (given.module, given.training_script) == (True, "lowmem.bench")
    lowmem_command(given.training_script_args, monkeypatch)


def pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip's own parser; extras are those of the package."""
    from pip._internal.commands import create_command

    command, *rest = words
    _, targets = create_command(command).parse_args(rest)
    asked = {extra for target in targets for extra in re.findall(r"\w+", (re.findall(r"\[(.*)\]", target) or [""])[0])}
    extras = (ROOT / "setup.py").read_text(encoding="utf-8").partition("extras_require")[2]
    known = set(re.findall(r'^        "(\w+)": ', extras, re.MULTILINE))
    assert asked <= known, f"extras {asked - known}"


def make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make's own dry run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples, which have tests of their own."""
    assert ROOT / words[0] in EXAMPLES, words[0]


def nothing(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the shell alone."""


PROGRAMS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "lowmem": lowmem_command,
    "torchrun": torchrun,
    "pip": pip,
    "make": make,
    "python": python,
    **dict.fromkeys(ONLY_READ, nothing),
}
