"""Where results go, tried before the work that makes them, which may take hours."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from .errors import UserError


def ready_folder(out: Path) -> None:
    """Make a folder, unless it is there, and write to it.

    Raises:
        UserError: It cannot be made or written to; the error has the system's reason.
    """
    _ready(out, out)


def ready_file(out: Path | None) -> None:
    """Make the folder of a file, unless it is there, and write to it; None asks for no file.

    Raises:
        UserError: `out` is a folder itself, or its folder cannot be made or written to.
    """
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file, for example --out {out / 'figures.json'}")
    _ready(out, out.parent)


def _ready(out: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        said = f"--out {out}: {folder} is no folder that can be written to ({error.strerror})"
        raise UserError(f"{said}: choose another --out") from error
