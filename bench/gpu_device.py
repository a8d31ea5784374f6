"""The device of `lowmem gpu-check`: its clock, its ceilings, and the time that is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]

LEAD = 20_000_000
"""Clock cycles that the device idles before a series, in which the host gets ahead of it."""
MOST_BUFFERS = 64
CEILINGS = (
    ("bf16", torch.bfloat16, "highest"),
    ("tf32", torch.float32, "high"),
    ("fp32", torch.float32, "highest"),
)
"""Rates of products: their names, the dtype of the operands and torch's precision of products in fp32."""

ROOM = 4 << 30
"""Bytes that the buffers of one timing may take together."""


class Budget:
    """Seconds for all parts: each has a share, some are kept for the last one.

    Args:
        minutes: Time for everything.
        reserved: Share that only the last part may use.
    """

    def __init__(self, minutes: float, reserved: float) -> None:
        self._start, self._seconds, self._reserved = perf_counter(), 60 * minutes, 60 * minutes * reserved
        self._end = self._seconds

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start

    def begin(self, share: float | None) -> None:
        """Begin a part, which may use a share of all time, or everything that is left."""
        rest = self._seconds - self._reserved
        self._end = self._seconds if share is None else min(rest, self.used + share * self._seconds)

    def left(self) -> float:
        """Seconds that the part has left."""
        return self._end - self.used


@dataclass(frozen=True)
class Floor:
    """The least time that an operation can take.

    Args:
        ms: Milliseconds.
        bound: What bounds it, "memory" or "products".
    """

    ms: float
    bound: str


@dataclass
class Bench:
    """What the parts share.

    Args:
        device: Where everything runs.
        interpreted: On a CPU in Triton's interpreter, where times mean nothing and shapes are tiny.
        budget: The time that is left.
        rates: Bytes a second of "copy", operations a second of products in "bf16", "tf32" and "fp32".
    """

    device: torch.device
    interpreted: bool
    budget: Budget
    rates: dict[str, float] = field(default_factory=dict)
    _seed: int = 0

    def __post_init__(self) -> None:
        self._cache = torch.empty(
            0 if self.interpreted else 4 * self.cache_bytes, dtype=torch.uint8, device=self.device
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the last cache level."""
        if self.interpreted:
            return 0
        return int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)) or 64 << 20

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals, others in every call."""
        self._seed += 1
        generator = torch.Generator(self.device).manual_seed(self._seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def release(self) -> None:
        """Free what is kept on the device; no step is timed after it."""
        self._cache = torch.empty(0, dtype=torch.uint8, device=self.device)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, make: Callable[[], Call], size: int, repeats: int = 30) -> float:
        """Median milliseconds of calls that take turns on buffers of their own, so that none is in the cache.

        Args:
            make: Makes a call with new buffers.
            size: Bytes of its buffers.
            repeats: Calls that are timed.
        """
        most = 1 if self.interpreted else max(2, min(MOST_BUFFERS, ROOM // max(size, 1)))
        calls = [make() for _ in range(min(most, max(2, math.ceil(2 * self.cache_bytes / max(size, 1)))))]
        for call in (calls[0], *calls):
            call()
        return float(np.median(self._series(calls, 1 if self.interpreted else repeats, lead=True)))

    def time_steps(self, step: Call, repeats: int, before: Call | None = None) -> list[float]:
        """Milliseconds of steps as the host sees them, each with a cold cache.

        Args:
            step: What is timed.
            repeats: How often.
            before: Done before each, not timed.
        """
        times: list[float] = []
        for _ in range(repeats):
            if before is not None:
                before()
            self._cache.zero_()
            times += self._series([step], 1, lead=False)
        return times

    def _series(self, calls: Sequence[Call], repeats: int, *, lead: bool) -> list[float]:
        if self.device.type != "cuda":
            return [_seconds(calls[turn % len(calls)]) * 1e3 for turn in range(repeats)]
        event: Any = torch.cuda.Event
        events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
        self.sync()
        sleep: Any = getattr(torch.cuda, "_sleep", None)
        if lead and sleep is not None:
            sleep(LEAD)
        for turn, (start, end) in enumerate(events):
            start.record()
            calls[turn % len(calls)]()
            end.record()
        self.sync()
        return [start.elapsed_time(end) for start, end in events]

    def floor(self, size: float, flops: float = 0.0, gemm: str = "bf16") -> Floor:
        """The least time for moving `size` bytes and for `flops` operations of products in `gemm`."""
        memory, products = 1e3 * size / self.rates["copy"], 1e3 * flops / self.rates[gemm]
        return Floor(products, "products") if products > memory else Floor(memory, "memory")

    def measure_rates(self) -> None:
        """Measure the ceilings: a large copy, bytes read and written, and large products of random numbers."""
        self.rates["copy"] = self._copy_rate()
        precision = torch.get_float32_matmul_precision()
        try:
            for name, dtype, mode in CEILINGS:
                torch.set_float32_matmul_precision(mode)
                self.rates[name] = self._product_rate(dtype)
        finally:
            torch.set_float32_matmul_precision(precision)

    def _copy_rate(self) -> float:
        source = torch.empty(1 << 20 if self.interpreted else 1 << 30, dtype=torch.uint8, device=self.device)
        source.random_(255)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._fastest(lambda: target.copy_(source))

    def _product_rate(self, dtype: torch.dtype) -> float:
        side = 128 if self.interpreted else 8192
        one, other = self.normal(side, side, dtype=dtype), self.normal(side, side, dtype=dtype)
        return 2 * side**3 / self._fastest(lambda: torch.mm(one, other))

    def _fastest(self, call: Call) -> float:
        call()
        return float(np.median(self._series([call], 2 if self.interpreted else 10, lead=True))) / 1e3


def _seconds(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
