"""The configuration of one training run: the single table of what a run depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import UserError

DTYPES = ("fp32", "bf16")


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunConfig:
    """Everything that the result of a run depends on; each field but the last two is a flag of the same name."""

    model: str = _flag("tiny", "tiny, 9m, 60m, 130m, 350m, 1b, 7b, or the path of a Hugging Face LLaMA config JSON.")
    data: str = _flag("stdlib", "stdlib (Python's own source), a text file, a folder of text, or hf:NAME[:CONFIG].")
    tokenizer: str = _flag("", "Hugging Face tokenizer, by name or folder; without it bytes are the tokens.")
    steps: int = _flag(1000, "Optimizer steps; the schedule ends with them.")
    batch_size: int = _flag(16, "Sequences in a micro-batch.")
    length: int = _flag(256, "Predicted tokens in a sequence.")
    accumulation: int = _flag(1, "Micro-batches in an optimizer step.")
    warmup: float = _flag(0.1, "Fraction of the steps with a linearly growing learning rate.")
    min_lr_ratio: float = _flag(0.1, "Last learning rate of the cosine as a fraction of the peak.")
    grad_clip: float = _flag(1.0, "Largest norm of the whole gradient; 0 turns clipping off.")
    dtype: str = _flag("fp32", "fp32 or bf16: the type of weights and activations.")
    checkpointing: bool = _flag(False, "Recompute activations in the backward pass.")
    seed: int = _flag(0, "Seed of the weights, the batches and the optimizer.")
    eval_every: int = _flag(100, "Steps between validations; the last step is always validated.")
    eval_batches: int = _flag(8, "Validation batches, the same ones every time.")
    optimizer: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "accumulation", "eval_every", "eval_batches"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        _require(self.grad_clip >= 0, "grad_clip", self.grad_clip, "0 (off) or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        _require(self.dtype in DTYPES, "dtype", self.dtype, " or ".join(DTYPES))

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one optimizer step."""
        return self.batch_size * self.length * self.accumulation

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return {**asdict(self), "options": {name: _plain(value) for name, value in self.options.items()}}


def _require(holds: bool, name: str, value: object, need: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {need}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
