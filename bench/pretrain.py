"""The main job: pre-train a LLaMA on real text with any optimizer, in a folder that holds all of the run."""

from __future__ import annotations

import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .checkpoint import restore, save, whole_weights
from .config import RunConfig
from .data import load_source
from .errors import Diverged, UserError
from .job import Job, identity, prepare
from .measure import device_name, now, spread, versions
from .optimizers import state_bytes
from .parallel import Ranks, clip, deferred, started
from .progress import RunProgress
from .report import loss_picture, read_curve
from .rundir import Record, RunFolder


@dataclass(frozen=True)
class Session:
    """What may differ between the sessions of one run without changing its numbers."""

    resume: bool = False
    save_every: int = 0
    stop_after: int = 0
    parallel: str = "none"


def pretrain(config: RunConfig, out: Path, session: Session) -> bool:
    """Run, or go on with, the training of `config` in the folder `out`.

    On several processes every one that reads batches of its own adds `config.accumulation` of them to a step:

        sequences of a step = batch_size * accumulation * readers

    The micro-batches of a step are numbered over all readers, so that the same number of them is the same run, however
    many processes share them. They share one folder and read the same data.

    Returns:
        Whether the run was finished, rather than stopped by `session.stop_after`.

    Raises:
        UserError: If the configuration, the data or the folder is no good.
        Diverged: If the loss is no longer finite.
    """
    with started(session.parallel) as ranks:
        return _run(replace(config, accumulation=config.accumulation * ranks.readers), RunFolder(out), session, ranks)


def _run(config: RunConfig, folder: RunFolder, session: Session, ranks: Ranks) -> bool:
    source = load_source(config)
    facts = identity(config, source)
    ranks.first(lambda: check(folder, facts, session.resume, ranks))
    job = prepare(config, source, ranks)
    # Only now, so that an option which the optimizer refuses leaves no folder behind.
    ranks.first(lambda: folder.start(facts))
    done = restore(job, folder)
    last = min(session.stop_after or config.steps, config.steps)
    with RunProgress(config.optimizer, done, config.steps) if ranks.rank == 0 else nullcontext() as progress:
        train(job, folder, progress, range(done, last), session.save_every)
        if last == config.steps:
            finish(job, folder)
        if progress:
            progress.note(closing(folder, max(done, last), config.steps))
    return last == config.steps


def check(folder: RunFolder, facts: Record, resume: bool, ranks: Ranks) -> None:
    """Check that the folder is free, or holds this run; another number of ranks keeps the batches of a step."""
    if resume and folder.started and (there := folder.config().get("accumulation")):
        here = facts["config"]["accumulation"]
        if there != here:
            need = f"write --accumulation {there // ranks.readers}"
            if there % ranks.readers:
                need = f"resume on a number of ranks that divides {there}"
            raise UserError(
                f"--out {folder.path} holds a run of {there} micro-batches a step, and {ranks.readers} x "
                f"--accumulation {here // ranks.readers} are {here}: {need}"
            )
    folder.check(facts, resume)


def closing(folder: RunFolder, done: int, steps: int) -> str:
    """Return the last line of a session."""
    if done < steps:
        return f"stopped after {done} of {steps} steps; --resume goes on"
    summary = folder.summary()
    return f"{folder.path}: validation loss {summary['val_loss']:.4f}, perplexity {summary['val_perplexity']:.2f}"


def train(job: Job, folder: RunFolder, progress: RunProgress | None, steps: range, save_every: int) -> None:
    """Train `steps`, validating and saving on the way; the last one is always saved.

    Only the first rank has a progress, and writes metrics; but all do all that is reduced over them.
    """
    recent: deque[Record] = deque(maxlen=20)
    for step in steps:
        record = train_step(job, step)
        done = step + 1
        records = [record]
        recent.append(record)
        if done % job.config.eval_every == 0 or done == job.config.steps:
            records.append(evaluate(job, done))
        if progress:
            for item in records:
                folder.append(item)
        if done == steps.stop or (save_every and done % save_every == 0):
            save(job, folder, done)
        if progress and progress.due(done):
            rate = job.config.tokens_per_step * len(recent) / sum(item["step_s"] for item in recent)
            loss = sum(item["loss"] for item in recent) / len(recent)
            progress.show(done, loss, rate, state_bytes(job.optimizer), job.measure_peak())


