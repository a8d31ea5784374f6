"""Where runs happen: processes on this machine, several at a time, or tasks of a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from ..errors import UserError

EXECUTORS = ("processes", "ray")

Ends: TypeAlias = Generator[tuple[int, "Ended"], None, None]


@dataclass(frozen=True)
class Task:
    """A run to start: what follows `python`, the folder to start it in, and the file that its output is added to."""

    words: tuple[str, ...]
    folder: str
    log: str


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the last of what it said on stderr."""

    code: int
    stderr: str = ""


class Executor(Protocol):
    """Starts tasks; no more than `slots` of them are under way at a time."""

    slots: int

    def submit(self, task: Task, slot: int) -> Future[Ended]:
        """Start a task in a slot that is free."""

    def stop(self) -> None:
        """End what is under way, and give everything back."""


def run_all(tasks: Sequence[Task], executor: Executor, started: Callable[[int], None]) -> Ends:
    """Run all tasks in order, as slots become free, and yield the index and the end of each as it ends.

    Whatever ends the iteration, an interrupt too, ends the tasks that are under way.

    Args:
        tasks: The tasks.
        executor: Where they run.
        started: Is told the index of every task that starts.
    """
    waiting, free = list(range(len(tasks)))[::-1], list(range(executor.slots))[::-1]
    under_way: dict[Future[Ended], tuple[int, int]] = {}
    try:
        while waiting or under_way:
            while waiting and free:
                index, slot = waiting.pop(), free.pop()
                started(index)
                under_way[executor.submit(tasks[index], slot)] = index, slot
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                index, slot = under_way.pop(future)
                free.append(slot)
                error = future.exception()
                yield index, Ended(1, str(error)) if error else future.result()
    finally:
        executor.stop()


def run_task(task: Task, environment: Mapping[str, str], keep: Callable[[Any], None] = lambda child: None) -> Ended:
    """Run a task in a process of its own and wait for it; whatever interrupts the wait ends the process.

    Args:
        task: The task.
        environment: Variables to set beside those of this process.
        keep: Is given the process.
    """
    with Path(task.log).open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, *task.words],
            cwd=task.folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
        )
        keep(child)
        try:
            _, stderr = child.communicate()
        except BaseException:
            child.kill()
            child.wait()
            raise
        log.write(stderr)
    return Ended(child.returncode, stderr[-4000:])


class Processes:
    """Processes on this machine, which share its threads and take turns on its GPUs."""

    def __init__(self, jobs: int) -> None:
        """Take the number of processes at a time."""
        self.slots = jobs
        self.threads = share(own_threads(), jobs)
        self._devices = visible_devices()
        self._pool = ThreadPoolExecutor(jobs)
        self._children: set[subprocess.Popen[str]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def submit(self, task: Task, slot: int) -> Future[Ended]:
        """Start a task with its share of the threads, on the GPU of its slot."""
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        return self._pool.submit(run_task, task, environment, self._keep)

    def stop(self) -> None:
        """Ask the processes that still run to end, and wait until they have."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                if child.poll() is None:
                    child.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _keep(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._children.add(child)
            if self._stopped:
                child.terminate()


class RayCluster:
    """Tasks of a Ray cluster: the one that is running, or else one on this machine.

    Every node needs this package, and the folder of the runs on a file system that all of them share.
    """

    def __init__(self, jobs: int) -> None:
        """Take the number of tasks at a time.

        Raises:
            UserError: If Ray is not installed.
        """
        try:
            import ray
        except ModuleNotFoundError:
            raise UserError('--executor ray needs Ray, which is not installed: pip install "lowmem[ray]"') from None
        self._ray, self.slots = ray, jobs
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        there = ray.cluster_resources()
        self.threads = share(int(there.get("CPU", 1)), jobs)
        gpus = min(1.0, there.get("GPU", 0) / jobs)
        self._run = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=0)(run_task)
        self._under_way: list[Any] = []

    def submit(self, task: Task, slot: int) -> Future[Ended]:
        """Start a task wherever the cluster has room."""
        reference = self._run.remote(task, {"OMP_NUM_THREADS": str(self.threads)})
        self._under_way.append(reference)
        found: Future[Ended] = reference.future()
        return found

    def stop(self) -> None:
        """Cancel the tasks that still run, and leave the cluster."""
        for reference in self._under_way:
            self._ray.cancel(reference)
        if self._own:
            self._ray.shutdown()


def executor_of(name: str, jobs: int) -> Executor:
    """Return the executor of a name.

    Raises:
        UserError: If there is none of that name, or it is not installed.
    """
    if name not in EXECUTORS:
        raise UserError(f"--executor {name}: it must be {' or '.join(EXECUTORS)}")
    return RayCluster(jobs) if name == "ray" else Processes(jobs)


def share(threads: int, jobs: int) -> int:
    """Return the threads of each of so many jobs: at least one."""
    return max(1, threads // jobs)


def own_threads() -> int:
    """Return the threads that this process may use: what OMP_NUM_THREADS says, or else the processors it may run on."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices() -> list[str]:
    """Return the GPUs that processes can be given, as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
