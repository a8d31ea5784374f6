"""One ablation at a time in a folder: two would run the same runs into each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..out import ready_folder


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make a folder and hold its lock, which the system releases with the process; Windows, without `flock`, has none.

    Raises:
        UserError: If the folder cannot be made or written to, or another ablation works in it.
    """
    ready_folder(out)
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another lowmem ablate works in {out}: wait for it, or choose another --out"
            raise UserError(said) from None
        yield
