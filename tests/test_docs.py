"""Snippets of the documentation run; so do cheap commands, and costly ones meet the parsers of what they call."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lowmem.optim
import pytest
import torch
import torch.distributed as dist
from lowmem.bench import cli, plan_picture
from lowmem.bench.optimizers import run_options
from lowmem.bench.options import parse_options
from lowmem.bench.parallel import PARALLEL
from lowmem.bench.search import expand
from lowmem.optim import compat
from lowmem.optim.core.hyper import Hyper
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LANGUAGES = ("python", "sh")

AS_WRITTEN = ("plan", "optimizers")
"""Commands of `lowmem` that take seconds."""

WORK = {
    "pretrain": "lowmem.bench.pretrain:pretrain",
    "compare": "lowmem.bench.compare:compare",
    "finetune": "lowmem.bench.finetune_compare:finetune",
    "step-time": "lowmem.bench.step_time:step_time",
    "gpu-check": "lowmem.bench.gpu_check:gpu_check",
}
"""Commands of `lowmem` that train or time for minutes: all of them runs but this function, where the work begins."""

ONLY_READ = ("apt-get", "zcat")
"""Programs outside of the project, of which the shell reads the line and no more."""

MADE_FOR_YOU = ("GradientRelease", "Matched")
"""Classes that a caller is handed and does not construct."""

INHERITED = set(inspect.signature(lowmem.optim.GaLore).parameters)

HAVE_RUN: set[tuple[str, ...]] = set()

IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is written here, and where columns are counted there are enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def world() -> Iterator[None]:
    """A world of one process, for what is sharded."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_snippets_of_python_run(page: Path, world: None, tmp_path: Path) -> None:
    for example in snippets(page, PythonCodeBlockParser()):
        with prepared(tmp_path) as names:
            example.namespace.clear()
            example.namespace.update(names)
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_run_or_are_accepted_by_their_parsers(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for example in snippets(page, CodeBlockParser("sh", evaluator=lambda example: None)):
        for line in lines_of(example.parsed):
            try:
                run_line(line, monkeypatch)
            except BaseException as error:
                raise AssertionError(f"{page.name}, from line {example.line} on: {line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_of_code_is_one_that_runs(page: Path) -> None:
    fences = re.findall(r"^ *```(\w*) *$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(fences[1::2]) <= {""}, "an unclosed block"
    assert set(fences[::2]) <= set(LANGUAGES)
    parsers = PythonCodeBlockParser(), CodeBlockParser("sh", evaluator=lambda example: None)
    assert len(list(snippets(page, *parsers))) == len(fences) // 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("lowmem pretrain --optimizer galore --rang 8", "unknown flag --rang"),
        ("lowmem compare 'galore rnak=8'", "no option 'rnak'"),
        ("lowmem step-time --model 60m --pears", "--pears"),
        ("torchrun --nproc-per-knode 8 -m lowmem.bench pretrain", "2"),
        ("torchrun --nproc-per-node 8 -m lowmem.bench pretrain --parallel fsdp9", "fsdp9"),
        ("pip install '.[bnech]'", "bnech"),
        ("make pretrian", "pretrian"),
        ("python examples/trian.py", "trian"),
        ("curl example.org", "curl"),
        ("zcat gcide.dict.dz > gcide.txt && lowmem train", "train"),
    ],
)
def test_a_line_that_is_wrong_fails(line: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with pytest.raises((Exception, SystemExit)) as raised:
        run_line(line, monkeypatch)
    assert complaint in f"{raised.value} {capfd.readouterr().err}"


def test_the_training_loop_of_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    losses = runpy.run_path(str(ROOT / "examples" / "train.py"))["losses"]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert "3 of 7 parameters projected" in capsys.readouterr().out


def test_the_trainer_of_the_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer.py", str(tmp_path)])
    try:
        trainer = runpy.run_path(str(ROOT / "examples" / "trainer.py"))["trainer"]
    finally:
        compat.uninstall()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert type(trainer.optimizer.optimizer) is lowmem.optim.GaLoreAdamW


def test_defaults_in_the_tables_of_migration_are_those_of_the_code() -> None:
    checked = 0
    for title, rows in tables((ROOT / "docs" / "migration.md").read_text(encoding="utf-8")):
        constructor = re.fullmatch(r"ours \(`([\w.]+)`\)", title[2]) if len(title) > 3 else None
        if constructor is None:
            continue
        defaults = defaults_of(constructor[1])
        for _, _, names, values, _ in rows:
            if names == "-" or not values or "(" in names:
                continue
            split = re.split(r", (?![^(]*\))", values)
            for name, value in zip(re.findall(r"`(\w+)`", names), split, strict=True):
                assert said(defaults[name]) == value, f"{constructor[1]}: {name}={defaults[name]!r}, not {value}"
                checked += 1
    assert checked > 80


def test_the_picture_of_memory_is_that_of_the_planner(tmp_path: Path) -> None:
    figures = json.loads((plan_picture.RESULTS / "memory_7b.json").read_text(encoding="utf-8"))
    assert list(figures) == list(plan_picture.METHODS)
    names = ["FRUGAL, density 0.25", "GaLore 8bit, r = 1024, release"]
    found = plan_picture.bars("7b", names)
    for bar in found:
        kept = {name: size for name, size in asdict(bar).items() if name != "rest"}
        assert kept == {name: figures[bar.name][name] for name in kept}
        assert bar.peak == pytest.approx(figures[bar.name]["peak"], rel=0.02)  # the workspace is the code's of its day
    plan_picture.picture(found, tmp_path / "memory.png", "two")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_measured_figures_of_choosing_are_those_of_the_results() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = {row[0]: row for title, table in tables(text) for row in table if "fine-tuning" in title[-2]}
    assert len(rows) == 7
    tuned = (plan_picture.RESULTS / "finetune.md").read_text(encoding="utf-8")
    points = {entry[0]: entry[3] for title, table in tables(tuned) if title[0] == "optimizer" for entry in table}
    trained = json.loads((plan_picture.RESULTS / "compare_all_tiny.json").read_text(encoding="utf-8"))
    runs = {run["label"]: run for run in trained}
    for name, row in rows.items():
        label = name.lower().replace("+", "plus").replace(" ", "")
        loss, state = (runs[label][key] / runs["adamw"][key] for key in ("val_loss_mean", "optimizer_state_bytes"))
        assert row[1:4] == [f"{100 * (loss - 1):+.1f} %", f"{100 * state:.1f} %", points[label]]


def test_every_test_and_file_that_a_page_links_to_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for name, file in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", text):
            assert f"def {name}(" in (page.parent / file).read_text(encoding="utf-8"), f"{page.name}: {name}"


def test_links_to_headings_find_them() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for file, heading in re.findall(r"\]\(((?!https?:)[^)#\s]*)#([^)\s]+)\)", text):
            target = (page.parent / file if file else page).read_text(encoding="utf-8")
            found = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings(target)}
            assert heading in found, f"{page.name}: #{heading}"


def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "api.py"), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "lowmem" / "optim.html").read_text(encoding="utf-8")
    missing = [name for name in lowmem.optim.__all__ if f'<section id="{name}">' not in page]
    assert missing == []
    assert 'id="GaLore.update"' not in page


