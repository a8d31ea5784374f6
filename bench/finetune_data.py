"""Labelled texts: read, split and turned into batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

SPLIT_SEED = 0
CHARACTERS_PER_TOKEN = 32
Row = tuple[int, str]
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Texts:
    """Rows of (index of the label, text): to train on, to choose by, and to report."""

    labels: list[str]
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def load_texts(folder: Path, validation: int, test: int) -> Texts:
    """Read the lines `LABEL<tab>TEXT` of `train.tsv` and `test.tsv`; empty lines are skipped.

    Args:
        folder: Where the files are.
        validation: Texts of `train.tsv` that are held out, the same ones for every seed.
        test: Texts of `test.tsv` that count, the same ones for every seed; 0 for all.

    Raises:
        UserError: If a line has no tab, a label of the test is not in the training texts, or there are too few texts.
    """
    train, tested = (_read(folder / name) for name in ("train.tsv", "test.tsv"))
    labels = sorted({label for label, _ in train})
    index = {label: number for number, label in enumerate(labels)}
    unknown = sorted({label for label, _ in tested} - set(labels))
    if unknown:
        raise UserError(f"{folder / 'test.tsv'}: no text of train.tsv has the label {unknown[0]!r}")
    if validation >= len(train):
        raise UserError(f"--validation is {validation}: train.tsv has {len(train)} texts, and some must be left")
    if test > len(tested):
        raise UserError(f"--test is {test}: test.tsv has {len(tested)} texts")
    rows, held = ([(index[label], text) for label, text in _shuffled(part)] for part in (train, tested))
    return Texts(labels, rows[validation:], rows[:validation], held[: test or None])


def _read(path: Path) -> list[tuple[str, str]]:
    rows = []
    # Not splitlines, which ends lines at more than the newline.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        label, tab, text = line.rstrip("\r").partition("\t")
        if not tab and line.strip():
            raise UserError(f"{path}, line {number}: no tab in it; a line is LABEL, a tab, TEXT")
        if tab:
            rows.append((label, text))
    if not rows:
        raise UserError(f"{path} holds no text: its lines must be LABEL, a tab, TEXT")
    return rows


def _shuffled(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return [rows[place] for place in order.tolist()]


class Encoder:
    """Tokens of texts, padded to the longest one of a batch."""

    def __init__(self, folder: Path, length: int) -> None:
        """Take the folder with the tokenizer and the tokens that a text is cut to.

        Raises:
            UserError: If there is no tokenizer, or it has no token to pad with.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} holds no tokenizer that transformers reads: {error}") from error
        if self._tokenizer.pad_token is None:
            raise UserError(f"the tokenizer of {folder} has no padding token, which batches of texts need")
        self._length = length

    def __call__(self, rows: Sequence[Row], device: torch.device) -> Batch:
        """Return the model's arguments and the labels."""
        # Of a long text, only what can matter is tokenized.
        texts = [text[: CHARACTERS_PER_TOKEN * self._length] for _, text in rows]
        tokens = self._tokenizer(
            texts, truncation=True, max_length=self._length, padding=True, return_tensors="pt", verbose=False
        )
        inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        return inputs, torch.tensor([label for label, _ in rows], device=device)


def training_rows(rows: Sequence[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    """Yield batches without end: all rows in a new order, then all in another one."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[place] for place in waiting[:batch_size]]
        del waiting[:batch_size]
