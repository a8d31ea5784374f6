"""Compressing the gradients of micro-batches to r columns, in an optimizer's own bases or in random ones."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ...kernels.reference import Move
from ...kernels.rounding import Target
from . import codec
from .basis import Step
from .bucket import Bucket, Plan
from .lifecycle import Lifecycle
from .projector import PROJECTORS
from .seeded import SeededBasis
from .sharding import is_dtensor, local
from .spread import whole_bases
from .state import axis_of
from .view import MatrixView, matrix_shape

TAG = 0xACC
"""Keeps the bases apart from those of optimizers with the same seed."""


class Compression(Protocol):
    """How gradients are compressed, and how the optimizer gets their sums, one in every cycle."""

    def begin(self) -> None:
        """Prepare for a micro-batch."""

    def project(self, position: int, param: Tensor, cycle: int) -> Tensor | None:
        """Compress `param.grad` to A P (a, r); None leaves it as it is."""

    def deliver(self, position: int, param: Tensor, low: Tensor, cycle: int) -> None:
        """Hand the sum of a parameter to the optimizer, for its next step."""

    def release(self) -> None:
        """Forget the sums that were handed over and not used."""

    def saved(self, param: Tensor, low: Tensor) -> Tensor:
        """What of a sum goes into a checkpoint."""

    def loaded(self, param: Tensor, saved: Tensor) -> Tensor:
        """The sum out of a checkpoint."""


class OwnBasis:
    """The optimizer's own bases between two refreshes: it takes R in the place of gradients, so that nothing is lost.

    Raises:
        ValueError: The optimizer, or one of its groups, uses more of the gradient than A P.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Lifecycle):
            inside = " (of a wrapper pass wrapper.optimizer)" if hasattr(optimizer, "optimizer") else ""
            raise ValueError(_refusal(optimizer, f"has no subspace of its own{inside}"))
        self.optimizer = optimizer
        self._places: dict[Tensor, tuple[Plan, Any]] = {}
        self._check()

    def begin(self) -> None:
        """Look up the buckets, which exist after the first step."""
        self._check()
        groups = self.optimizer.param_groups
        plans = self.optimizer._planned() if self.optimizer.state else []
        seen = [(plan, self.optimizer._hyper(groups[plan.group])) for plan in plans if plan.view is not None]
        self._places = {param: place for place in seen for param in place[0].params}

    def project(self, position: int, param: Tensor, cycle: int) -> Tensor | None:
        """`A P` of `param.grad`; see `low`."""
        return None if param.grad is None else self.low(param, param.grad)

    def low(self, param: Tensor, grad: Tensor) -> Tensor | None:
        """`A P` (a, r) in the basis in use; None where the next step refreshes it, for which it needs the gradient."""
        held = self.optimizer.state.get(param)
        if not held or param not in self._places or float(held["until_refresh"]) <= 0:
            return None
        b = self._bucket(param, grad)
        low = torch.empty(b.view.low_shape, dtype=b.dtype, device=b.grads[0].device)
        with whole_bases(b):
            b.basis.project(b.matrix(0), b.states[0], b.gemm_dtype, low, b.mine)  # of this piece; the step reduces it
        return low

    def norm(self, param: Tensor, low: Tensor) -> Tensor:
        """Norm of R; where the parameter is sharded that of the whole."""
        layout = self._places[param][0].layout
        # Collectives sum in place, hence the copy.
        norm: Tensor = torch.linalg.vector_norm(low if layout.alone else layout.reduce(low[None].clone()))
        return norm if layout.alone else layout.sum_low(norm.square()).sqrt()

    def restore(self, param: Tensor, low: Tensor) -> Tensor:
        """`R P^T` as a gradient, whose projection is R again."""
        whole = torch.zeros_like(param)
        b = self._bucket(param, whole)
        step = Step(Move(1.0, 1.0, low.dtype), b.view.transposed, b.hyper.backend, b.mine)
        with whole_bases(b):
            b.basis.project_back_(Target(b.natural(0)), low, b.states[0], step)
        return whole

    def saved(self, param: Tensor, low: Tensor) -> Tensor:
        """A sum as a checkpoint has it: a copy, of a sharded parameter R, reduced and placed as moments are."""
        plan = self._plan(param)
        if plan.layout.sharding is None or plan.view is None:
            return low.clone()
        axis = axis_of("", param.ndim, plan.view)
        reduced = plan.layout.reduce(low[None].clone())[0]
        return plan.layout.sharding.wrap(reduced, plan.view.low_shape, plan.layout.place(axis))

    def loaded(self, param: Tensor, saved: Tensor) -> Tensor:
        """This rank's part of what was `saved`, in any world: parts add up to R, which the first of them has."""
        plan = self._plan(param)
        layout, view = plan.layout, plan.view
        if layout.sharding is None or view is None:
            return saved.to(param.device, copy=True)
        mine: Tensor = local(layout.settle(saved, axis_of("", param.ndim, view)))
        part = layout.gather(mine[None], view.a)[0]
        parts = (*layout.rows, *layout.cols) if layout.full else layout.cols
        first = all(dist.get_rank(group) == 0 for group in parts)
        return part.clone() if first else torch.zeros_like(part)

    def _plan(self, param: Tensor) -> Plan:
        return next(plan for plan in self.optimizer._planned() if any(param is each for each in plan.params))

    def _bucket(self, param: Tensor, grad: Tensor) -> Bucket:
        """The bucket of one parameter and a gradient."""
        plan, hyper = self._places[param]
        held = self.optimizer._piece(param, self.optimizer.state[param], plan.layout)
        return Bucket(plan, hyper, [local(param)], [plan.layout.piece(grad)], [held], [0], [0], [None], [None], [False])

    def deliver(self, position: int, param: Tensor, low: Tensor, cycle: int) -> None:
        """Let the next step take R in the place of the gradient."""
        self.optimizer._low_grads[param] = low

    def release(self) -> None:
        """Forget sums, such as those of a step that a gradient scaler skipped."""
        self.optimizer._low_grads.clear()

    def _check(self) -> None:
        for group in self.optimizer.param_groups:
            reason = _reason(self.optimizer, group)
            if reason:
                raise ValueError(_refusal(self.optimizer, reason))


