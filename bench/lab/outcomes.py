"""What is known of a run from its folder: finished, diverged, failed or still to be run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import RunConfig
from ..errors import Diverged
from ..rundir import RunFolder, read_json, write_json
from ..runs import failure, identity_of, pretrain_words
from ..search import Outcome, Run
from .execute import Ended, Task
from .points import Point

MISSING = "not run yet"


@dataclass(frozen=True)
class Trial:
    """One run of a point, and its folder."""

    point: Point
    run: Run
    out: Path

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.out / self.run.folder)

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return replace(self.point.config, seed=self.run.seed)

    @property
    def label(self) -> str:
        """The options that name the run, and its seed where that is not the shared one."""
        own = self.run.seed == self.point.config.seed
        return self.run.point.text if own else f"{self.run.point.text} seed {self.run.seed}"

    def task(self, save_every: int) -> Task:
        """What starts the run, or goes on with it."""
        folder = RunFolder(self.folder.path.resolve())
        words = pretrain_words(self.config, self.point.flags, folder, save_every)
        return Task(tuple(words), str(Path.cwd()), f"{folder.path}.log")

    def known(self) -> Outcome:
        """Return what the folder tells.

        Raises:
            UserError: If it holds another run, or the data of the run is no good.
        """
        folder = self.folder
        if not folder.started:
            return Outcome(self.run, error=MISSING)
        folder.check_identity(identity_of(self.config))
        if folder.finished:
            loss = (summary := folder.summary())["val_loss"]
            if math.isfinite(loss):
                return Outcome(self.run, summary)
            return Outcome(self.run, error=f"the validation loss is {loss}", diverged=True)
        if self._mark.exists():
            return Outcome(self.run, error=read_json(self._mark)["error"], diverged=True)
        return Outcome(self.run, error=MISSING)

    def ended(self, end: Ended) -> Outcome:
        """Return the outcome of the run whose process has ended; a diverged one is marked, not to be run again."""
        if end.code == 0:
            return self.known()
        error = failure(end.code, end.stderr, f"{self.folder.path}.log")
        if diverged := isinstance(error, Diverged):
            write_json(self._mark, {"error": str(error)})
        return Outcome(self.run, error=str(error), diverged=diverged)

    @property
    def _mark(self) -> Path:
        return self.folder.path / "diverged.json"


def failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs that failed; those that diverged are infinitely bad, which is a result."""
    return [outcome for outcome in outcomes if outcome.error and not outcome.diverged and outcome.error != MISSING]
