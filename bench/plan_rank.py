"""What one rank of many keeps, allocates and sends: the optimizer's own code, run as the first rank of pretended ones.

Meta parameters are placed as FSDP2 places them, the steps of every bucket run in a process group whose collectives send
nothing, and what they allocate and pass to collectives is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..optim.core import linalg
from ..optim.core.bucket import Plan as Bucket
from ..optim.core.layout import Layout
from ..optim.core.lifecycle import Lifecycle
from ..optim.core.linalg import unfinished
from ..optim.core.sharding import local
from ..optim.core.state import zeros
from ..optim.plan import KINDS, Watch, by_kind
from ..optim.planning.steps import without_data
from ..optim.planning.watch import pieces_of, replaced
from .errors import UserError
from .plan_world import Cost, World, own, place, pretended


@dataclass(frozen=True)
class RankPlan:
    """Bytes and costs of the first rank, whose pieces are the largest.

    Args:
        weights: Its pieces of parameters.
        gradients: Those of gradients.
        state: Bytes of state by kind.
        workspace: Most that a step without a refresh allocates.
        workspace_refresh: The same with a refresh; None where there are none.
        step: What the optimizer's step sends and computes.
        refresh: What finding all bases anew adds to that.
        amortised: Bytes that refreshes send, by step: divided by `update_proj_gap`.
        own: What the parallel wrapper itself sends.
        own_kept: The same with `reshard_after_forward=False`.
    """

    weights: int
    gradients: int
    state: dict[str, int]
    workspace: int
    workspace_refresh: int | None
    step: Cost
    refresh: Cost
    amortised: int
    own: Cost
    own_kept: Cost

    @property
    def resident(self) -> int:
        """Weights, gradients and state."""
        return self.weights + self.gradients + sum(self.state.values())


IDLE = ("wait_tensor", "_wrap_tensor_autograd")
"""Operations of torch.distributed that send nothing."""


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what collectives move and matrix products compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        how = kwargs or {}
        made = func(*args, **how)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._moved(func.__name__, [*_tensors(args), *_tensors(made)])
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **how, out_val=made)
            self.cost = self.cost.plus(Cost(flops=flops))
        return made

    def _moved(self, name: str, tensors: list[Tensor]) -> None:
        if name.startswith(IDLE):
            return
        largest = max(tensors, key=Tensor.numel)
        times = 2 if name.startswith(("allreduce", "all_reduce")) else 1
        self.cost = self.cost.plus(Cost(times * largest.numel(), times * largest.nbytes, 1))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _all_unfinished(energies: Tensor, images: Sequence[Tensor], layout: Layout) -> list[int]:
    """Takes the place of `linalg.unfinished` for the worst case: no subspace iteration ends early."""
    unfinished(energies, images, layout)
    return list(range(len(images)))


def rank_plan(model: nn.Module, make: Callable[[nn.Module], Optimizer], world: World) -> RankPlan:
    """Plan one rank; the model's parameters are put in the place of others without data.

    Args:
        model: A model without data.
        make: Makes the optimizer.
        world: The ranks.

    Raises:
        UserError: The optimizer is not of this package, or FSDP2 could not place a parameter.
        NotImplementedError: The optimizer does not step parameters that are sharded so.
    """
    elements = sum(param.numel() for param in model.parameters())
    whole = sum(param.nbytes for param in model.parameters())
    with pretended(world) as mesh, pieces_of("cuda"), replaced([(linalg, "unfinished", _all_unfinished)]):
        if world.parallel != "ddp":
            place(model, mesh, world)
        optimizer = make(model)
        if not isinstance(optimizer, Lifecycle):
            raise UserError(
                f"--world plans optimizers of this package, got torch's {type(optimizer).__name__}: "
                "--optimizer adamw8bit --state-dtype float32 keeps the same state"
            )
        shadow = without_data(optimizer, "cuda")
        if world.replicas:
            if not optimizer.summary().projected:
                raise UserError(f"--replicas: {type(optimizer).__name__} has no bases to share")
            shadow.replicas = dist.group.WORLD  # type: ignore[attr-defined]
        pieces = sum(local(param).nbytes for param in model.parameters())
        return _sum(shadow, pieces, own(world, elements, whole))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Part:
    """What a bucket takes."""

    state: Mapping[str, int]
    plain: tuple[int, Cost]
    refresh: tuple[int, Cost] | None
    gap: float

    @property
    def extra(self) -> Cost:
        """What a refresh adds to a step."""
        return Cost() if self.refresh is None else self.refresh[1].plus(self.plain[1], -1)


def _sum(shadow: Lifecycle, weights: int, own: tuple[Cost, Cost]) -> RankPlan:
    params = [param for group in shadow.param_groups for param in group["params"]]
    shadow.summary()  # refuses what is not decided yet
    for group in shadow.param_groups:
        if "residual_warmup" in group:  # in which single entries are not known, and nothing is sent for them
            group["residual_warmup"] = 1
    for param in params:
        param.requires_grad_(False)  # only those of a bucket take part in its steps
    known: dict[Any, _Part] = {}
    parts = []
    for bucket in list(shadow._planned()):
        alike = bucket.view if bucket.view is not None else id(bucket)
        key = (bucket.group, alike, bucket.params[0].dtype, bucket.layout, len(bucket.params))
        if key not in known:
            known[key] = _steps(shadow, bucket)
        parts.append(known[key])
    refreshes = [part.refresh for part in parts if part.refresh is not None]
    step, again = Cost(), Cost()
    for part in parts:
        step, again = step.plus(part.plain[1]), again.plus(part.extra)
    return RankPlan(
        weights=weights,
        gradients=weights,
        state={name: sum(part.state[name] for part in parts) for name in KINDS},
        workspace=max(part.plain[0] for part in parts),
        workspace_refresh=max((size for size, _ in refreshes), default=None),
        step=step,
        refresh=again,
        amortised=round(sum(part.extra.bytes / part.gap for part in parts)),
        own=own[0],
        own_kept=own[1],
    )


def _steps(shadow: Lifecycle, bucket: Bucket) -> _Part:
    """Step the parameters of a bucket: with a first basis, without a refresh, and with one from an old basis."""
    shadow.state.clear()
    for param in bucket.params:
        param.requires_grad_(True)
        param.grad = torch.empty_like(param)
        shadow.state[param] = zeros(shadow._state_of(param, bucket.view, bucket.group), bucket.layout)
    held = [shadow.state[param] for param in bucket.params]
    state = by_kind({name: local(value) for name, value in each.items()} for each in held)
    first, plain, refresh = _counted(shadow), _counted(shadow), None
    waiting = [each["until_refresh"] for each in held if "until_refresh" in each]
    for counter in waiting:
        counter.zero_()
    if waiting:
        size, cost = _counted(shadow)
        refresh = max(first[0], size), cost
    for param in bucket.params:
        param.requires_grad_(False)
        param.grad = None
    return _Part(state, plain, refresh, shadow.param_groups[bucket.group].get("update_proj_gap", 1))


def _counted(shadow: Lifecycle) -> tuple[int, Cost]:
    with Watch() as watch, Counted() as counted:
        shadow.step()
    return watch.peak, counted.cost
