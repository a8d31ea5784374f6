"""The lifecycle shared by all optimizers: buckets, state on demand, step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import stack, state
from .bucket import Bucket, Plan
from .bucketing import seen
from .groups import Groups
from .layout import Layout
from .plain import plain_
from .schedule import check_capture
from .sharding import local
from .spec import Spec
from .spread import whole_bases
from .state_creation import only_creates_state
from .view import MatrixView


class Release(Protocol):
    """What an optimizer asks of gradient release, which holds gradients of parameters that are not stepped yet."""

    def end(self) -> None:
        """Step the parameters whose gradients are held."""

    def discard(self) -> None:
        """Drop the gradients that are held."""


class Lifecycle(Groups):
    """Base of every optimizer: sorts parameters into buckets and hands each to `update` or `plain`.

    A named optimizer passes its options as `defaults` and writes its algorithm in `update(bucket)`.
    """

    linear_between_refreshes: bool = False
    """Whether an update between two refreshes uses nothing of a gradient but A P, which may then be summed instead."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by a GradScaler before a step; with released gradients it would unscale those that were used already.

        Raises:
            RuntimeError: Gradients are released.
        """
        if self.release is not None:
            raise RuntimeError(
                "got a GradScaler with gradient release: weights are stepped in the backward pass, by gradients that "
                "are still scaled; train in bf16, torch.autocast('cuda', torch.bfloat16), which needs no scaler, or "
                "without release, handle.remove()"
            )
        return False

    def _transient(self) -> None:
        """Set up attributes that are derived and never saved."""
        super()._transient()
        self._low_grads: dict[Tensor, Tensor] = {}
        self.release: Release | None = getattr(self, "release", None)  # loading a state dict does not end it
        self._alone: dict[int, tuple[Plan, tuple[Any, ...]]] = {}

    def update(self, b: Bucket) -> None:
        """Step a bucket of projected matrices: the algorithm of the named optimizer."""
        raise NotImplementedError(f"{type(self).__name__} projects no matrices")

    def plain(self, b: Bucket) -> None:
        """Step a bucket of parameters that are not projected."""
        plain_(b)

    @_disable_dynamo  # within a compiled training step: buckets and schedules are Python's to run
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: Re-evaluates the model and returns the loss; runs with gradients enabled.

        Returns:
            The loss of the closure, or None.

        Raises:
            RuntimeError: A gradient is sparse, or a CUDA graph captures a step that it could not replay.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.release is not None:
            self.release.end()
        check_capture(self)
        self._prepare()
        creating = not self.state and only_creates_state(self.param_groups)
        hypers = [self._hyper(group) for group in self.param_groups]
        for plan in self._planned():
            if not self._waits(self.param_groups[plan.group]):
                self._step_plan(plan, hypers[plan.group], creating=creating)
        self._low_grads.clear()
        return loss

    def _step_plan(self, plan: Plan, hyper: Any, *, creating: bool = False) -> None:
        for bucket in self._bucket(plan, hyper, creating=creating).parts():
            with whole_bases(bucket):
                (self.plain if plan.view is None else self._step_projected)(bucket)
        if plan.stacked:
            self._store_counters(plan)

    @_disable_dynamo
    @torch.no_grad()
    def step_one(self, param: Tensor) -> None:
        """Step one parameter by its gradient, as `step` would; what `enable_gradient_release` calls.

        Raises:
            ValueError: The optimizer does not have the parameter.
        """
        plan, mark = self._alone.get(id(param), (None, None))
        if plan is None or mark != self._mark(param, plan):
            self._alone = {id(p): (part, self._mark(p, part)) for part in self._one_by_one() for p in part.params}
            if id(param) not in self._alone:
                raise ValueError(
                    f"the optimizer does not have this {tuple(param.shape)} parameter: add it, "
                    "optimizer.add_param_group({'params': [parameter]})"
                )
            plan = self._alone[id(param)][0]
        if self._waits(self.param_groups[plan.group]):
            raise RuntimeError(f"this parameter cannot be stepped alone: {self.needs_all_gradients()}")
        self._step_plan(plan, self._hyper(self.param_groups[plan.group]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those that were summed up in a subspace too."""
        super().zero_grad(set_to_none)
        self._low_grads.clear()
        if self.release is not None:
            self.release.discard()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, see `Groups.load_state_dict`; gradients that wait for their step are dropped."""
        super().load_state_dict(state_dict)
        if self.release is not None:
            self.release.discard()

    def skipped_refreshes(self) -> int:
        """Count the refreshes skipped so far, over all matrices of this rank: a gradient was zero or not finite."""
        counts = (held.get("skipped_refreshes") for held in self.state.values())
        return sum(int(local(count).sum()) for count in counts if count is not None)

    def _one_by_one(self) -> Iterator[Plan]:
        for plan in self._planned():
            yield from plan.alone()

    def _mark(self, param: Tensor, plan: Plan) -> tuple[Any, ...]:
        """All that the cached plan of one parameter depends on; comparing all groups for each would be quadratic."""
        if plan.group >= len(self.param_groups):
            return ()
        group = self.param_groups[plan.group]
        return (id(group), len(group["params"]), *seen(param), *self._fingerprint(group))

    def needs_all_gradients(self) -> str | None:
        """Say why parameters cannot be stepped one by one; None where they can."""
        return None

    def _prepare(self) -> None:
        """Hook before parameters are sorted into buckets: `rank="auto"` chooses its ranks here."""

    def _waits(self, group: dict[str, Any]) -> bool:
        """Tell whether a group cannot be stepped yet."""
        return False

    def _step_projected(self, b: Bucket) -> None:
        """Step a bucket of projected matrices: `update`, which `weight_norm` wraps in a change of coordinates."""
        self.update(b)

    def _bucket(self, plan: Plan, hyper: Any, *, creating: bool) -> Bucket:
        """Collect the parameters that take part in this step; create their state, and if `creating` do no more."""
        alone = plan.layout.alone and not isinstance(plan.layout.sharding, stack.Stacked)
        skips = alone or self.release is not None or not self._given()
        bucket = Bucket(plan, hyper, [], [], [], [], [], [], [], [])
        for param, *places in zip(plan.params, plan.positions, plan.offsets, strict=True):
            ready = self._low_grads.get(param)
            grad = param.grad if ready is None else ready
            if grad is None:
                if skips or not param.requires_grad:
                    continue
                grad = torch.zeros_like(param)  # other ranks may have one, and all must take part in collectives
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            held = self.state[param]
            if not held:
                describe = self._specs_to_load if creating else self._state_of
                held.update(state.zeros(describe(param, plan.view, plan.group), plan.layout))
                if creating:
                    continue
            pieces = (local(param), plan.layout.piece(grad), self._piece(param, held, plan.layout))
            if not plan.stacked:
                bucket.take(*pieces, (places[0][0], places[1][0]), ready)
                bucket.stored.append(held)
                continue
            for number, matrix in stack.matrices(plan.layout.sharding, *pieces):
                bucket.take(*matrix, (places[0][number], places[1][number]), None)
        return bucket

    def _specs_to_load(self, param: Tensor, view: MatrixView | None, group: int) -> dict[str, Spec]:
        """Describe the state that a checkpoint is loaded into: that of an optimizer which has run for a while."""
        return self._state_of(param, view, group)

    def _piece(self, param: Tensor, held: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """This rank's pieces of the state of a parameter, in the same memory but for counters of sharded stacks."""
        if layout.sharding is None:
            return held
        known = self._pieces.get(param)
        if known is None or known[0] is not held:
            pieces = {name: local(value) for name, value in held.items()}
            if isinstance(layout.sharding, stack.Stacked) and {"until_refresh", "basis_key"} & pieces.keys():
                pieces |= {name: value.cpu() for name, value in pieces.items() if state.is_counter(name)}
            known = self._pieces[param] = (held, pieces)
        return known[1]

    def _store_counters(self, plan: Plan) -> None:
        """Write counters of sharded stacks back to the device: a step reads and advances copies on the host."""
        for param in plan.params:
            held, pieces = self._pieces.get(param, ({}, {}))
            for name, piece in pieces.items():
                if piece.data_ptr() != local(held[name]).data_ptr():
                    local(held[name]).copy_(piece)

    def _given(self) -> bool:
        """Tell whether there is a gradient at all."""
        return bool(self._low_grads) or any(p.grad is not None for group in self.param_groups for p in group["params"])
