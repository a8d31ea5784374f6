"""Gradient release: every parameter is stepped in the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .core.lifecycle import Lifecycle


class GradientRelease:
    """The hooks of `enable_gradient_release`; a context manager that removes them at its end."""

    def __init__(self, model: nn.Module, optimizer: Lifecycle) -> None:
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._optimizer = optimizer
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._release)  # type: ignore[no-untyped-call]
            for param in model.parameters()
            if param.requires_grad and id(param) in held
        ]

    def _release(self, param: Tensor) -> None:
        self._optimizer.step_one(param)
        param.grad = None

    def remove(self) -> None:
        """Take the hooks away: gradients are kept again, and `optimizer.step()` is due."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def enable_gradient_release(model: nn.Module, optimizer: Lifecycle) -> GradientRelease:
    """Step every parameter within `loss.backward()` and free its gradient at once.

        handle = enable_gradient_release(model, optimizer)
        loss.backward()          # weights are up to date after it
        optimizer.step()         # finds no gradients and does nothing; schedulers may want the call
        scheduler.step()

    At most a few gradients exist at a time, instead of one for every parameter. The optimizer is one real optimizer:
    its state dict is complete, and rates set by a scheduler take effect in the next backward pass. Every backward pass
    is a step, so gradients are not accumulated over several, and clipping a global norm afterwards finds nothing.

    Args:
        model: The model; weights that it ties are stepped once, by the sum of their gradients.
        optimizer: Any optimizer of this package. Parameters that it does not have keep their gradients.

    Returns:
        A handle with `remove()`, which is a context manager too.

    Raises:
        TypeError: The optimizer is not of this package.
        ValueError: The model averages gradients over processes after they are complete, or the optimizer needs the
            gradients of all parameters at once.
    """
    if not isinstance(optimizer, Lifecycle):
        raise TypeError(f"got a {type(optimizer).__name__}: gradient release needs an optimizer of lowmem.optim")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "got a DistributedDataParallel model: its gradients are averaged after they are complete, when release "
            "would have used them; train without release, or shard with fully_shard(model)"
        )
    reason = optimizer.needs_all_gradients()
    if reason is not None:
        raise ValueError(f"parameters cannot be stepped one by one: {reason}")
    return GradientRelease(model, optimizer)
