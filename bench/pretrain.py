"""The main job: pre-train a LLaMA on real text with any optimizer, in a folder that holds all of the run."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .config import RunConfig
from .data import load_source
from .errors import Diverged
from .job import Job, checkpoint, identity, prepare, restore
from .measure import device_name, now, spread, versions
from .optimizers import state_bytes
from .progress import RunProgress
from .report import loss_picture, read_curve
from .rundir import Record, RunFolder


@dataclass(frozen=True)
class Session:
    """What may differ between the sessions of one run without changing its numbers."""

    resume: bool = False
    save_every: int = 0
    stop_after: int = 0


def pretrain(config: RunConfig, out: Path, session: Session) -> bool:
    """Run, or go on with, the training of `config` in the folder `out`.

    Returns:
        Whether the run was finished, rather than stopped by `session.stop_after`.

    Raises:
        UserError: If the configuration, the data or the folder is no good.
        Diverged: If the loss is no longer finite.
    """
    source = load_source(config)
    folder = RunFolder(out)
    facts = identity(config, source)
    folder.check(facts, session.resume)
    job = prepare(config, source)
    # Only now, so that an option which the optimizer refuses leaves no folder behind.
    folder.start(facts)
    done = restore(job, folder.load_checkpoint(job.device))
    last = min(session.stop_after or config.steps, config.steps)
    with RunProgress(config.optimizer, done, config.steps) as progress:
        train(job, folder, progress, range(done, last), session.save_every)
        if last < config.steps:
            progress.note(f"stopped after {max(done, last)} of {config.steps} steps; --resume goes on")
            return False
        finish(job, folder)
        summary = folder.summary()
        progress.note(f"{out}: validation loss {summary['val_loss']:.4f}, perplexity {summary['val_perplexity']:.2f}")
    return True


def train(job: Job, folder: RunFolder, progress: RunProgress, steps: range, save_every: int) -> None:
    """Train `steps`, validating and saving on the way; the last one is always saved."""
    recent: deque[Record] = deque(maxlen=20)
    for step in steps:
        record = train_step(job, step)
        done = step + 1
        folder.append(record)
        recent.append(record)
        if done % job.config.eval_every == 0 or done == job.config.steps:
            folder.append(evaluate(job, done))
        if done == steps.stop or (save_every and done % save_every == 0):
            folder.save_checkpoint(checkpoint(job, done))
        if progress.due(done):
            rate = job.config.tokens_per_step * len(recent) / sum(item["step_s"] for item in recent)
            loss = sum(item["loss"] for item in recent) / len(recent)
            progress.show(done, loss, rate, state_bytes(job.optimizer), job.measure_peak())


def train_step(job: Job, step: int) -> Record:
    """Do one optimizer step and return its line of the metrics."""
    config = job.config
    start = now(job.device)
    factor = lr_factor(step, config)
    for group, peak in zip(job.optimizer.param_groups, job.peaks, strict=True):
        group["lr"] = peak * factor
    loss = torch.zeros((), device=job.device)
    for micro in range(config.accumulation):
        part = next_token_loss(job.model, job.source.train_batch(step, micro).to(job.device)) / config.accumulation
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    # Before the step: a decomposition of gradients that are not finite may fail with an error of its own.
    if not math.isfinite(loss.item()):
        raise Diverged(f"the loss is {loss.item()} at step {step + 1}: lower --lr")
    norms = {}
    if config.grad_clip:
        norms["grad_norm"] = nn.utils.clip_grad_norm_(job.model.parameters(), config.grad_clip).item()
    before = now(job.device)
    job.optimizer.step()
    end = now(job.device)
    job.optimizer.zero_grad(set_to_none=True)
    times = {"step_s": end - start, "optimizer_s": end - before}
    head = {"kind": "train", "step": step + 1, "tokens": (step + 1) * config.tokens_per_step}
    return {**head, "loss": loss.item(), "lr_factor": factor, **norms, **times}


def evaluate(job: Job, done: int) -> Record:
    """Return the line of the metrics for a validation after `done` steps."""
    job.model.eval()
    with torch.no_grad():
        losses = [next_token_loss(job.model, batch.to(job.device)).item() for batch in job.held_out]
    job.model.train()
    loss = sum(losses) / len(losses)
    tokens = done * job.config.tokens_per_step
    return {"kind": "eval", "step": done, "tokens": tokens, "loss": loss, "perplexity": perplexity(loss)}


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of every token of `rows` but the first."""
    logits = model(input_ids=rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def lr_factor(step: int, config: RunConfig) -> float:
    """Return the learning rate of a step over its peak: linear warm-up, then a cosine."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def perplexity(loss: float) -> float:
    """Return e^loss, infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def finish(job: Job, folder: RunFolder) -> None:
    """Write the model, the picture and, last, the summary."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = job.model
    model.save_pretrained(folder.path / "model")
    loss_picture(folder.path / "loss.png", read_curve(folder, job.config.optimizer))
    folder.finish(summarise(job, folder))


def summarise(job: Job, folder: RunFolder) -> Record:
    """Return the summary; the training loss is the mean of the last tenth of the steps, 100 at most."""
    config, train = job.config, folder.records("train")
    tail = train[-min(100, max(1, config.steps // 10)) :]
    train_loss = sum(record["loss"] for record in tail) / len(tail)
    val_loss = folder.records("eval")[-1]["loss"]
    return {
        **identity(config, job.source),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "versions": versions(),
        "device": device_name(job.device),
        "tokens": config.steps * config.tokens_per_step,
        "train_loss": train_loss,
        "train_perplexity": perplexity(train_loss),
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "optimizer_state_bytes": state_bytes(job.optimizer),
        "start_memory_bytes": job.start_memory,
        "peak_memory_bytes": job.measure_peak(),
        "optimizer_step_s": spread([record["optimizer_s"] for record in train]),
        "step_s": spread([record["step_s"] for record in train]),
        "tokens_per_s": config.steps * config.tokens_per_step / sum(record["step_s"] for record in train),
    }
