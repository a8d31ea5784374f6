"""A CUDA graph on a CPU: the operations of a step with the tensors that they got, run again without the optimizer.

Like a graph it has no effect where it is recorded, freezes every number and address, knows nothing of Python, and does
not see what the host counts. Memory that an operation leaves open is filled with NaN in every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from lowmem.optim.core.lifecycle import Lifecycle
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

HOST = ("until_refresh", "refreshes", "skipped_refreshes", "interval", "residual_warmup_step")
"""Counters of the host, of which a graph on a device sees nothing."""
OPEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
"""Operations that leave memory as it is."""
ASKS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero)
"""Operations with which the host reads a device."""
SENDS = (aten.lift_fresh,)
"""Operations that make a tensor of numbers of the host, from memory that a graph would read again."""


class Call(NamedTuple):
    """One operation: its arguments, and what it has made, which nothing else is written to."""

    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]


class Recording(TorchDispatchMode):
    """Record what happens within.

    Args:
        host: Memory of the host.
        unread: Memory that the host must not read.
    """

    def __init__(self, host: set[int], unread: set[int]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._host, self._unread = host, unread
        self._new: set[int] = set()
        self._there: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = {address(tensor) for tensor in tensors((args, kwargs))}
        self._there |= {address(t) for t in tensors((args, kwargs)) if isinstance(t, OnDevice)}
        assert func.overloadpacket not in ASKS or not read & (self._unread | self._there), f"{func} asks a device"
        assert func.overloadpacket not in SENDS, f"{func} copies from the host"
        places = {address(t) in self._there for t in tensors((args, kwargs)) if t.ndim}
        assert len(places) < 2, f"{func} mixes devices"
        written = tensors(list(writes(func, args, kwargs)))
        if read & self._host and (written or func.overloadpacket in ASKS):
            assert read <= self._host, f"{func} mixes memory of the host and the device"
            return func(*args, **kwargs)
        for tensor in written:
            if address(tensor) not in self._new | self.before.keys():
                self.before[address(tensor)] = (tensor, whole(tensor).clone())
        out = func(*args, **kwargs)
        made = [tensor for tensor in tensors(out) if address(tensor) not in read]
        self._there |= {address(tensor) for tensor in made} if read & self._there else set()
        self._new |= {address(tensor) for tensor in made}
        self.calls.append(Call(func, args, kwargs, made))
        return out

    def undo(self) -> None:
        """Put back what was there before."""
        for tensor, values in self.before.values():
            whole(tensor).copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        """Run everything again into the same memory."""
        for call in self.calls:
            if call.run.overloadpacket in OPEN:
                for tensor in call.made:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
                continue
            if call.made or list(writes(call.run, call.args, call.kwargs)):
                found = tensors(call.run(*call.args, **call.kwargs))
                for old, new in zip(call.made, found if call.made else (), strict=True):
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def whole(tensor: Tensor) -> Tensor:
    """All bytes of the memory of a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


class CpuGraphs:
    """Stands in for `CudaGraphs`.

    Args:
        optimizer: Whose step is recorded.
    """

    def __init__(self, optimizer: Lifecycle) -> None:
        self.optimizer = optimizer
        self.recordings: list[Recording] = []
        self.warmed = 0

    def warm_up(self, step: Callable[[], Any]) -> None:
        self.warmed += 1
        step()

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        states, groups = self.optimizer.state.values(), self.optimizer.param_groups
        host = {address(held[name]) for held in states for name in HOST if name in held}
        counts = [value for held in states for name, value in held.items() if name.endswith("step")]
        rates = [group["lr"] for group in groups if isinstance(group["lr"], Tensor)]
        recording = Recording(host, {address(tensor) for tensor in (*counts, *rates)} - host)
        with recording, mock.patch("lowmem.optim.core.schedule.capturing", return_value=True):
            step()
        recording.undo()
        self.recordings.append(recording)
        return recording.replay


PRETENDED = torch.device("meta", 1)
"""A device that no test has: caches by device hold nothing that others would find."""


class OnDevice(Tensor):
    """A tensor that computes on a CPU and says that it is on a device, which is not asked what a CPU is."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PRETENDED

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return on_device(self.detach().as_subclass(Tensor).clone())


def on_device(tensor: Tensor) -> Tensor:
    """The same tensor, on the device."""
    return tensor.as_subclass(OnDevice)


class Pretend(TorchFunctionMode):
    """Make what is asked for on the device, and on the host what is brought there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, host = kwargs or {}, torch.device("cpu")
        if func is torch.device:
            return func(*args, **kwargs)
        places = {torch.device(leaf) for leaf in tree_leaves((args, kwargs)) if is_device(leaf)}
        if PRETENDED in places:
            args, kwargs = tree_map(lambda leaf: host if is_device(leaf) else leaf, (args, kwargs))
        out = func(*args, **kwargs)
        if PRETENDED in places and isinstance(out, Tensor):
            return on_device(out)
        return out.as_subclass(Tensor) if func is Tensor.to and host in places else out


def is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf in ("cpu", str(PRETENDED)))
