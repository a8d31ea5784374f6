"""Commands on several ranks: processes with the environment that torchrun gives, without the seconds of its start."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 120.0
GRACE = 2.0
"""Seconds that all ranks may take, and that the others may go on when one has failed."""

PRELOAD = [
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "lowmem.bench.commands",
    "lowmem.bench.pretrain",
]
"""Imported once for all ranks."""


class Outcome(NamedTuple):
    """Exit codes (negative: a signal) and standard errors, by rank."""

    codes: list[int]
    errors: list[str]


def run(arguments: list[str], cwd: Path, ranks: int = 0, before: Callable[[int], None] | None = None) -> Outcome:
    """Run `lowmem` on so many ranks, 0 for one process alone, each after `before(rank)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(max(1, ranks)):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(arguments, str(cwd), env if ranks else {}, rank, before))
        process.start()
        started.append(process)
    _wait(started)
    codes = [process.exitcode if process.exitcode is not None else 0 for process in started]
    return Outcome(codes, [(cwd / f"stderr{rank}").read_text() for rank in range(len(started))])


def _wait(started: list[Any]) -> None:
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in started) and time.monotonic() < end:
        if any(process.exitcode for process in started):
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.02)
    for process in started:
        process.kill()
        process.join()


def _rank(arguments: list[str], cwd: str, env: dict[str, Any], rank: int, before: Callable[[int], None] | None) -> None:
    os.chdir(cwd)
    os.environ.update({name: str(value) for name, value in env.items()})
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch
    from lowmem.bench.cli import main

    torch.set_num_threads(1)
    if before:
        before(rank)
    sys.argv = ["lowmem", *arguments]
    main()


def die_in_the_second_checkpoint(rank: int) -> None:
    """Kill rank 1 as by `kill -9` when it has written its pieces of a checkpoint, and no one told the others yet."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write, calls = FileSystemWriter.write_data, []

    def write_and_die(self: Any, *args: Any) -> Any:
        calls.append(1)
        written = write(self, *args)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), 9)
        return written

    FileSystemWriter.write_data = write_and_die  # type: ignore[method-assign]


def die_before_the_second_rename(rank: int) -> None:
    """Kill rank 0 when a whole checkpoint is written and has no name yet."""
    from lowmem.bench.rundir import RunFolder

    close, calls = RunFolder.close_shards, []

    def die(self: Any, step: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 9)
        close(self, step)

    RunFolder.close_shards = die  # type: ignore[method-assign]


def note_batches(rank: int) -> None:
    """Write down the digests of all batches that a rank trains on, and is validated on."""
    import hashlib

    from lowmem.bench import pretrain

    forward = pretrain.next_token_loss

    def noted(model: Any, rows: Any) -> Any:
        with open(f"batches{rank}", "a") as file:
            file.write(f"{'train' if model.training else 'eval'} {hashlib.md5(rows.numpy().tobytes()).hexdigest()}\n")
        return forward(model, rows)

    pretrain.next_token_loss = noted
