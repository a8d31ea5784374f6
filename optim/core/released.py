"""Gradient release between two steps: the gradients that have come, summed in the subspace where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .accumulation import OwnBasis
from .lifecycle import Lifecycle
from .sharding import beside, local, whole
from .validate import check_choices

CLIPPING = ("previous", "matrix")
"""Values of the option `clip_by`."""


class Clip(NamedTuple):
    """How gradients are clipped that are used before the norm of all of them is known.

    Args:
        max_norm: Largest norm; None does not clip.
        by: One of `CLIPPING`.
    """

    max_norm: float | None
    by: str

    @classmethod
    def of(cls, max_norm: float | None, by: str) -> Clip:
        """Validate the options.

        Raises:
            ValueError: One is out of range.
        """
        check_choices({"clip_by": by}, {"clip_by": CLIPPING})
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"Invalid max_norm: {max_norm}; need a positive number, or None to not clip")
        return cls(max_norm, by)


class Cycle:
    """The backward passes between two steps.

    Args:
        optimizer: The optimizer.
        compression: Sums gradients in the optimizer's subspace; None where every backward pass is a step.
        clip: How gradients are clipped.
        steps: Backward passes in a step.
    """

    def __init__(self, optimizer: Lifecycle, compression: OwnBasis | None, clip: Clip, steps: int) -> None:
        self.optimizer, self.clip, self.steps = optimizer, clip, steps
        self.stepped: set[int] = set()
        """Identities of the parameters that were stepped in this cycle."""
        self._compression = compression
        optimizer.release = self
        self._counts: dict[Tensor, int] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._squares: list[Tensor] = []
        self._last: Tensor | None = None

    @torch.no_grad()
    def add(self, param: Tensor) -> int:
        """Take in the gradient of a parameter; return how many have come since its last step."""
        if self._compression is not None:
            if not self._counts:
                self._compression.begin()
            low = self._compression.project(0, param, 0)
            if low is not None:
                self._sums[param] = low if param not in self._sums else self._sums[param].add_(low)
                param.grad = None
        self._counts[param] = self._counts.get(param, 0) + 1
        return self._counts[param]

    @torch.no_grad()
    def step(self, param: Tensor) -> None:
        """Step a parameter by the gradients that have come, and free them."""
        del self._counts[param]
        low = self._sums.pop(param, None)
        grad = param.grad if low is None else low
        if grad is not None:
            self._clip_(grad, self._norm(param, grad, low))
            if low is not None:
                self.optimizer._low_grads[param] = low
            try:
                self.optimizer.step_one(param)
            finally:
                self.optimizer._low_grads.pop(param, None)
        self.stepped.add(id(param))
        param.grad = None

    def end(self) -> None:
        """Step the parameters that wait, having had no gradient in the last backward pass, and begin a new cycle."""
        for param in list(self._counts):
            self.step(param)
        self.stepped.clear()
        if self._squares:
            self._last, self._squares = self.norm(), []

    def discard(self) -> None:
        """Drop the gradients that have come, as where a batch is given up."""
        for param in self._counts:
            param.grad = None
        self._forget()

    def _forget(self) -> None:
        self._sums.clear()
        self._counts.clear()
        self._squares.clear()
        self.stepped.clear()

    @torch.no_grad()
    def close(self) -> None:
        """End without a step: what was summed up in the subspace becomes gradients again, `R P^T`."""
        for param, low in self._sums.items():
            assert self._compression is not None
            whole = self._compression.restore(param, low)
            param.grad = whole if param.grad is None else param.grad.add_(whole)
        self._forget()
        self.optimizer.release = None

    def state_dict(self) -> dict[str, Any]:
        """The gradients that have come in this cycle, by position of the parameter, and the norm of the last cycle."""
        place = {param: i for i, param in enumerate(self._params())}
        return {
            "counts": {place[param]: count for param, count in self._counts.items()},
            "sums": {i: self._saved(p, self._sums[p]) for p, i in place.items() if p in self._sums},
            "grads": {place[p]: p.grad.clone() for p in self._counts if p.grad is not None},
            "stepped": [place[param] for param in place if id(param) in self.stepped],
            "squares": [square.clone() for square in self._squares],
            "last": self._last,
            "steps": self.steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the cycle that `state_dict()` recorded.

        Raises:
            ValueError: It was recorded with another number of backward passes in a step.
        """
        if state_dict["steps"] != self.steps:
            raise ValueError(
                f"the recorded handle has accumulation_steps={state_dict['steps']}, this one {self.steps}: enable "
                f"release with accumulation_steps={state_dict['steps']}"
            )
        self.discard()
        params = list(self._params())
        self.stepped = {id(params[i]) for i in state_dict["stepped"]}
        self._squares = [square.clone() for square in state_dict["squares"]]
        self._counts = {params[i]: count for i, count in state_dict["counts"].items()}
        if self._compression is not None:
            self._sums = {params[i]: self._compression.loaded(params[i], low) for i, low in state_dict["sums"].items()}
        for i, grad in state_dict["grads"].items():
            params[i].grad = beside(params[i], grad)
        self._last = state_dict["last"]
        if self._compression is not None:
            self._compression.begin()

    def _saved(self, param: Tensor, low: Tensor) -> Tensor:
        assert self._compression is not None
        return self._compression.saved(param, low)

    def _params(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def norm(self) -> Tensor | None:
        """Norm of all gradients of this cycle; before the first one that of the last cycle."""
        if not self._squares:
            return self._last
        device = self._squares[0].device
        return torch.stack([square.to(device) for square in self._squares]).sum().sqrt()

    def _norm(self, param: Tensor, grad: Tensor, low: Tensor | None) -> Tensor | None:
        """Norm of a gradient, or of R in its place; where they are sharded that of the whole."""
        if grad.is_sparse:
            return None  # the optimizer's error to raise
        if low is not None and self._compression is not None:
            return self._compression.norm(param, low)
        norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        return whole(norm)

    def _clip_(self, grad: Tensor, norm: Tensor | None) -> None:
        """Note the norm of a gradient and scale the gradient in place, without a synchronisation."""
        if norm is None:
            return
        self._squares.append(norm.square())
        if self.clip.max_norm is not None:
            known = norm
            if self.clip.by == "previous" and self._last is not None:
                last = self._last.to(norm)
                known = torch.where(last.isfinite() & (last > 0), last, norm)  # a useless one: by its own norm
            local(grad).mul_((self.clip.max_norm / (known + 1e-6)).clamp(max=1.0).to(grad.dtype))
