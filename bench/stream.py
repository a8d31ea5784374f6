"""Batches from a Hugging Face data set that is streamed and packed: the C4 path of the papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .config import RunConfig
from .data import load_tokenizer
from .errors import UserError, one_line

SHUFFLE_SEED = 42
SHUFFLE_BUFFER = 10_000

Rows = Iterator[list[int]]


def pack(documents: Iterable[list[int]], separator: int, size: int) -> Rows:
    """Yield rows of `size` tokens cut from the documents, each followed by `separator`; a short last row is dropped."""
    buffer: list[int] = []
    for document in documents:
        buffer += [*document, separator]
        whole = len(buffer) - len(buffer) % size
        for start in range(0, whole, size):
            yield buffer[start : start + size]
        del buffer[:whole]


class StreamSource:
    """Packed rows of a stream, in order; a resumed run skips the rows that it has seen."""

    def __init__(
        self,
        documents: Callable[[str], Iterable[dict[str, Any]]],
        tokenizer: Any,
        config: RunConfig,
    ) -> None:
        """Take a function from a split's name to its documents, each a row with a `text` column."""
        self.vocab_size: int = len(tokenizer)
        self.identity: dict[str, Any] = {"stream": config.data, "vocab_size": self.vocab_size}
        self._documents = documents
        self._tokenizer = tokenizer
        self._config = config
        self._rows: Rows = iter(())
        self._next: int | None = None

    def train_batch(self, step: int, micro: int) -> Tensor:
        """Return the batch of one micro-batch of one step; going back reads the stream again from its start."""
        index = step * self._config.accumulation + micro
        if self._next is None or index < self._next:
            self._rows, self._next = self._open("train"), 0
        while self._next <= index:
            batch = self._take(self._rows)
            self._next += 1
        return batch

    def held_out_batches(self, count: int) -> list[Tensor]:
        """Return the first batches of the validation split."""
        rows = self._open("validation")
        return [self._take(rows) for _ in range(count)]

    def _take(self, rows: Rows) -> Tensor:
        taken = list(islice(rows, self._config.batch_size))
        if len(taken) < self._config.batch_size:
            raise UserError(f"--data {self._config.data} has ended: ask for fewer --steps or --eval-batches")
        return torch.tensor(taken)

    def _open(self, split: str) -> Rows:
        documents = (self._encode(row) for row in self._documents(split))
        return pack(documents, self._tokenizer.eos_token_id, self._config.length + 1)

    def _encode(self, row: dict[str, Any]) -> list[int]:
        if "text" not in row:
            raise UserError(f"--data {self._config.data} has no column `text`, it has: {', '.join(row)}")
        return list(self._tokenizer.encode(row["text"], add_special_tokens=False))


def open_stream(config: RunConfig) -> StreamSource:
    """Return the stream of `hf:NAME[:CONFIG]`; the training split is shuffled in a buffer with a fixed seed."""
    name, _, subset = config.data.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"--data {config.data}: write hf:NAME or hf:NAME:CONFIG, for example hf:allenai/c4:en")
    if not config.tokenizer:
        raise UserError(f"--data {config.data} needs --tokenizer NAME, for example --tokenizer t5-base")
    from datasets import load_dataset

    def documents(split: str) -> Iterable[dict[str, Any]]:
        try:
            stream: Any = load_dataset(name, subset or None, split=split, streaming=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--data {config.data}, split {split}, cannot be opened: {one_line(error)}") from error
        if split == "train":
            stream = stream.shuffle(seed=SHUFFLE_SEED, buffer_size=SHUFFLE_BUFFER)
        rows: Iterable[dict[str, Any]] = stream
        return rows

    return StreamSource(documents, load_tokenizer(config.tokenizer), config)
