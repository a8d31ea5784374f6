"""Snippets of the documentation run; so do cheap commands, and costly ones meet the parsers of what they call."""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lowmem.optim
import pytest
import torch
import torch.distributed as dist
from lowmem.optim import compat
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.doc_commands import lines_of, run_line

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "sh")
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
        ("lowmem ablate 'galore rnak=8'", "no option 'rnak'"),
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


def snippets(page: Path, *parsers: Any) -> list[Example]:
    document: Document = Sybil(list(parsers)).parse(page)
    return list(document.examples())


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
