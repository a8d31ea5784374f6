"""What a run measures beside the loss: memory, times and the versions it ran on."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch


def now(device: torch.device) -> float:
    """Return a time in seconds at which all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds that some work takes, with all that it queues on `device`."""
    start = now(device)
    work()
    return 1e3 * (now(device) - start)


def amortised(step: float, refresh: float | None, gap: int) -> float:
    """Return the mean of the steps of an interval of `gap` steps, one of which refreshes every basis."""
    return step if refresh is None else step + (refresh - step) / gap


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak survives exec, so a child process would report its parent's.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median, 95th percentile and maximum."""
    return {
        "median": float(np.median(seconds)),
        "p95": float(np.percentile(seconds, 95)),
        "max": max(seconds),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    packages = ("torch", "transformers", "lowmem")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
