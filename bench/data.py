"""Training and validation batches from text: Python's own source, files, folders or a Hugging Face stream."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import RunConfig
from .errors import UserError, one_line

HELD_OUT = 0.05
BYTES = 256

Document = tuple[str, bytes]


class Source(Protocol):
    """Where batches come from; every batch has `length + 1` tokens a row, int64."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the text: a run is only resumed on the same."""

    def train_batch(self, step: int, micro: int) -> Tensor:
        """Return the training batch of one micro-batch of one step."""

    def held_out_batches(self, count: int) -> list[Tensor]:
        """Return the first `count` validation batches, always the same ones."""


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens: `encode` each, then `separator`."""

    encode: Callable[[bytes], Any]
    separator: int
    vocab_size: int
    dtype: type[np.generic]


@dataclass(frozen=True)
class TextSource:
    """Windows of a text held in memory.

    A training batch is a pure function of (seed, step, micro-batch), so that a resumed run needs no data state.
    """

    train: Tensor
    held_out: Tensor
    vocab_size: int
    config: RunConfig

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digest and sizes of the text."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out):
            digest.update(part.numpy().tobytes())
        sizes = {"train_tokens": len(self.train), "held_out_tokens": len(self.held_out)}
        return {**sizes, "vocab_size": self.vocab_size, "digest": digest.hexdigest()}

    def train_batch(self, step: int, micro: int) -> Tensor:
        """Return random windows drawn by a generator seeded from (seed, step, micro-batch)."""
        generator = torch.Generator().manual_seed(_mix(self.config.seed, step, micro))
        last = len(self.train) - self.config.length
        starts = torch.randint(last, (self.config.batch_size,), generator=generator)
        return self._windows(self.train, starts)

    def held_out_batches(self, count: int) -> list[Tensor]:
        """Return evenly spaced windows of the held-out text."""
        last = len(self.held_out) - self.config.length - 1
        starts = torch.linspace(0, last, count * self.config.batch_size, dtype=torch.float64).long()
        return [self._windows(self.held_out, part) for part in starts.view(count, -1)]

    def _windows(self, tokens: Tensor, starts: Tensor) -> Tensor:
        return tokens[starts[:, None] + torch.arange(self.config.length + 1)].long()


def load_source(config: RunConfig) -> Source:
    """Return the batches of `config.data`.

    Raises:
        UserError: If the data is missing, empty or shorter than one sequence.
    """
    if config.data.startswith("hf:"):
        from .stream import open_stream

        return open_stream(config)
    documents = stdlib_documents() if config.data == "stdlib" else read_documents(Path(config.data))
    if not documents:
        raise UserError(f"--data {config.data}: no text found; give a non-empty text file or a folder of text files")
    train, held_out = split(documents)
    encoding = tokenizer_encoding(config.tokenizer) if config.tokenizer else BYTE_ENCODING
    parts = [join(part, encoding) for part in (train, held_out)]
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if len(part) <= config.length:
            need = f"more than --length {config.length}"
            raise UserError(f"--data {config.data}: the {name} text has {len(part)} tokens, it needs {need}")
    return TextSource(parts[0], parts[1], encoding.vocab_size, config)


def stdlib_documents() -> list[Document]:
    """Return the .py files of the running interpreter's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = (path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    return _read(root, files)


def read_documents(path: Path) -> list[Document]:
    """Return a text file, or the text files of a folder (hidden and binary ones are left out)."""
    if path.is_file():
        return _read(path.parent, [path])
    if not path.is_dir():
        raise UserError(f"--data {path}: no such file or folder; give a path, stdlib or hf:NAME")
    hidden = (file for file in path.rglob("*") if any(part.startswith(".") for part in file.relative_to(path).parts))
    return _read(path, set(path.rglob("*")) - set(hidden))


def split(documents: list[Document]) -> tuple[list[bytes], list[bytes]]:
    """Split into training and held-out text, by file; a single file gives its tail.

    A file is held out by a hash of its relative path, so the split is the same on every machine and day.
    """
    if len(documents) == 1:
        text = documents[0][1]
        cut = len(text) - round(HELD_OUT * len(text))
        return [text[:cut]], [text[cut:]]
    marks = {name: _mix(name) / 2**63 for name, _ in documents}
    # A folder of few files may have none below the threshold.
    threshold = max(HELD_OUT, min(marks.values()))
    train = [text for name, text in documents if marks[name] > threshold]
    return train, [text for name, text in documents if marks[name] <= threshold]


def join(documents: Iterable[bytes], encoding: Encoding) -> Tensor:
    """Return all documents as one row of tokens, each followed by the separator."""
    separator = np.array([encoding.separator], dtype=encoding.dtype)
    parts = [part for text in documents for part in (np.asarray(encoding.encode(text), encoding.dtype), separator)]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)


def load_tokenizer(name: str) -> Any:
    """Return a Hugging Face tokenizer that has an end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name} cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name} has no end-of-text token: set eos_token in its tokenizer_config.json")
    return tokenizer


def tokenizer_encoding(name: str) -> Encoding:
    """Return the encoding of a Hugging Face tokenizer."""
    tokenizer = load_tokenizer(name)

    def encode(text: bytes) -> list[int]:
        return list(tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False))

    return Encoding(encode, tokenizer.eos_token_id, len(tokenizer), np.int32)


def _bytes_as_tokens(text: bytes) -> Any:
    return np.frombuffer(text, dtype=np.uint8)


BYTE_ENCODING = Encoding(_bytes_as_tokens, 0, BYTES, np.uint8)


def _read(root: Path, files: Iterable[Path]) -> list[Document]:
    texts = ((file.relative_to(root).as_posix(), file.read_bytes()) for file in sorted(files) if file.is_file())
    return [(name, text) for name, text in texts if text.strip() and b"\0" not in text]


def _mix(*values: object) -> int:
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
