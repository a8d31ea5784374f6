"""Stacks of matrices, as the experts of a fused mixture: one parameter (E, m, n) whose matrices are stepped one by one.

To all that computes, each of them is a parameter of its own, with a position (so with random numbers) of its own. To
checkpoints, the state of the stack is one tensor a name, with a first dimension more than that of a matrix: bases
(E, b, r), moments (E, a, r), counters (E,). It is sharded as the stack is, in that dimension too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .sharding import Box, Sharding, is_dtensor, local, moved, shard_dim
from .spec import Axis, Spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor.placement_types import Placement

OPTION = "stacked"
"""Key of a group whose parameters are stacks."""

PLAIN = "leave stacks of experts plain, in a group without 'rank', as param_groups(model, exclude=['experts']) does"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stacked(Sharding):
    """How a stack (E, m, n) is sharded, described by what that does to one of its matrices (m, n).

    Args:
        whole: The sharding of the stack itself.
    """

    whole: Sharding

    @classmethod
    def of(cls, param: Tensor) -> Stacked | None:
        """Read it from a parameter (E, m, n); None for a plain tensor.

        Raises:
            NotImplementedError: A placement is neither a shard nor a replica.
        """
        if not is_dtensor(param):
            return None
        if any(shard_dim(p) is None and not p.is_replicate() for p in param.placements):
            raise NotImplementedError(
                f"got a {tuple(param.shape)} parameter with placements {param.placements}, need Shard or Replicate()"
            )
        placements = tuple(map(_of_matrix, param.placements))
        whole = Sharding(param.device_mesh, tuple(param.placements), tuple(param.shape), param.device)
        return cls(param.device_mesh, placements, tuple(param.shape[1:]), param.device, whole)

    @property
    def own(self) -> tuple[Placement, ...]:
        """Placements of the parameter."""
        return self.whole.placements

    def box(self) -> Box | None:
        """The local piece of every matrix; None where matrices are whole."""
        return super().box() if self.groups(0) or self.groups(1) else None

    def dealers(self) -> tuple[ProcessGroup, ...]:
        """Process groups over which whole matrices are distributed: the first dimension is sharded."""
        return self.whole.groups(0)

    def numbers(self) -> range:
        """Which of the E matrices this rank has, whole or in pieces."""
        (count, *_), (first, *_) = self.whole._cut(self.whole.shape, self.own)
        return range(first, first + count)

    def place(self, axis: Axis, *, transposed: bool = False, everywhere: bool = False) -> tuple[Placement, ...]:
        """Placements of a state (E, ...): those of the state of a matrix, with every dimension one higher."""
        if axis == "param":
            return self.own
        inner = super().place(axis, transposed=transposed, everywhere=everywhere)
        return tuple(
            own if shard_dim(own) == 0 else _shifted(placement) for own, placement in zip(self.own, inner, strict=True)
        )


def _of_matrix(placement: Placement) -> Placement:
    """What a placement of the stack does to a matrix: `Shard(0)` leaves it whole, `Shard(d)` shards dimension d - 1."""
    from torch.distributed.tensor import Replicate

    dim = shard_dim(placement)
    return moved(placement, dim - 1) if dim else Replicate()


def _shifted(placement: Placement) -> Placement:
    dim = shard_dim(placement)
    return placement if dim is None else moved(placement, dim + 1)


def check(param: Tensor, group: Mapping[str, Any], optimizer: str) -> None:
    """Refuse parameters that are no stacks in a group with `stacked=True`, and options that do not go with it.

    Args:
        param: A parameter.
        group: Its group.
        optimizer: Its optimizer, for messages.

    Raises:
        ValueError: The parameter has not three dimensions, or an option looks at more than one matrix.
    """
    if group.get(OPTION, False) not in (True, False):
        raise ValueError(f"Invalid stacked: {group[OPTION]!r}; need True or False")
    if not group.get(OPTION):
        return
    if param.ndim != 3:
        raise ValueError(
            f"stacked=True needs parameters (experts, m, n), got one of shape {tuple(param.shape)}: put it into a "
            "group without 'stacked'"
        )
    names = {"rank": "auto", "projector": ("blocks", "cross_head"), "residual": ("exact", "additive")}
    for name, refused in names.items():
        if group.get(name) in (refused if isinstance(refused, tuple) else (refused,)):
            raise ValueError(
                f"got a stack of shape {tuple(param.shape)}: stacked=True does not go with {name}={group[name]!r} of "
                f"{optimizer}, which takes parameters as a whole: choose another {name}, or {PLAIN}"
            )


def count(param: Tensor, group: Mapping[str, Any]) -> int:
    """How many matrices a parameter counts for."""
    return len(param) if group.get(OPTION) else 1


def one(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A tensor with shape, dtype and device of one whole matrix of a stack, any values; of other groups `param`."""
    if not group.get(OPTION):
        return param
    piece, shape = local(param).detach(), param.shape[1:]
    found: Tensor = piece[0] if len(piece) and piece.shape[1:] == shape else piece.new_empty(shape)
    return found


def described(specs: dict[str, Spec], param: Tensor, group: Mapping[str, Any]) -> dict[str, Spec]:
    """Describe the state of a stack, given that of a matrix: (E, ...); if sharded, counters are on its device too."""
    if not group.get(OPTION):
        return specs
    device = param.device if is_dtensor(param) else None
    return {
        name: spec._replace(shape=(len(param), *spec.shape), device=device or spec.device)
        for name, spec in specs.items()
    }


def matrices(
    sharding: Sharding | None, param: Tensor, grad: Tensor, held: State
) -> Iterator[tuple[int, tuple[Tensor, Tensor, State]]]:
    """Yield every matrix that this rank has of a stack: its number, and views of its weight, gradient and state."""
    numbers = sharding.numbers() if isinstance(sharding, Stacked) else range(len(param))
    for number, *pair, one in zip(numbers, param.detach(), grad, states(held, len(param)), strict=True):
        yield number, (*pair, one)


def states(held: Mapping[str, Tensor], size: int) -> list[State]:
    """Split the state of a stack into those of its `size` matrices, as views."""
    parts = {name: value.unbind() for name, value in held.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(size)]
