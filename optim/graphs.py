"""Steps by CUDA graph: the operations of a step are captured once and launched together from then on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

from .core import blocks
from .core.cuda_graphs import CudaGraphs, Graphs, Step
from .core.lifecycle import Lifecycle
from .core.schedule import Schedule

COUNTED = ("params", "param_names", blocks.DONE, blocks.WAIT)
"""Entries of a group that may change without a new capture: parameters are compared apart, the host counts the rest."""

PATIENCE = 10
"""Changes of options without a replay between them after which a warning says so."""

SEARCHES = 50
"""Steps in a row in which a basis is due after which a warning says so."""


class GraphedStep:
    """A function to call in the place of `optimizer.step()`: between refreshes a step is one launch of a CUDA graph.

        optimizer = GaLore(param_groups(model, rank=128), lr=torch.tensor(1e-2, device="cuda"), capturable=True)
        step = GraphedStep(optimizer)
        for batch in batches:
            loss(batch).backward()
            step()
            scheduler.step()
            step.zero_grad()  # in place: the graph reads gradients where they were

    Steps that differ from others run without a graph: the first, and those that refresh a basis, choose ranks, find the
    entries of a residual or open a window of blocks. With `stagger=True` that may be nearly every step; leave it off
    here. Trajectories, counters and state dicts are those of `optimizer.step()`. A graph holds the temporaries of a
    step; the seeds of random rounding, which follow from step counts, take some thirty small operations a matrix in it.

    Python numbers are constants of a graph. A learning rate that changes must be a tensor on the parameters' device,
    which schedulers fill. Where a Python number, another option, the set of gradients or a parameter changes, or a
    state dict is loaded, the step is captured anew after a warm-up. Hooks of `step` cannot run in a graph and are
    refused.

    Args:
        optimizer: An optimizer with `capturable=True`.
        warmup: Steps that run on a side stream before one is captured.
        graphs: What captures; None takes CUDA graphs on the device of the parameters.

    Raises:
        TypeError: The optimizer is not of this package.
        ValueError: A group is not capturable, or parameters are on several devices, or there are none.
        RuntimeError: They are on no CUDA device. Later: a gradient has moved, or a hook would not run.
    """

    def __init__(self, optimizer: Lifecycle, *, warmup: int = 3, graphs: Graphs | None = None) -> None:
        if not isinstance(optimizer, Lifecycle):
            raise TypeError(
                f"got a {type(optimizer).__name__}: GraphedStep needs an optimizer of lowmem.optim; of a wrapper pass "
                "wrapper.optimizer"
            )
        if not isinstance(warmup, int) or warmup is True or warmup < 1:
            raise ValueError(f"Invalid warmup: {warmup!r}; need an integer of at least 1")
        self.optimizer = optimizer
        self.captures = 0
        """Graphs that were captured so far."""
        self.replays = 0
        """Steps that were a launch of one."""
        self._check()
        self._device = _device(optimizer)
        self._graphs = CudaGraphs(self._device) if graphs is None else graphs
        self._warmup, self._idle, self._searches = warmup, 0, 0
        self._key: tuple[Any, ...] = ()
        self.reset()
        optimizer.register_load_state_dict_post_hook(lambda _: self.reset())

    def reset(self) -> None:
        """Forget the graph: the next steps warm up and capture anew. For changes that `GraphedStep` cannot notice."""
        self._replay: Step | None = None
        self._warm = 0
        self._grads: list[int] = []
        self._state: list[int] = []
        self._settled = False

    def zero_grad(self) -> None:
        """Set gradients to zero in place, as `optimizer.zero_grad(set_to_none=False)`."""
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def __call__(self) -> None:
        """Perform one optimization step.

        Raises:
            RuntimeError: A gradient is elsewhere than it was captured, or the optimizer has hooks of `step`.
        """
        self._notice_changes()
        schedule = Schedule.of(self.optimizer)
        if schedule.due:
            self._warn_if_always()
            self.optimizer.step()
            self._settled = False  # it may have put other tensors into the state
        elif self._warm < self._warmup:
            self._graphs.warm_up(self.optimizer.step)
            self._warm += 1
        elif self._replay is None or self._moved():
            self._capture()
        else:
            self._refuse_hooks()
            schedule.count()
            self._launch(self._replay)

    def _notice_changes(self) -> None:
        """Forget the graph where options or parameters have changed; warn if they do so before every replay."""
        key = self._key
        self._key = _key(self.optimizer, self._device)
        if self._key == key:
            return
        self._check()
        if self._replay is None and key:
            self._idle += 1
        if self._idle == PATIENCE:
            names = sorted({entry[1] for entry in set(key) ^ set(self._key) if isinstance(entry[1], str)})
            warnings.warn(
                f"GraphedStep replays nothing, {', '.join(names) or 'the set of gradients'} was another in {PATIENCE} "
                "steps: a rate that a scheduler moves must be a tensor, lr=torch.tensor(1e-2, device='cuda')",
                stacklevel=3,
            )
        self.reset()

    def _check(self) -> None:
        """Refuse groups that are not capturable; a loaded state dict has its own."""
        if any(not group.get("capturable") for group in self.optimizer.param_groups):
            raise ValueError(
                f"GraphedStep needs a {type(self.optimizer).__name__} whose groups are all capturable: construct it "
                "with capturable=True, or after loading a state dict without it, "
                "for group in optimizer.param_groups: group['capturable'] = True"
            )

    def _moved(self) -> bool:
        """Whether state lies at other addresses than when it was captured.

        Raises:
            RuntimeError: A gradient does.
        """
        if _grads(self.optimizer) != self._grads:
            raise RuntimeError(
                "gradients are no longer where the graph reads them: clear them in place, step.zero_grad() or "
                "optimizer.zero_grad(set_to_none=False); after moving them on purpose call step.reset()"
            )
        if not self._settled:
            self._settled = _state(self.optimizer) == self._state
        return not self._settled

    def _warn_if_always(self) -> None:
        """Warn where a search is due in every step, so that nothing is ever replayed."""
        self._searches += 1
        if self._searches == SEARCHES:
            warnings.warn(
                f"GraphedStep replayed nothing in {SEARCHES} steps, a basis was due in each: a gradient that stays "
                "zero asks for one in every step, leave that of an idle expert at None, param.grad = None; else leave "
                "stagger out, or raise update_proj_gap",
                stacklevel=3,
            )

    def _refuse_hooks(self) -> None:
        optimizer = self.optimizer
        known = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        if any(known) or hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks:
            raise RuntimeError(
                "hooks of optimizer.step would not run in a graph: remove them, handle.remove(), and call what they do "
                "beside step()"
            )

    def _capture(self) -> None:
        self._refuse_hooks()
        optimizer = self.optimizer
        self._replay = None  # frees the memory of the old graph before the new one takes some
        replay = self._graphs.capture(optimizer.step)  # the host counts this step; the device runs it in the launch
        self._replay, self._settled = replay, True
        self._grads, self._state = _grads(optimizer), _state(optimizer)
        self.captures += 1
        self._launch(replay)

    def _launch(self, replay: Step) -> None:
        replay()
        self.replays += 1
        self._idle = self._searches = 0


def _device(optimizer: Optimizer) -> torch.device:
    devices = {param.device for group in optimizer.param_groups for param in group["params"]}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"got parameters on {names}: GraphedStep needs one device, give each an optimizer of its own")
    if not devices:
        raise ValueError("got an optimizer without parameters: add them, optimizer.add_param_group({'params': [...]})")
    device: torch.device = devices.pop()
    return device


def _key(optimizer: Optimizer, device: torch.device) -> tuple[Any, ...]:
    """All that a graph has frozen: options, addresses of parameters, and which of them have a gradient."""
    entries: list[tuple[Any, ...]] = []
    for index, group in enumerate(optimizer.param_groups):
        entries += [(index, name, _frozen(group[name], device)) for name in group if name not in COUNTED]
        entries += [(index, id(p), p.data_ptr(), p.dtype, p.shape, p.grad is None) for p in group["params"]]
    return tuple(entries)


def _frozen(value: Any, device: torch.device) -> Any:
    """An option as a graph knows it: a tensor on its device by address, all else by value."""
    if isinstance(value, Tensor):
        return value.data_ptr() if value.device == device else str(value.tolist())
    return repr(value) if isinstance(value, (list, dict)) else value


def _given(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters that have a gradient, with it."""
    return ((p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def _grads(optimizer: Optimizer) -> list[int]:
    """Addresses of the gradients."""
    return [grad.data_ptr() for _, grad in _given(optimizer)]


def _state(optimizer: Optimizer) -> list[int]:
    """Addresses of what the optimizer keeps for parameters that have one."""
    return [value.data_ptr() for param, _ in _given(optimizer) for value in optimizer.state.get(param, {}).values()]