class RandomBases:
    """Random bases, new in every cycle; the optimizer gets `R P^T` as its gradient, which is right in the mean."""

    def __init__(self, rank: int, distribution: str, proj_type: str, seed: int, backend: str) -> None:
        self.rank, self.distribution, self.proj_type = rank, distribution, proj_type
        self.seed, self.backend = seed, backend

    def begin(self) -> None:
        """Nothing to prepare."""

    def project(self, position: int, param: Tensor, cycle: int) -> Tensor | None:
        """`A P` in the basis of this parameter and this cycle."""
        view, grad = self.view(param), param.grad
        if is_dtensor(param):
            raise NotImplementedError(
                "got sharded parameters (DTensor), whose gradients are not compressed in random bases: use those of "
                "the optimizer, SubspaceAccumulator(optimizer)"
            )
        if view is None or grad is None or grad.is_sparse:
            return None
        basis = self._basis(view, position, cycle)
        return basis.image(view.orient(grad), codec.work_dtype(param.dtype), self.backend)

    def deliver(self, position: int, param: Tensor, low: Tensor, cycle: int) -> None:
        """`p.grad = R P^T`, in the dtype and the memory order of the parameter, which fused optimizers count on."""
        view = self.view(param)
        if view is None:
            raise ValueError(f"a {tuple(param.shape)} parameter has become too small for rank={self.rank} in a cycle")
        made = self._basis(view, position, cycle)
        basis = made.matrix(codec.work_dtype(param.dtype), param.device, self.backend)
        grad = (basis @ low.T if view.transposed else low @ basis.T).view(param.shape)
        same = grad.dtype == param.dtype and grad.stride() == param.stride()
        param.grad = grad if same else torch.empty_like(param, requires_grad=False).copy_(grad)

    def release(self) -> None:
        """Nothing is kept."""

    def saved(self, param: Tensor, low: Tensor) -> Tensor:
        """A copy."""
        return low.clone()

    def loaded(self, param: Tensor, saved: Tensor) -> Tensor:
        """A copy where the parameter is."""
        return saved.to(param.device, copy=True)

    def view(self, param: Tensor) -> MatrixView | None:
        """Orient a matrix that is worth compressing."""
        if param.ndim < 2 or self.rank >= min(matrix_shape(param.shape)):
            return None
        return MatrixView.of(param.shape, self.rank, self.proj_type)

    def _basis(self, view: MatrixView, position: int, cycle: int) -> SeededBasis:
        return SeededBasis.of(view, self.distribution, self.seed, position, cycle, TAG)


def _reason(optimizer: Lifecycle, group: dict[str, Any]) -> str | None:
    """Why the update of a group needs more of a gradient than A P between two refreshes; None where it does not."""
    projector, residual = group.get("projector"), group.get("residual")
    if group.get("stacked") and (group.get("rank") is not None or group.get("density") is not None):
        return "has stacks of matrices, which refresh their bases one by one"
    if not optimizer.linear_between_refreshes:
        return "uses whole gradients in every step"
    if projector in PROJECTORS and PROJECTORS[projector].follows:
        return f"moves its basis by whole gradients with projector={projector!r}"
    if residual is not None:
        return f"uses whole gradients with residual={residual!r}"
    return "projects in other coordinates with weight_norm=True" if group.get("weight_norm") else None


def _refusal(optimizer: Optimizer, reason: str) -> str:
    return (
        f"{type(optimizer).__name__} {reason}, so that gradients cannot be accumulated in its own subspace: pass a "
        "rank, as SubspaceAccumulator(optimizer, rank=128), to accumulate them in a random one"
    )
