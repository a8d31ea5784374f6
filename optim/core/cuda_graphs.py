"""Capturing the operations of a step in a CUDA graph, which runs them again as one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ...kernels.capture import sharing

Step = Callable[[], Any]


class Graphs(Protocol):
    """What `GraphedStep` needs of a device that captures; tests pretend one without a GPU."""

    def warm_up(self, step: Step) -> None:
        """Run a step on the stream where the next will be captured."""

    def capture(self, step: Step) -> Step:
        """Record the operations of a step on the device, without effect there, and return what runs them."""


class CudaGraphs:
    """Graphs of torch.cuda.

    Args:
        device: The device of all parameters.

    Raises:
        RuntimeError: It is no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"GraphedStep captures CUDA graphs, the parameters are on {device}: move the model, model.to('cuda'), "
                "before you construct the optimizer, or call optimizer.step()"
            )
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, step: Step) -> None:
        """Run a step on the side stream, where libraries get their workspaces and kernels are compiled."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def capture(self, step: Step) -> Step:
        """Capture it; "thread_local" lets other threads, such as a data loader's, pin memory meanwhile."""
        graph = torch.cuda.CUDAGraph()
        within = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), sharing(), within:
            step()
        return graph.replay
