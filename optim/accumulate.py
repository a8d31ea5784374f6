"""Gradient accumulation in a subspace: micro-batches are summed in r columns instead of whole matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels import EVERYWHERE
from .core.accumulation import Compression, OwnBasis, RandomBases
from .core.seeded import DISTRIBUTIONS
from .core.sharding import beside
from .core.validate import check_choices

CHOICES: dict[str, tuple[Any, ...]] = {
    "distribution": DISTRIBUTIONS,
    "proj_type": ("std", "reverse_std", "left", "right"),
    "backend": EVERYWHERE,
}


class SubspaceAccumulator:
    """Sum the gradients of several micro-batches in a subspace, between two steps of an optimizer.

        R <- R + A_i P                                                          (a, r)

    after the backward pass of micro-batch i, for its gradient A_i (a x b), which is freed. There are two ways:

    `rank=None` is exact, for optimizers that use nothing of the gradient but A P between two refreshes (GaLore). P is
    the optimizer's own basis, and it gets R in the place of a gradient; where a refresh is due it gets the whole sum.

    `rank=r` is Flora's way (arXiv 2402.03293), for every optimizer. P is random, with `E[P P^T] = I` and new in every
    cycle, and `flush` writes the unbiased `R P^T` to `p.grad`, where clipping and gradient scalers see it.

    Gradients that are not compressed (vectors, matrices whose smaller side is r or less, refreshes) stay in `p.grad`,
    where autograd adds to them. The rest costs `a r` elements of fp32 during a cycle.

        for batch in micro_batches:
            loss(batch).backward()
            accumulator.accumulate()
        accumulator.step()                              # or flush(), clip, optimizer.step(), optimizer.zero_grad()

    Args:
        optimizer: The optimizer.
        rank: None, or the rank r of random bases.
        mean: Divide the sum by the number of calls of `accumulate`; else the caller divides the losses.
        distribution: Of the random bases: "rademacher", "gaussian" or "orthonormal" (without loss where r is full).
        proj_type: Side that is compressed: "std" (the smaller), "reverse_std", "left" or "right".
        seed: Seed of the random bases, which are a function of it, of parameter order and of the cycle.
        backend: "auto", or the only kernel backend to make bases with.

    Raises:
        ValueError: An option is out of range, or `rank=None` with an optimizer that needs whole gradients.

    With `rank=None` gradients must be unscaled when `accumulate` is called: a gradient scaler and norm clipping see
    `p.grad` alone.

    Differences from the authors' accelerator: it works with every optimizer and scheduler instead of updating weights
    within the backward pass, all shapes are accepted, and a cycle can be saved and resumed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rank: int | None = None,
        *,
        mean: bool = False,
        distribution: str = "rademacher",
        proj_type: str = "std",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        check_choices({"distribution": distribution, "proj_type": proj_type, "backend": backend}, CHOICES)
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"Invalid rank: {rank!r}; need an integer of at least 1, or None")
        self.optimizer = optimizer
        self.options: dict[str, Any] = {"rank": rank, "mean": mean, "seed": seed}
        self.options |= {"distribution": distribution, "proj_type": proj_type}
        self.cycle = 0
        self.count = 0
        self._compression: Compression
        if rank is None:
            self._compression = OwnBasis(optimizer)
        else:
            self._compression = RandomBases(rank, distribution, proj_type, seed, backend)
        self._sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch; call it after each backward pass.

        Raises:
            ValueError: A group was added or changed so that its gradients are needed whole.
        """
        if self.count == 0:
            self._compression.release()
        self._compression.begin()
        self.count += 1
        for position, param in enumerate(self._params()):
            low = self._compression.project(position, param, self.cycle)
            if low is None:
                continue
            if param in self._sums:
                self._sums[param].add_(low)
            else:
                self._sums[param] = low
            param.grad = None

    @torch.no_grad()
    def flush(self) -> None:
        """End the cycle: hand the sums over to the optimizer, for its next step."""
        if self.options["mean"] and self.count > 1:
            whole = [param.grad for param in self._params() if param.grad is not None]
            for tensor in (*whole, *self._sums.values()):
                tensor.div_(self.count)
        for position, param in enumerate(self._params()):
            if param in self._sums:
                self._compression.deliver(position, param, self._sums.pop(param), self.cycle)
        self.cycle += 1
        self.count = 0

    def step(self) -> None:
        """Flush, step the optimizer, and clear the gradients."""
        self.flush()
        self.optimizer.step()
        self._compression.release()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the options and all that was summed in this cycle, the gradients in `p.grad` included.

        The optimizer and the weights are saved beside it. Of sharded parameters sums are DTensors as moments are, equal
        to rounding in any world; all ranks must call it.
        """
        params = list(self._params())
        return {
            "options": dict(self.options),
            "cycle": self.cycle,
            "count": self.count,
            "sums": {i: self._compression.saved(p, self._sums[p]) for i, p in enumerate(params) if p in self._sums},
            "grads": {i: p.grad.clone() for i, p in enumerate(params) if self.count and p.grad is not None},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the cycle that `state_dict()` recorded; load the optimizer first.

        Raises:
            ValueError: It was recorded with other options.
        """
        if state_dict["options"] != self.options:
            raise ValueError(
                f"the recorded accumulator has {state_dict['options']}, this one {self.options}: construct it with the "
                "recorded options"
            )
        params = list(self._params())
        self._compression.release()
        self.cycle, self.count = state_dict["cycle"], state_dict["count"]
        self._sums = {params[i]: self._compression.loaded(params[i], low) for i, low in state_dict["sums"].items()}
        for i, param in enumerate(params):
            grad = state_dict["grads"].get(i)
            param.grad = None if grad is None else beside(param, grad)

    def _params(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]
