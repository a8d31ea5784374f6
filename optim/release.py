"""Gradient release: every parameter is stepped in the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .core.accumulation import OwnBasis
from .core.lifecycle import Lifecycle
from .core.released import Clip, Cycle
from .core.sharding import is_dtensor
from .ddp import AveragedCycle, check_replicas

AVERAGED = (
    "a DistributedDataParallel model averages its gradients after they are complete, when release has used them, in "
    "buckets as large as all of them; release the bare model, enable_gradient_release(model, optimizer, "
    "replicas=torch.distributed.group.WORLD), or shard with fully_shard(model)"
)


class GradientRelease:
    """The hooks of `enable_gradient_release`; a context manager that removes them at its end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Lifecycle,
        steps: int,
        clip: Clip,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        if optimizer.release is not None:
            raise ValueError("gradients of this optimizer are released already: remove() the first handle")
        self._model: nn.Module | None = model
        self._optimizer, self._steps = optimizer, steps
        compression = OwnBasis(optimizer) if steps > 1 else None
        self._cycle = (
            Cycle(optimizer, compression, clip, steps)
            if replicas is None
            else AveragedCycle(optimizer, compression, clip, steps, replicas)
        )
        self._hooks: dict[int, RemovableHandle] = {}
        self._called = False
        self._attach(model)
        if not self._hooks:
            optimizer.release = None
            raise ValueError(
                f"no trainable parameter of the {type(model).__name__} is in the optimizer, so that nothing would be "
                "released: construct the optimizer with model.parameters() or param_groups(model)"
            )
        self._watch = model.register_forward_pre_hook(self._forward)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of this step, or of the last, before clipping: 0-d, on the device; None before any.

        Of gradients that were accumulated in the subspace it is the part within it.
        """
        return self._cycle.norm()

    def remove(self) -> None:
        """Take the hooks away: gradients are kept again, and `optimizer.step()` is due."""
        if self._hooks:
            self._cycle.close()
        for handle in (*self._hooks.values(), self._watch):
            handle.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Gradients that have come since the last step, to be saved beside the optimizer; between steps only a norm."""
        return self._cycle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict()` recorded; load the optimizer first."""
        self._cycle.load_state_dict(state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientRelease:
        """Copying a model copies its hooks, but not the optimizer: the hooks of the copy do nothing."""
        return _inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _attach(self, model: nn.Module) -> None:
        """Hook parameters that have none yet: those that were unfrozen, or added to the optimizer, as well."""
        held = {id(param) for group in self._optimizer.param_groups for param in group["params"]}
        for param in model.parameters():
            if param.requires_grad and id(param) in held and id(param) not in self._hooks:
                hook: RemovableHandle = param.register_post_accumulate_grad_hook(self._release)  # type: ignore[no-untyped-call]
                self._hooks[id(param)] = hook

    def _forward(self, model: nn.Module, args: Any) -> None:
        """Begin a new cycle at a forward pass, unless it is that of activation checkpointing within a backward pass."""
        if self._model is None or torch._C._current_graph_task_id() != -1:
            return
        if DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError(f"gradient release: {AVERAGED}")
        self._attach(model)
        self._called = True
        if self._cycle.stepped:
            self._cycle.end()

    def _release(self, param: Tensor) -> None:
        cycle = self._cycle
        if id(param) in cycle.stepped:
            if self._called:
                raise RuntimeError(
                    f"a {tuple(param.shape)} parameter got a second gradient after it was stepped, without a forward "
                    "pass between: a graph was used twice, or a tied weight is checkpointed in parts; checkpoint with "
                    "use_reentrant=False, or train without release"
                )
            cycle.end()
        if cycle.add(param) >= self._steps:
            cycle.step(param)


def _inert() -> GradientRelease:
    """A handle without a model."""
    handle = object.__new__(GradientRelease)
    handle._model = None
    return handle


def enable_gradient_release(
    model: nn.Module,
    optimizer: Lifecycle,
    accumulation_steps: int = 1,
    *,
    max_norm: float | None = None,
    clip_by: str = "previous",
    replicas: dist.ProcessGroup | None = None,
) -> GradientRelease:
    """Step every parameter within `loss.backward()` and free its gradient at once.

        handle = enable_gradient_release(model, optimizer)
        for batch in batches:
            loss(batch).backward()   # weights are up to date after it
            optimizer.step()         # as always: ends the step, and runs its hooks
            scheduler.step()
            optimizer.zero_grad()

    At most a few gradients exist at a time, instead of one for every parameter. The optimizer is one real optimizer:
    its state dict is complete, and rates set by a scheduler take effect in the next backward pass.

    With `accumulation_steps=k` parameters are stepped in the k-th backward pass, or by an earlier `optimizer.step()`.
    A batch is given up by `optimizer.zero_grad()`; where a checkpoint is in mid-step, save `handle.state_dict()` too.
    Until then gradients of projected matrices are summed in the subspace, `R <- R + A P` (a, r), which is exact for
    methods that use nothing else of them between two refreshes (GaLore); those of plain parameters, and of matrices
    whose refresh is due, are kept whole. Divide the losses by k, as for any accumulation.

    Args:
        model: The model; weights that it ties are stepped once, by the sum of their gradients.
        optimizer: Any optimizer of this package. Parameters that it does not have keep their gradients.
        accumulation_steps: Backward passes in a step.
        max_norm: Largest norm of the gradients; None does not clip.
        clip_by: "previous": every gradient is scaled by `min(1, max_norm / n)`, n the norm of all gradients of the step
            before (in the first step by its own norm); "matrix": every gradient by its own norm.
        replicas: Process group of copies of the model, in the place of DistributedDataParallel: every gradient, or its
            sum in the subspace, is averaged over it before it is used. All of them must start equal and use the same
            parameters in every step; buffers, as those of batch norms, stay their own. None: there are no copies.

    Returns:
        A handle with `remove()` and `grad_norm`, which is a context manager too.

    Raises:
        TypeError: The optimizer is not of this package.
        ValueError: An option is out of range; nothing of the model is in the optimizer; the model averages gradients
            over processes after they are complete; the optimizer needs the gradients of all parameters at once, or
            with `accumulation_steps` whole gradients; `replicas` is given for sharded parameters.
        RuntimeError: Replicas do not start equal. Later: a GradScaler steps the optimizer, or a graph is used twice.
    """
    if not isinstance(optimizer, Lifecycle):
        raise TypeError(
            f"got a {type(optimizer).__name__}: gradient release needs an optimizer of lowmem.optim; of a wrapper pass "
            "wrapper.optimizer"
        )
    if isinstance(model, DistributedDataParallel):
        raise ValueError(f"got a DistributedDataParallel model: {AVERAGED}")
    if not isinstance(accumulation_steps, int) or accumulation_steps is True or accumulation_steps < 1:
        raise ValueError(f"Invalid accumulation_steps: {accumulation_steps!r}; need an integer of at least 1")
    reason = optimizer.needs_all_gradients()
    if reason is not None:
        raise ValueError(f"parameters cannot be stepped one by one: {reason}")
    clip = Clip.of(max_norm, clip_by)
    if replicas is not None:
        if any(is_dtensor(param) for param in model.parameters()):
            raise ValueError(
                "got replicas= and sharded parameters, whose gradients are averaged already: drop replicas="
            )
        _check_stepped(model, optimizer)
        check_replicas(optimizer, replicas)
    return GradientRelease(model, optimizer, accumulation_steps, clip, replicas)


def _check_stepped(model: nn.Module, optimizer: Lifecycle) -> None:
    """Refuse parameters that are not in the optimizer, since nobody would average their gradients."""
    stepped = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        if param.requires_grad and param not in stepped:
            raise ValueError(
                f"got replicas= and a parameter {name!r} that is not in the optimizer, whose gradient would not be "
                "averaged: add it to a group, or freeze it, param.requires_grad_(False)"
            )
