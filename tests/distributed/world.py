"""Worlds of processes that wait for work: gloo on a CPU, one thread a rank."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds that ranks may take over a piece of work."""


class World:
    """So many ranks, started once; a failure ends them, and the next piece of work starts new ones.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function of a module on every rank, and return what each returned (no tensors: they share memory)."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((work, args))
        found: dict[Any, Any] = {}
        waiting = [pipe for _, pipe in self._ranks]
        while waiting:
            ready = wait(waiting, PATIENCE)
            if not ready:
                self.close()
                raise AssertionError(f"ranks did not come back from {work.__name__}{args} in {PATIENCE} seconds")
            for pipe in ready:
                waiting.remove(pipe)
                raised, found[pipe] = _received(pipe)
                if raised:
                    self.close()
                    raise AssertionError(f"a rank of {self.size} failed in {work.__name__}{args}:\n{found[pipe]}")
        return [found[pipe] for _, pipe in self._ranks]

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.layouts"])  # imports torch once for all ranks
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, str(meeting)), daemon=True)
            process.start()
            self._ranks.append((process, ours))


class Worlds:
    """Worlds of some sizes, each made when it is first asked for; a module closes them when its tests are over."""

    def __init__(self) -> None:
        self._made: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        return self._made.setdefault(size, World(size))

    def closing(self) -> Any:
        """A fixture of a module that ends all ranks."""
        import pytest  # not where ranks import this module

        @pytest.fixture(scope="module", autouse=True)
        def closing() -> Iterator[None]:
            yield
            for made in self._made.values():
                made.close()
            self._made.clear()

        return closing


def _received(pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return True, "the process died: collectives of the ranks do not match, see its standard error"


def _serve(pipe: Any, rank: int, size: int, meeting: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, work(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
