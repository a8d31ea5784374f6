"""Parameter groups of all optimizers: options, the views and descriptions of state that follow, changes, loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ...kernels.rounding import join
from . import stack, state, target
from .bucket import Plan
from .bucketing import make_plans, seen
from .checkpoint import STRUCTURAL, load_keeping, restore
from .cross_head import check_rows
from .flattening import FlatteningGuard
from .hyper import Hyper, normalise
from .reconcile import meaning, reconcile
from .sharding_limits import check_sharded
from .spec import Spec
from .summary import Summary, summarise
from .validate import check_subspace
from .view import MatrixView, matrix_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Groups(Optimizer):
    """Parameter groups whose options are validated, and the state of their parameters, described before it exists.

    The methods that read options (`_validate`, `_hyper`, `_structure`, `_view`, `_specs`) are overridden by optimizers
    with other ones.

    Args:
        params: Parameters, parameter groups or (name, parameter) pairs, as in torch.optim.
        defaults: Every option of the optimizer with its value; a subclass declares its own before it calls the
            constructor. `rank` applies to all groups, unless a group names a `rank` or `density` of its own: then
            groups that do not are plain.

    Raises:
        ValueError: An option is out of range, unknown but close to a known one, or contradicts another.
    """

    replicas: ProcessGroup | None = None
    """Processes that hold the same parameters, as under DistributedDataParallel, and share the search for bases."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # Not list() of a bare tensor, which would be its rows: torch raises the error.
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
        """Set up attributes that are derived and never saved."""
        self._flattening_guard = FlatteningGuard(
            getattr(self, "param_groups", None), getattr(self, "_flattening_guard", None)
        )
        self._plans: list[Plan] = []
        self._plans_key: tuple[Any, ...] | None = None
        self._settled: dict[Tensor, dict[str, Spec]] = {}
        self._pieces: dict[Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._transient()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "differentiable":  # torch adds it to the defaults when it loads, not to groups
                    group.setdefault(name, default)
        for held in self.state.values():
            if isinstance(held.get("step"), int | float):
                held["step"] = torch.tensor(float(held["step"]), dtype=torch.float32, device="cpu")
        if self.state:  # a copied or unpickled optimizer: its state was written under the options of its groups
            self._settled = self._described(make_plans(self.param_groups, self._sees, self.replicas))

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
        normalise(param_group, frozenset({*self.defaults, "ranks", stack.OPTION}))
        inherited = dict(self.defaults)
        if "density" in param_group:
            inherited["rank"] = None
        self._validate({**inherited, **param_group})
        if "density" in param_group:
            param_group.setdefault("rank", None)
        explicit = any(param_group.get(name) is not None for name in ("rank", "density"))
        super().add_param_group(param_group)
        try:
            self._flattening_guard.add(self.param_groups, explicit=explicit)
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
        stack.check(param, group, type(self).__name__)
        if group.get("num_heads") is not None:
            self._view(param, group)

    def _planned(self) -> list[Plan]:
        """The buckets of all groups, rebuilt when parameters, or options that decide over state, have changed.

        State that exists is brought to what its group needs now.

        Raises:
            ValueError: It cannot be, or an option was set to what the constructor would have refused.
        """
        key = tuple((*map(seen, group["params"]), *self._fingerprint(group)) for group in self.param_groups)
        if key != self._plans_key:
            self._flattening_guard.check(self.param_groups)
            for group in self.param_groups:
                self._validate(group)
                for param in group["params"]:
                    self._admit(param, group)
            plans = make_plans(self.param_groups, self._sees, self.replicas)
            check_sharded(plans, self.param_groups)
            described = self._described(plans)
            reconcile(self.state, described, self._settled, {p: plan.layout for plan in plans for p in plan.params})
            self._plans, self._plans_key, self._settled, self._pieces = plans, key, described, {}
        return self._plans

    def _fingerprint(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What decides which state the parameters of a group have, and how weights are written."""
        return (group["rounding"], group.get(stack.OPTION), *self._structure(group))

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options of a group that decide which state its parameters have."""
        own = ("projector", "lazy", "carry", "proj_rule", "proj_betas", "num_heads", "compat", "update_proj_gap")
        return (*(group.get(name) for name in (*STRUCTURAL, *own)), group["betas"][0] > 0)

    def _described(self, plans: list[Plan]) -> dict[Tensor, dict[str, Spec]]:
        """Describe the state of every parameter, with what its numbers stand for."""
        found = {}
        for plan in plans:
            group = self.param_groups[plan.group]
            for param in plan.params:
                own = self._state_of(param, plan.view, plan.group)
                found[param] = {key: spec._replace(meaning=meaning(key, plan.view, group)) for key, spec in own.items()}
        return found

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

    def _sees(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        """`_view` of a parameter that may be a stack: then that of one of its matrices."""
        return self._view(stack.one(param, group), group)

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        """Describe the state of a parameter of a group."""
        return state.specs(param, view, Hyper.of(group))

    def _state_of(self, param: Tensor, view: MatrixView | None, group: int) -> dict[str, Spec]:
        """Describe all state of a parameter: `_specs`, of every matrix of a stack, and a correction of its rounding."""
        return self._specs_in(param, view, self.param_groups[group])

    def _specs_in(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        described = self._specs(stack.one(param, group), view, group)
        return stack.described(described, param, group) | target.specs(param, group["rounding"])

    def full_precision(self, param: Tensor) -> Tensor:
        """The value of a parameter in fp32, with its correction where `rounding="compensated"` keeps one."""
        correction = self.state.get(param, {}).get(target.CORRECTION)
        return param.detach().float() if correction is None else join(param.detach(), correction)

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
        order = [(key, group) for group in loaded["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for mine in self.param_groups:
            self._validate(mine)
        self._plans_key = None
        plans = make_plans(self.param_groups, self._sees, self.replicas)
        described = self._settled = self._described(plans)
        layouts = {param: plan.layout for plan in plans for param in plan.params}
        for position, ((key, group), param) in enumerate(zip(order, params, strict=True)):
            saved = loaded["state"].get(key)
            if saved:
                foreign = sorted(group.keys() - self.defaults.keys() - {"params", "param_names"})
                label = f"parameter {position} {tuple(param.shape)}{f', saved with {foreign},' if foreign else ''}"
                self.state[param] = restore(
                    saved, described[param], label, f"this {type(self).__name__}", layouts[param]
                )

    def summary(self) -> Summary:
        """Tell what was matched: one row a bucket with shape, count, side, rank and bytes of state.

        The bytes are computed from metadata and equal what the first step allocates; print the result for a table.
        """
        return summarise(self._planned(), self._state_of)