def train_step(job: Job, step: int) -> Record:
    """Do one optimizer step and return its line of the metrics, the same on every rank."""
    config = job.config
    start = now(job.device)
    factor = lr_factor(step, config)
    for group, peak in zip(job.optimizer.param_groups, job.peaks, strict=True):
        group["lr"] = peak * factor
    loss = job.ranks.mean(backward(job, step)).item()
    # Before the step: a decomposition of gradients that are not finite may fail with an error of its own.
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step + 1}: lower --lr")
    norms = {}
    if config.grad_clip:
        norms["grad_norm"] = clip(job.model, config.grad_clip)
    before = now(job.device)
    job.optimizer.step()
    end = now(job.device)
    job.optimizer.zero_grad(set_to_none=True)
    whole, own = job.ranks.most(end - start, end - before)
    head = {"kind": "train", "step": step + 1, "tokens": (step + 1) * config.tokens_per_step}
    return {**head, "loss": loss, "lr_factor": factor, **norms, "step_s": whole, "optimizer_s": own}


def backward(job: Job, step: int) -> Tensor:
    """Accumulate the gradients of this rank's micro-batches, and return their mean loss."""
    loss = torch.zeros((), device=job.device)
    share = job.ranks.share(job.config.accumulation)
    for micro in share:
        rows = job.source.train_batch(step, micro).to(job.device)
        with nullcontext() if micro == share[-1] else deferred(job.model):
            part = next_token_loss(job.model, rows) / len(share)
            part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    return loss


def evaluate(job: Job, done: int) -> Record:
    """Return the line of the metrics for a validation after `done` steps."""
    job.model.eval()
    share, readers, count = job.ranks.share(len(job.held_out)), job.ranks.readers, len(job.held_out)
    total = torch.zeros((), dtype=torch.float64, device=job.device)
    with torch.no_grad():
        # Ranks that have run out read one more, which does not count: shards are gathered from all of them.
        for turn in range(-(-count // readers)):
            index = share[turn] if turn < len(share) else 0
            part = next_token_loss(job.model, job.held_out[index].to(job.device))
            total += part * (turn < len(share))
    job.model.train()
    loss = job.ranks.mean(total).item() * readers / count
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

    bytes_held, start, peak = job.ranks.most(state_bytes(job.optimizer), job.start_memory, job.measure_peak())
    memory = {"optimizer_state_bytes": bytes_held, "start_memory_bytes": start, "peak_memory_bytes": peak}
    weights = None if job.ranks.mode == "none" else whole_weights(job)
    if job.ranks.rank:
        return
    logging.disable_progress_bar()
    model: Any = getattr(job.model, "module", job.model)
    model.save_pretrained(folder.path / "model", state_dict=weights)
    loss_picture(folder.path / "loss.png", read_curve(folder, job.config.optimizer))
    folder.finish(summarise(job, folder, {name: int(value) for name, value in memory.items()}))


def summarise(job: Job, folder: RunFolder, memory: Record) -> Record:
    """Return the summary; the training loss is the mean of the last tenth of the steps, 100 at most.

    Bytes are those of the rank that holds most, times those of the slowest, tokens those of all together.
    """
    config, train = job.config, folder.records("train")
    tail = train[-min(100, max(1, config.steps // 10)) :]
    train_loss = sum(record["loss"] for record in tail) / len(tail)
    val_loss = folder.records("eval")[-1]["loss"]
    return {
        **identity(config, job.source),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "versions": versions(),
        "device": device_name(job.device),
        "ranks": job.ranks.size,
        "parallel": job.ranks.mode,
        "tokens": config.steps * config.tokens_per_step,
        "train_loss": train_loss,
        "train_perplexity": perplexity(train_loss),
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        **memory,
        "optimizer_step_s": spread([record["optimizer_s"] for record in train]),
        "step_s": spread([record["step_s"] for record in train]),
        "tokens_per_s": config.steps * config.tokens_per_step / sum(record["step_s"] for record in train),
    }
