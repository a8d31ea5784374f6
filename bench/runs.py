"""One training run as a process of its own: how it is started, recognised when it is done, and how it failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from .config import RunConfig
from .errors import Diverged, UserError
from .rundir import Record, RunFolder
from .search import Outcome


def pretrain_words(config: RunConfig, options: Sequence[str], folder: RunFolder, save_every: int) -> list[str]:
    """Return what follows `python` to start a run, or to go on with the unfinished one in its folder.

    Args:
        config: The run, whose optimizer's options are said by the flags.
        options: The optimizer's options as flags.
        folder: Its folder.
        save_every: Steps between checkpoints; 0 saves at the end only.
    """
    words = ["-m", "lowmem.bench", "pretrain", f"--optimizer={config.optimizer}", *options, *shared_flags(config)]
    words += [f"--out={folder.path}", f"--save-every={save_every}"]
    return words + (["--resume"] if folder.started and not folder.finished else [])


def shared_flags(config: RunConfig) -> list[str]:
    """Return all of a configuration but the optimizer as flags of `lowmem pretrain`."""
    flags = []
    for name, value in config.to_json().items():
        flag = name.replace("_", "-")
        if name in ("optimizer", "options"):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def failure(code: int, stderr: str, log: str = "") -> UserError:
    """Return what a process that ended with `code` says about its failure.

    Args:
        code: Its exit code; a negative one is the signal that killed it.
        stderr: What it said there; the last line is the reason, but not of a process that had no time to give one.
        log: The file that holds its output, named where no reason is known.
    """
    if code < 0:
        cause = " (out of memory?)" if code == -9 else ""
        return UserError(f"killed by signal {-code}{cause}" + (f": see {log}" if log else ""))
    lines = stderr.strip().splitlines() or [f"the process ended with {code}"]
    kind = Diverged if code == Diverged.exit_code else UserError
    return kind(lines[-1].removeprefix("lowmem: "))


def identity_of(config: RunConfig) -> Record:
    """Return what the numbers of a run depend on; the text that many runs share is read once.

    Raises:
        UserError: If the data of the run is no good.
    """
    from .job import identity

    return identity(config, _source(config.data, config.tokenizer, config.length))


@lru_cache(maxsize=2)
def _source(data: str, tokenizer: str, length: int) -> Any:
    from .data import load_source

    return load_source(RunConfig(data=data, tokenizer=tokenizer, length=length))


def raise_failures(failures: Iterable[Outcome], total: int) -> None:
    """Raise a `UserError` that names the runs that failed, those of equal errors together, if there are any."""
    folders: dict[str, list[str]] = {}
    for outcome in failures:
        folders.setdefault(outcome.error, []).append(outcome.run.folder)
    if folders:
        failed = sum(map(len, folders.values()))
        listed = "; ".join(f"{', '.join(names)}: {message}" for message, names in folders.items())
        raise UserError(f"{failed} of {total} runs failed: {listed}")