@pytest.mark.parametrize("name", lowmem.optim.__all__)
def test_public_names_document_their_arguments(name: str) -> None:
    found = getattr(lowmem.optim, name)
    text = inspect.cleandoc(found.__doc__ or "")
    assert text
    section = re.match(r"(?: .*\n|\n)*", text.partition("Args:\n")[2] + "\n")
    documented = set(re.findall(r"^    (\w+): ", section[0] if section else "", flags=re.MULTILINE))
    parameters = set(inspect.signature(found).parameters)
    if name in MADE_FOR_YOU or (isinstance(found, type) and "__init__" not in vars(found)):
        assert documented <= parameters | INHERITED
    else:
        assert parameters <= documented <= parameters | (INHERITED if "options" in parameters else set())


def snippets(page: Path, *parsers: Any) -> list[Example]:
    document: Document = Sybil(list(parsers)).parse(page)
    return list(document.examples())


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Titles and rows of every table."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield cells[0], cells[2:]


def defaults_of(path: str) -> dict[str, Any]:
    """Defaults of a constructor by name, those that it hands on included."""
    cls, _, method = path.partition(".")
    owner = getattr(lowmem.optim, cls)
    chain = [*([getattr(owner, method)] if method else []), *owner.__mro__]
    found: dict[str, Any] = {}
    for made in chain:
        parameters = inspect.signature(made).parameters
        found = {name: parameter.default for name, parameter in parameters.items()} | found
        if "options" not in parameters:
            break
    if owner is lowmem.optim.GaLore:  # None stands for what `compat` decides
        group = owner([nn.Parameter(torch.zeros(1))]).param_groups[0]
        hyper = Hyper.of(group)
        found |= {"carry": hyper.carry, "state_dtype": hyper.state_dtype}
    return found


