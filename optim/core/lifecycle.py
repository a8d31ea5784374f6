"""The lifecycle shared by all optimizers: groups, buckets, state, step, load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ...kernels.rounding import join
from . import state, target
from .bucket import Bucket, Plan
from .checkpoint import STRUCTURAL, load_keeping, restore
from .cross_head import check_rows
from .hyper import Hyper, normalise
from .plain import plain_
from .planning import make_plans
from .spec import Spec
from .summary import Summary, summarise
from .validate import check_subspace
from .view import MatrixView, matrix_shape


class Lifecycle(Optimizer):
    """Base of every optimizer: sorts parameters into buckets and hands each to `update` or `plain`.

    A named optimizer passes its options as `defaults` and writes its algorithm in `update(bucket)`. What is asked of a
    group's options (`_validate`, `_hyper`, `_structure`, `_view`, `_specs`) is overridden where they are others.

    Args:
        params: Parameters, parameter groups or (name, parameter) pairs, as in torch.optim.
        defaults: Every option of the optimizer with its value; a subclass declares its own before it calls the
            constructor. `rank` applies to all groups, unless a group names a `rank` or `density` of its own: then
            groups that do not are plain.

    Raises:
        ValueError: An option is out of range, unknown but close to a known one, or contradicts another.
    """

    linear_between_refreshes: bool = False
    """Between two refreshes the update takes nothing from a gradient but A P, which may be summed in its place."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # A bare tensor is torch's error to raise, not a list of its rows.
        groups: Any = params if isinstance(params, Tensor) else list(params)
        named = any(isinstance(group, dict) and ("rank" in group or "density" in group) for group in groups)
        self._transient()
        defaults = {**defaults, **getattr(self, "_method_options", {})}
        normalise(defaults, frozenset(defaults))
        if named:
            defaults["rank"] = None
        self._validate(defaults)
        super().__init__(groups, defaults)

    def _declare(self, **options: Any) -> None:
        """Add a method's own options to those that the constructor passes on."""
        self._method_options = {**getattr(self, "_method_options", {}), **options}

    def _transient(self) -> None:
        """Set up what is derived and never saved."""
        self._plans: list[Plan] = []
        self._plans_key: tuple[Any, ...] | None = None
        self._low_grads: dict[Tensor, Tensor] = {}
        self._alone: dict[int, Plan] = {}
        self._alone_key: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._transient()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "differentiable":  # torch adds it to the defaults when it loads, not to groups
                    group.setdefault(name, default)
        for held in self.state.values():
            if "step" in held and not isinstance(held["step"], Tensor):
                held["step"] = torch.tensor(float(held["step"]), dtype=torch.float32)

    def _validate(self, group: dict[str, Any]) -> None:
        """Check the options of a complete group; optimizers with other options override this."""
        check_subspace(group)

    def _hyper(self, group: dict[str, Any]) -> Any:
        """Freeze the options of a group for one step."""
        return Hyper.of(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are spelled canonically and validated first.

        Raises:
            ValueError: As the constructor.
            TypeError: A parameter is complex.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        normalise(param_group, frozenset({*self.defaults, "ranks"}))
        inherited = dict(self.defaults)
        if "density" in param_group:
            inherited["rank"] = None
        self._validate({**inherited, **param_group})
        if "density" in param_group:
            param_group.setdefault("rank", None)
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                self._admit(param, self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _admit(self, param: Tensor, group: dict[str, Any]) -> None:
        """Refuse a parameter that cannot be in its group."""
        if param.is_complex():
            raise TypeError(
                f"{type(self).__name__} does not support complex parameters, got {param.dtype}: optimize "
                "torch.view_as_real(parameter) instead"
            )
        target.check(param, group)
        if group.get("num_heads") is not None:
            self._view(param, group)

    def _planned(self) -> list[Plan]:
        """The buckets of all groups, rebuilt when parameters are other objects or a group changes its structure."""
        key = tuple(
            (*map(id, group["params"]), group["rounding"], *self._structure(group)) for group in self.param_groups
        )
        if key != self._plans_key:
            self._plans = make_plans(self.param_groups, self._view)
            state.reconcile(self.state, self._described())
            self._plans_key = key
        return self._plans

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What decides which state the parameters of a group have."""
        options = (*STRUCTURAL, "projector", "lazy", "carry", "proj_rule", "num_heads")
        return (*(group.get(name) for name in options), group["betas"][0] > 0)

    def _described(self) -> dict[Tensor, dict[str, Spec]]:
        """Describe the state of every parameter."""
        return {param: self._state_of(param, plan.view, plan.group) for plan in self._plans for param in plan.params}

    def _view(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        """Orient an eligible parameter of a group; None leaves it plain.

        Eligible are weights of two dimensions or more (viewed as first x rest) whose smaller side exceeds the rank.
        The authors' code projects at `rank >= min(m, n)` too, in a square basis, and so does `compat="official"`.
        """
        if param.ndim < 2 or 0 in param.shape:
            return None
        hyper, shape = Hyper.of(group), matrix_shape(param.shape)
        rank = hyper.rank_for(shape)
        if rank is None or (rank >= min(shape) and not hyper.official):
            return None
        if hyper.num_heads is not None:
            check_rows(shape, hyper.num_heads, rank)
        return MatrixView.of(param.shape, rank, hyper.side)

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        """Describe the state of a parameter of a group."""
        return state.specs(param, view, Hyper.of(group))

    def _state_of(self, param: Tensor, view: MatrixView | None, group: int) -> dict[str, Spec]:
        """The same with the correction of a weight that is written with one."""
        options = self.param_groups[group]
        return self._specs(param, view, options) | target.specs(param, options["rounding"])

    def full_precision(self, param: Tensor) -> Tensor:
        """The value of a parameter in fp32, with its correction where `rounding="compensated"` keeps one."""
        held = self.state.get(param, {})
        correction = held.get(target.CORRECTION)
        return param.detach().float() if correction is None else join(param.detach(), correction)

    def update(self, b: Bucket) -> None:
        """Step a bucket of projected matrices: the algorithm of the named optimizer."""
        raise NotImplementedError(f"{type(self).__name__} projects no matrices")

    def plain(self, b: Bucket) -> None:
        """Step a bucket of parameters that are not projected."""
        plain_(b)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: Re-evaluates the model and returns the loss; runs with gradients enabled.

        Returns:
            The loss of the closure, or None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        hypers = [self._hyper(group) for group in self.param_groups]
        for plan in self._planned():
            if not self._waits(self.param_groups[plan.group]):
                self._step_plan(plan, hypers[plan.group])
        self._low_grads.clear()
        return loss

    def _step_plan(self, plan: Plan, hyper: Any) -> None:
        bucket = self._bucket(plan, hyper)
        if bucket.params:
            (self.plain if plan.view is None else self._project)(bucket)

    @torch.no_grad()
    def step_one(self, param: Tensor) -> None:
        """Step one parameter by its gradient, as `step` would; what `enable_gradient_release` calls.

        Raises:
            KeyError: The optimizer does not have the parameter.
        """
        plans = self._planned()
        if self._alone_key is not self._plans_key:
            self._alone = {id(p): part for plan in plans for p, part in zip(plan.params, plan.alone(), strict=True)}
            self._alone_key = self._plans_key
        plan = self._alone[id(param)]
        self._step_plan(plan, self._hyper(self.param_groups[plan.group]))

    def needs_all_gradients(self) -> str | None:
        """Say why parameters cannot be stepped one by one; None where they can."""
        return None

    def _prepare(self) -> None:
        """Do what must precede the sorting into buckets."""

    def _waits(self, group: dict[str, Any]) -> bool:
        """Tell whether a group cannot be stepped yet."""
        return False

    def _project(self, b: Bucket) -> None:
        """Step a bucket of projected matrices, in whatever coordinates."""
        self.update(b)

    def _bucket(self, plan: Plan, hyper: Any) -> Bucket:
        """Gather what takes part in this step, creating the state of parameters that are new."""
        bucket = Bucket(plan, hyper, [], [], [], [], [], [], [], [])
        offsets = plan.offsets or [0] * len(plan.params)
        for param, position, offset in zip(plan.params, plan.positions, offsets, strict=True):
            ready = self._low_grads.get(param)
            grad = param.grad if ready is None else ready
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            held = self.state[param]
            if not held:
                held.update(state.zeros(self._state_of(param, plan.view, plan.group)))
                if self._inert(hyper, grad):
                    continue
            bucket.params.append(param)
            bucket.grads.append(grad)
            bucket.states.append(held)
            bucket.positions.append(position)
            bucket.offsets.append(offset)
            bucket.ready.append(ready)
            bucket.projected.append(None)
            bucket.fresh.append(False)
        return bucket

    @staticmethod
    def _inert(hyper: Any, grad: Tensor) -> bool:
        """Recognise the warm-up step that checkpointing tools run to create state: lr 0 and zero gradients.

        It must allocate and do nothing else: no basis of zeros, no step counted.
        """
        return float(hyper.lr) == 0.0 and not grad.any()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, keeping this optimizer's dtypes, devices and structure.

        torch casts every state tensor to the dtype of its parameter; ours stay what they are.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The checkpoint is of another rank, side, rule or method; nothing is loaded.
        """
        load_keeping(self, super().load_state_dict, state_dict, self._restore)

    def _restore(self, loaded: dict[str, Any]) -> None:
        order = [key for group in loaded["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        self._plans = make_plans(self.param_groups, self._view)
        described = self._described()
        for position, (key, param) in enumerate(zip(order, params, strict=True)):
            saved = loaded["state"].get(key)
            if saved:
                label = f"parameter {position} {tuple(param.shape)}"
                self.state[param] = restore(saved, described[param], label)

    def summary(self) -> Summary:
        """Tell what was matched: one row a bucket with shape, count, side, rank and bytes of state.

        The bytes are computed from metadata and equal what the first step allocates; print the result for a table.
        """
        return summarise(self._planned(), self._state_of)

    def skipped_refreshes(self) -> int:
        """Count the refreshes skipped so far because a gradient was zero or not finite, over all matrices."""
        return sum(int(held["skipped_refreshes"]) for held in self.state.values() if "skipped_refreshes" in held)
