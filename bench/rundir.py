"""The folder of one run: configuration, metrics, checkpoint and summary."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from .errors import UserError, one_line
from .out import ready_folder

Record = dict[str, Any]
SHARDS = "checkpoint-[0-9]*"


class RunFolder:
    """Files of one run; `summary.json` is written last and marks the run as finished.

    A run of one process keeps its checkpoint in `checkpoint.pt`, one of several in a folder `checkpoint-STEP`, into
    which every rank writes its pieces. Either replaces the other.
    """

    def __init__(self, path: Path) -> None:
        """Take the folder's path, which need not exist yet."""
        self.path = path
        self._config = path / "config.json"
        self._metrics = path / "metrics.jsonl"
        self._checkpoint = path / "checkpoint.pt"
        self._summary = path / "summary.json"

    @property
    def started(self) -> bool:
        """Whether a run was started here."""
        return self._config.exists()

    @property
    def finished(self) -> bool:
        """Whether a run was finished here."""
        return self._summary.exists()

    def check(self, identity: Record, resume: bool) -> None:
        """Raise a `UserError` if the folder belongs to another or a finished run.

        Args:
            identity: What the run's numbers depend on, as JSON values.
            resume: Whether the folder must hold an unfinished run of the same identity.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file: choose a folder")
        if self.started:
            self.check_identity(identity)
            if self.finished:
                raise UserError(f"--out {self.path} holds a finished run: choose another --out")
            if not resume:
                raise UserError(f"--out {self.path} holds an unfinished run: add --resume or choose another --out")
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"--out {self.path} is not empty and no run folder: choose another --out")
        if resume:
            raise UserError(f"--out {self.path} holds no run to resume: leave --resume out to start one")

    def check_identity(self, identity: Record) -> None:
        """Raise a `UserError` that names what differs if the run that was started here has another identity."""
        differences = _differences(self._identity(), identity)
        if differences:
            raise UserError(
                f"--out {self.path} holds a run of another configuration ({'; '.join(differences)}): "
                "choose another --out"
            )

    def start(self, identity: Record) -> None:
        """Make the folder the run's own, or raise a `UserError` if it cannot be written to."""
        ready_folder(self.path)
        write_json(self._config, identity)

    def holds(self, identity: Record) -> bool:
        """Tell whether the run that was started here has this identity."""
        return self.started and not _differences(self._identity(), identity)

    def config(self) -> Record:
        """Return the configuration of the run that was started here."""
        config: Record = self._identity()["config"]
        return config

    def _identity(self) -> Record:
        there: Record = read_json(self._config)
        if not isinstance(there, dict) or not isinstance(there.get("config"), dict):
            raise UserError(f"{self._config} is not that of a run, as of a model perhaps: choose another --out")
        return there

    def append(self, record: Record) -> None:
        """Add one line to the metrics."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self, kind: str) -> list[Record]:
        """Return the metrics of one kind (`train` or `eval`) in order."""
        lines = self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def summary(self) -> Record:
        """Return the summary of a finished run."""
        summary: Record = read_json(self._summary)
        return summary

    def finish(self, summary: Record) -> None:
        """Write the summary, which marks the run as finished."""
        write_json(self._summary, summary)

    def prune(self) -> None:
        """Delete weights and checkpoints; what the run measured stays."""
        self._remove([self._checkpoint, *self.path.glob(SHARDS), *self.path.glob("model")])

    def save_checkpoint(self, state: Record) -> None:
        """Write the checkpoint in one piece: an interrupted write leaves the old one."""
        part = self._checkpoint.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._checkpoint)
        self._remove(self.path.glob(SHARDS))

    def load_checkpoint(self, device: torch.device) -> Record | None:
        """Return the checkpoint of one process, or None if there is none."""
        if not self._checkpoint.exists():
            return None
        try:
            state: Record = torch.load(self._checkpoint, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
            raise UserError(f"{self._checkpoint} cannot be read: {one_line(error)}") from error
        return state

    def open_shards(self) -> Path:
        """Return an empty folder for the pieces of a checkpoint, which counts only once it is closed."""
        part = self.path / "checkpoint-new"
        self._remove([part])
        part.mkdir()
        return part

    def close_shards(self, step: int) -> None:
        """Make the folder, with all pieces in it, the checkpoint after `step` steps; the older ones go."""
        older = [self._checkpoint, *self.path.glob(SHARDS)]
        part, whole = self.path / "checkpoint-new", self.path / f"checkpoint-{step}"
        _sync(part)
        os.replace(part, whole)
        _sync(self.path)
        self._remove(older)

    def shards(self) -> tuple[int, Path] | None:
        """Return the step and the folder of the newest checkpoint of several processes."""
        found = [(int(path.name.partition("-")[2]), path) for path in self.path.glob(SHARDS)]
        return max(found, default=None)

    def drop_after(self, step: int) -> None:
        """Drop the metrics written after a checkpoint."""
        kept = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                # The run was cut off while writing its last line.
                break
            if record["step"] <= step:
                kept.append(line + "\n")
        self._metrics.write_text("".join(kept), encoding="utf-8")

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have the names in a folder survive a loss of power, where folders can be opened at all."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """Read JSON, or raise a `UserError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {one_line(error)}") from error


def _differences(there: Record, here: Record, prefix: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {json.dumps(old)} there, {json.dumps(new)} here")
    return found
