"""ZeRO-1 and 2 of DeepSpeed, which cut flattened parameters into pieces: each is seen as the whole rows that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .core.bucket import Plan
from .core.optimizer import SubspaceOptimizer
from .core.partitions import check_class, check_rows, check_stage, partition
from .core.sharding import local
from .core.summary import Summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group = dict[str, Any]


class ZeroOptimizer(Optimizer):
    """An optimizer of the package as the client optimizer of DeepSpeed's ZeRO stages 1 and 2.

        optimizer = ZeroOptimizer(GaLore, param_groups(model, rank=128), lr=1e-2)
        config = {..., "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    DeepSpeed flattens every group into one vector, cuts it into equal pieces, one a rank, and steps the groups one by
    one. So every projected matrix (m, n) gets a group of its own here. Where W ranks divide m, its piece is m / W whole
    rows, which are stepped as those of a sharded parameter (DTensor, `Shard(0)`): nothing of the algorithm changes with
    W. Parameters that are not projected are stepped entry by entry, flat as they come.

    The weights that are stepped are DeepSpeed's copies in fp32, whatever the model's dtype.

    Args:
        build: The class, `GaLore` say.
        params: Groups as for the class, before `deepspeed.initialize`.
        group: Ranks that share the parameters, DeepSpeed's data-parallel group; None are all ranks.
        options: Options of the class.

    Raises:
        ValueError: The rows of a projected matrix cannot be dealt out evenly, or the class does not step parameters one
            by one, or not entry by entry where they are plain, as with moments in 8 bits.
        RuntimeError: A step without DeepSpeed, or with stage 3, which is found out in the first one.

    A checkpoint of the engine holds the state of every rank and is for as many ranks. Random numbers are those of the
    groups in this order.
    """

    def __init__(
        self,
        build: Callable[..., SubspaceOptimizer],
        params: Iterable[Any],
        *,
        group: ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self._build, self._group, self._options = build, group, options
        whole = build(params, **options)
        given = [param for group in whole.param_groups for param in group["params"]]
        check_stage(given)
        check_class(whole)
        self._given = [ref(param) for param in given]
        self._shapes: list[torch.Size | None] = []
        self._inner: SubspaceOptimizer | None = None
        split = list(self._split(whole))
        super().__init__(split, {})
        self._groups: list[Group] = self.param_groups
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def _split(self, whole: SubspaceOptimizer) -> Iterator[Group]:
        """Yield a group for every projected matrix, and one for all plain parameters between two of them."""
        world = dist.get_world_size(self._group) if dist.is_initialized() else 1
        for group in whole.param_groups:
            settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            plain: list[Tensor] = []
            for param in group["params"]:
                if whole._sees(param, group) is None:
                    plain.append(param)
                    continue
                if plain:
                    yield self._noted(None, {"params": plain, **_without_rank(settings)})
                    plain = []
                check_rows(param, world)
                yield self._noted(param.shape, {"params": [param], **settings})
            if plain:
                yield self._noted(None, {"params": plain, **_without_rank(settings)})

    def _noted(self, shape: torch.Size | None, group: Group) -> Group:
        """Note the shape of a group's matrix, None for plain parameters: flattening will lose it."""
        self._shapes.append(shape)
        return group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the partitions of the groups that `param_groups` has now.

        Args:
            closure: Not supported by DeepSpeed.

        Raises:
            RuntimeError: A group holds anything but one flat partition.
        """
        if closure is not None:
            raise RuntimeError("got a closure, which DeepSpeed's engine does not evaluate: call engine.step()")
        inner = self._whole()
        for group in self.param_groups:
            index = next(i for i, known in enumerate(self._groups) if known is group)
            inner.param_groups[index].update({name: value for name, value in group.items() if name != "params"})
            flat, param = self._parts[index]
            if group["params"][0] is not flat or local(param).data_ptr() != flat.data_ptr():
                raise RuntimeError("a partition is another tensor than before: construct the optimizer anew")
            if flat.grad is not None:
                param.grad = flat.grad if param is flat else _rows(flat.grad, param)
                inner.step_one(param)
                param.grad = param.grad if param is flat else None

    def _whole(self) -> SubspaceOptimizer:
        """The optimizer of all partitions, once DeepSpeed has made them."""
        if self._inner is None:
            check_stage(param for given in self._given if (param := given()) is not None)
            world = dist.get_world_size(self._group) if dist.is_initialized() else 1
            groups = []
            for index, (group, shape) in enumerate(zip(self._groups, self._shapes, strict=True)):
                flat = partition(group["params"], shape, world)
                param = flat if shape is None else self._matrix(flat, shape)
                self._parts[index] = flat, param
                groups.append({**group, "params": [param]})
            self._inner = self._build(groups, **self._options)
        return self._inner

    def _matrix(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """A sharded parameter of this shape whose local piece is the flat one, in the same memory."""
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        if self._group is None:
            mesh = init_device_mesh(flat.device.type, (dist.get_world_size(),))
        else:
            mesh = DeviceMesh.from_group(self._group, flat.device.type)
        rows = flat.detach().view(-1, *shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride))

    def state_dict(self) -> dict[str, Any]:
        """This rank's pieces of the state, which DeepSpeed saves rank by rank."""
        groups = [{**group, "params": [index]} for index, group in enumerate(self._groups)]
        state = {}
        for index, (_, param) in self._parts.items():
            held = {} if self._inner is None else self._inner.state.get(param, {})
            if held:
                state[index] = {name: local(value) for name, value in held.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this rank.

        Raises:
            ValueError: It is of other groups, or of another number of ranks.
        """
        if len(state_dict["param_groups"]) != len(self._groups):
            raise ValueError(f"the checkpoint has {len(state_dict['param_groups'])} groups, need {len(self._groups)}")
        inner = self._whole()
        whole = inner.state_dict()
        plans = {param: plan for plan in inner._planned() for param in plan.params}
        params = {index: param for index, (_, param) in self._parts.items()}
        whole["state"] = {
            index: self._wrapped(params[index], plans[params[index]], held)
            for index, held in state_dict["state"].items()
        }
        inner.load_state_dict(whole)
        for group, saved in zip(self._groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})

    def _wrapped(self, param: Tensor, plan: Plan, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of the state of a parameter as DTensors, which the inner optimizer loads."""
        layout = plan.layout
        if layout.sharding is None:
            return held
        described = self._whole()._state_of(param, plan.view, plan.group)
        found = {}
        for name, value in held.items():
            spec = described[name]
            if not spec.shape:
                found[name] = value
                continue
            own = layout.sharding.zeros(spec.shape, spec.dtype, layout.place(spec.axis))
            if local(own).shape != value.shape:
                raise ValueError(
                    f"the loaded {name} is a piece of shape {tuple(value.shape)}, this rank keeps "
                    f"{tuple(local(own).shape)}: load it with as many ranks as have saved it"
                )
            local(own).copy_(value)
            found[name] = own
        return found

    def summary(self) -> Summary:
        """What is projected, and what it costs, over all ranks; see `GaLore.summary`."""
        return self._whole().summary()


def _without_rank(settings: Group) -> Group:
    return {**settings, "rank": None} | ({"density": None} if "density" in settings else {})


def _rows(grad: Tensor, like: Any) -> Tensor:
    """This rank's flat piece of a gradient as a DTensor, sharded as a parameter (a DTensor) is."""
    from torch.distributed.tensor import DTensor

    piece = grad.view(local(like).shape)
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
