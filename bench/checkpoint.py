"""What a run goes on from: one file of one process, or pieces of several, readable by any number of them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as reading
import torch.distributed.checkpoint.state_dict_saver as writing
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .errors import UserError, one_line
from .job import Job
from .rundir import Record, RunFolder

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(job: Job, folder: RunFolder, done: int) -> None:
    """Write the state after `done` steps in one piece: an interrupted write leaves the checkpoint before it."""
    if job.ranks.mode == "none":
        folder.save_checkpoint(_state(job, done))
        return
    part = job.ranks.first(folder.open_shards)
    writing.save({**_pieces(job), **_own(job)}, checkpoint_id=part)
    # Which waits for all ranks, and so for their pieces.
    job.ranks.first(lambda: folder.close_shards(done))


def restore(job: Job, folder: RunFolder) -> int:
    """Put the newest checkpoint back, whoever wrote it, and return the number of steps that it had done."""
    # One process of several has no room for all on its device.
    state = folder.load_checkpoint(job.device if job.ranks.mode == "none" else torch.device("cpu"))
    shards, done = folder.shards(), 0
    if shards and (state is None or shards[0] > state["step"]):
        done, path = shards
        _load_pieces(job, path)
    elif state is not None:
        done = int(state["step"])
        _load_file(job, state)
    job.ranks.first(lambda: folder.drop_after(done))
    return done


def whole_weights(job: Job) -> Record:
    """Gather all weights on the first rank, in its memory; the others get nothing."""
    return get_model_state_dict(job.model, options=WHOLE)


def _state(job: Job, done: int) -> Record:
    """Return all that one process goes on from, as plain tensors and values."""
    return {
        "step": done,
        "model": job.model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "peak_memory": job.measure_peak(),
    }


def _pieces(job: Job) -> Record:
    """Return weights and optimizer state by name, as they lie on this rank."""
    return {
        "model": get_model_state_dict(job.model),
        "optimizer": get_optimizer_state_dict(job.model, job.optimizer),
    }


def _own(job: Job) -> Record:
    """Return what every rank has for itself."""
    state = {"random": torch.get_rng_state(), "peak_memory": torch.tensor(job.measure_peak())}
    return {f"rank{job.ranks.rank}": state}


def _load_pieces(job: Job, path: Path) -> None:
    alone = not dist.is_initialized()
    found, own = _pieces(job), _own(job)
    try:
        known = FileSystemReader(path).read_metadata().state_dict_metadata
        # A rank that was not there before keeps its own.
        mine = {name: value for name, value in own.items() if f"{name}.random" in known}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which one process wants
            reading.load({**found, **mine}, checkpoint_id=path, no_dist=alone)
    except (CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    set_model_state_dict(job.model, found["model"])
    set_optimizer_state_dict(job.model, job.optimizer, found["optimizer"])
    for values in mine.values():
        torch.set_rng_state(values["random"])
        job.peak_memory = int(values["peak_memory"])


def _load_file(job: Job, state: Record) -> None:
    job.peak_memory = state["peak_memory"]
    if job.ranks.mode == "none":
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        return
    set_model_state_dict(job.model, state["model"], options=WHOLE)
    named = _by_name(job, state["optimizer"])
    set_optimizer_state_dict(job.model, job.optimizer, named, options=WHOLE)


def _by_name(job: Job, state: Record) -> Any:
    """Return an optimizer's state dict with the names of parameters in place of their positions."""
    of = {id(param): name.removeprefix("module.") for name, param in job.model.named_parameters()}
    names = [of[id(param)] for group in job.optimizer.param_groups for param in group["params"]]
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: value for index, value in state["state"].items()}, "param_groups": groups}
