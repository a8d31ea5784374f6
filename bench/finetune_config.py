"""What the result of a fine-tuning run depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .config import RunConfig
from .errors import UserError
from .rundir import Record


@dataclass(frozen=True)
class FinetuneConfig:
    """One run of `lowmem finetune`.

    Args:
        model: A name of `finetune_files.MODELS` or a Hugging Face model's folder.
        data: A name of `finetune_files.DATA` or a folder with `train.tsv` and `test.tsv`.
        steps: Optimizer steps.
        batch_size: Texts in a step.
        length: Tokens that a text is cut to.
        warmup: Fraction of the steps with a linearly growing learning rate; a cosine to zero follows.
        grad_clip: Largest norm of the whole gradient; 0 turns clipping off.
        validation: Training texts that are held out, by which learning rates are chosen.
        test: Test texts that count; 0 for all.
        seed: Seed of the head, the order of the texts, dropout and the optimizer.
        pretrained: Start from the weights in the model's folder; else from random ones of the same shape.
        optimizer: A name of `lowmem optimizers`.
        options: Its options as texts, such as those of an ENTRY.
    """

    model: str = "minilm"
    data: str = "newsgroups"
    steps: int = 40
    batch_size: int = 16
    length: int = 48
    warmup: float = 0.1
    grad_clip: float = 1.0
    validation: int = 256
    test: int = 512
    seed: int = 0
    pretrained: bool = True
    optimizer: str = "adamw"
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What both commands have is checked, and scheduled, by the same code.
        self.shared  # noqa: B018
        if self.validation < 1:
            raise UserError(f"--validation is {self.validation}: it must be 1 or more, since rates are chosen by it")
        if self.test < 0:
            raise UserError(f"--test is {self.test}: it must be 0 (all texts) or more")
        if self.length < 3:
            raise UserError(f"--length is {self.length}: it must be 3 or more, for two special tokens and one of text")

    @property
    def shared(self) -> RunConfig:
        """The part that pre-training has too."""
        return RunConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            length=self.length,
            warmup=self.warmup,
            min_lr_ratio=0.0,
            grad_clip=self.grad_clip,
            seed=self.seed,
        )

    def to_json(self) -> Record:
        """Return the configuration as JSON values."""
        return {**asdict(self), "options": dict(self.options)}
