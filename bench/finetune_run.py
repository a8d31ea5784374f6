"""One fine-tuning run, in a process of its own so that its peak memory is its own: `python -m ... FOLDER`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from .errors import Diverged, UserError, one_line
from .finetune_config import FinetuneConfig
from .finetune_data import Encoder, Row, load_texts, training_rows
from .finetune_files import find_data, find_model
from .measure import device_name, now, peak_memory, spread, versions
from .optimizers import build_optimizer, run_options, state_bytes
from .options import parse_options
from .pretrain import lr_factor
from .rundir import Record, RunFolder, read_json

EVAL_BATCH = 32


class Classifier(nn.Module):
    """An encoder, the mean of its last states over the tokens of a text, and a linear layer to the labels."""

    def __init__(self, encoder: Any, labels: int) -> None:
        """Take the encoder, of any architecture with `last_hidden_state`, and the number of labels."""
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.config.hidden_size, labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, (texts, labels)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        present = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * present).sum(1) / present.sum(1)
        logits: Tensor = self.classifier(self.dropout(mean))
        return logits


def read_shape(folder: Path, config: FinetuneConfig) -> Any:
    """Return the configuration of the model in a folder, after importing all that the model needs.

    Raises:
        UserError: If transformers cannot read it, or its positions are too few for `--length`.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        shape = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            AutoModel.from_config(shape)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no model that transformers reads: {one_line(error)}") from error
    positions = getattr(shape, "max_position_embeddings", config.length)
    if positions < config.length:
        raise UserError(f"the model of {folder} has {positions} positions: write --length {positions} or less")
    return shape


def build_classifier(folder: Path, shape: Any, labels: int, config: FinetuneConfig) -> Classifier:
    """Return the model, from the folder's weights or random ones; torch's generator is set to the run's seed.

    Raises:
        UserError: If the folder has no weights of that shape.
    """
    from transformers import AutoModel

    torch.manual_seed(config.seed)
    if config.pretrained:
        try:
            encoder = AutoModel.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} holds no weights that transformers reads: {one_line(error)}") from error
    else:
        encoder = AutoModel.from_config(shape)
    # Its output is not used: without a gradient it would be counted as trained.
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return Classifier(encoder.float(), labels).train()


@dataclass
class Task:
    """A run in memory."""

    config: FinetuneConfig
    model: nn.Module
    optimizer: Optimizer
    encode: Encoder
    device: torch.device


def train(task: Task, rows: list[Row], folder: RunFolder) -> None:
    """Do all steps and write a line of the metrics for each.

    Raises:
        Diverged: If the loss is no longer finite.
    """
    config = task.config
    peaks = [group["lr"] for group in task.optimizer.param_groups]
    batches = training_rows(rows, config.batch_size, config.seed)
    for step in range(config.steps):
        start = now(task.device)
        factor = lr_factor(step, config.shared)
        for group, peak in zip(task.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        inputs, labels = task.encode(next(batches), task.device)
        loss = cross_entropy(task.model(**inputs), labels)
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()} at step {step + 1}: lower lr")
        loss.backward()  # type: ignore[no-untyped-call]
        if config.grad_clip:
            nn.utils.clip_grad_norm_(task.model.parameters(), config.grad_clip)
        before = now(task.device)
        task.optimizer.step()
        end = now(task.device)
        task.optimizer.zero_grad(set_to_none=True)
        times = {"step_s": end - start, "optimizer_s": end - before}
        folder.append({"kind": "train", "step": step + 1, "loss": loss.item(), "lr_factor": factor, **times})


def evaluate(task: Task, rows: list[Row]) -> tuple[float, float]:
    """Return mean loss and accuracy on `rows`."""
    task.model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), EVAL_BATCH):
            inputs, labels = task.encode(rows[start : start + EVAL_BATCH], task.device)
            logits = task.model(**inputs)
            loss += cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum().item())
    task.model.train()
    return loss / len(rows), right / len(rows)


def matrix_state_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Return the bytes of state of the encoder's linear layers, where the methods differ."""
    weights = [layer.weight for layer in model.get_submodule("encoder").modules() if isinstance(layer, nn.Linear)]
    return sum(item.nbytes for weight in weights for item in _tensors(optimizer.state.get(weight)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def run(folder: RunFolder, identity: Record) -> None:
    """Train, evaluate and write the summary of the run that `identity` describes."""
    config = FinetuneConfig(**identity["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_folder = find_model(config.model)
    texts = load_texts(find_data(config.data), config.validation, config.test)
    encode = Encoder(model_folder, config.length)
    shape = read_shape(model_folder, config)
    start_memory = peak_memory(device)
    model = build_classifier(model_folder, shape, len(texts.labels), config).to(device)
    options = parse_options(config.optimizer, run_options(config.optimizer), config.options)
    optimizer = build_optimizer(config.optimizer, options, model, config.seed)
    task = Task(config, model, optimizer, encode, device)
    train(task, texts.train, folder)
    # Before evaluations, whose batches are larger.
    peak = peak_memory(device)
    val_loss, val_accuracy = evaluate(task, texts.validation)
    test_loss, test_accuracy = evaluate(task, texts.test)
    steps = folder.records("train")
    folder.finish(
        {
            **identity,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "versions": versions(),
            "device": device_name(device),
            "labels": len(texts.labels),
            "texts": {"train": len(texts.train), "validation": len(texts.validation), "test": len(texts.test)},
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "optimizer_state_bytes": state_bytes(optimizer),
            "matrix_state_bytes": matrix_state_bytes(model, optimizer),
            "start_memory_bytes": start_memory,
            "peak_memory_bytes": peak,
            "optimizer_step_s": spread([record["optimizer_s"] for record in steps]),
            "step_s": spread([record["step_s"] for record in steps]),
        }
    )


def main() -> None:
    """Run what the folder's `config.json` says; bad input becomes one line on stderr."""
    folder = Path(sys.argv[1])
    try:
        run(RunFolder(folder), read_json(folder / "config.json"))
    except UserError as error:
        print(f"lowmem: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