def said(value: Any) -> str:
    """A default as the tables write it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(said, value))})"
    text = f"{value:g}" if isinstance(value, float) and 0 < value < 0.1 else str(value)
    return re.sub(r"^(\d)e-0(\d)$", r"\1e-\2", {"0.01": "1e-2", "0.001": "1e-3"}.get(text, text))


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[dict[str, Any]]:
    """The names that snippets take for granted, new for every snippet; what they hook or install is taken away."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 160, "intermediate_size": 192, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, use_cache=False))
    names: dict[str, Any] = {name: getattr(lowmem.optim, name) for name in lowmem.optim.__all__}
    matrices = [param for name, param in model.named_parameters() if "_proj" in name]
    plain = [param for name, param in model.named_parameters() if "_proj" not in name]
    tokens = torch.randint(64, (2, 8))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    handles: list[Any] = []

    def loss(batch: Tensor) -> Tensor:
        found: Tensor = model(input_ids=batch, labels=batch).loss
        return found

    def enable_gradient_release(*args: Any, **options: Any) -> Any:
        """One way after the other: two at a time are refused."""
        for handle in handles:
            handle.remove()
        handles.append(lowmem.optim.enable_gradient_release(*args, **options))
        return handles[-1]

    def arguments(_: Any = None, **options: Any) -> TrainingArguments:
        """The Trainer's, where an ellipsis stands for what the reader has."""
        steps = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        return TrainingArguments(**{"output_dir": str(folder), **steps, **options})

    names |= {"model": model, "matrices": matrices, "plain": plain, "tokens": tokens, "torch": torch, "nn": nn}
    names |= {"optimizer": lowmem.optim.GaLore(lowmem.optim.param_groups(model, rank=128), lr=1e-2)}
    names |= {"loss": loss, "micro_batches": [tokens, tokens], "batches": [tokens] * 4, "rows": rows}
    names |= {"fully_shard": fully_shard, "layer": nn.Linear(8, 16), "folder": folder}
    names |= {"Trainer": Trainer, "TrainingArguments": arguments, "enable_gradient_release": enable_gradient_release}
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
        compat.uninstall()


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
    if words[0] in WORK:
        check_call(words[0], *calls[0])
    HAVE_RUN.add(tuple(words))


def check_call(command: str, first: Any, *rest: Any) -> None:
    """What the work itself would refuse at once."""
    if command == "pretrain":
        assert rest[1].parallel in PARALLEL, f"--parallel {rest[1].parallel}"
    if command in ("compare", "finetune"):
        for point in (point for entry in first for point in expand(entry)):
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
