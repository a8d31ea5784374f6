"""Whole tensors that take turns: which matrices of a group are state-full now, all others being state-free or frozen.

Of N blocks k are active at a time, for T steps of the group. The schedule is a function of the seed and of the number
of refreshes, both of them in the group and so in every checkpoint; gradients have no say in it.

    ascending     blocks 0..k-1, then k..2k-1, and on, around the end
    descending    the same from the last block
    mirror        the same over the order 0, N-1, 1, N-2, ..., the middle included
    random        the same over a permutation that is drawn anew when every block has had as many turns as any other:
                  after N / k refreshes where k divides N, where each has had one, else after N / gcd(N, k)
    iid           k blocks drawn at every refresh, without regard to earlier ones
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from ...kernels import random
from . import state_creation
from .target import CORRECTION

ORDERS = ("random", "iid", "ascending", "descending", "mirror")
"""Values of the option `block_order`."""
BLOCKS = ("tensor", "layer")
"""Values of the option `block_by`."""

DONE, WAIT = "block_refreshes", "block_wait"
"""Entries of a group: refreshes done, steps until the next."""

Group = Mapping[str, Any]


def is_matrix(param: Tensor) -> bool:
    """Tell what can be a block, or be projected: a weight of two dimensions or more."""
    return param.ndim >= 2 and 0 not in param.shape


def turns(group: Group) -> bool:
    """Tell whether the matrices of a group take turns."""
    return group["projector"] == "blocks" and not group["rank"] is group["density"] is None


def blocks(group: Group) -> list[list[Tensor]]:
    """Sort the matrices of a group into blocks, in the order of the group.

    Raises:
        ValueError: Layers are asked for, and a matrix has no name, or none with a number in it.
    """
    params = group["params"]
    if (group["block_by"] or "tensor") == "tensor":
        return [[param] for param in params if is_matrix(param)]
    if "param_names" not in group:
        raise ValueError(
            "block_by='layer' takes the layer from the names of parameters, and these have none: pass "
            "model.named_parameters() or {'params': [(name, parameter), ...]} in every group, or block_by='tensor'"
        )
    layers: dict[str, list[Tensor]] = {}
    for name, param in zip(group["param_names"], params, strict=True):
        if is_matrix(param):
            layers.setdefault(layer(name), []).append(param)
    return list(layers.values())


def layer(name: str) -> str:
    """The part of a parameter's name that tells its layer: up to its first integer, as `model.layers.3`.

    Raises:
        ValueError: There is no integer.
    """
    found = re.match(r"\D*\d+", name)
    if found is None:
        raise ValueError(
            f"block_by='layer' needs the number of a layer in the name of every matrix, {name!r} has none: put it in "
            f"a plain group, {{'params': [({name!r}, parameter)], 'rank': None}}, beside one with 'rank' or 'density'"
        )
    return found.group()


def count(group: Group, total: int) -> int:
    """Number of active blocks: `rank` of them, or `max(1, round(density total))`; none at density 0, or of none.

    Raises:
        ValueError: More are asked for than there are.
    """
    if group["density"] is not None:
        return min(total, max(1, round(group["density"] * total))) if group["density"] > 0 else 0
    rank: int = group["rank"]
    if rank > total > 0:
        raise ValueError(
            f"rank={rank}: with projector='blocks' it is the number of active blocks, of which the group has {total}; "
            f"pass at most {total}, or 'rank': None with a density, as 'density': 0.25"
        )
    return min(rank, total)


def window(order: str, total: int, size: int, refreshes: int, seed: int = 0) -> list[int]:
    """The blocks that are active after so many refreshes, the first included (1 is the first window)."""
    turn = refreshes - 1
    if order == "iid":
        chosen: list[int] = random.subset(random.mix(seed, turn), total, size).tolist()
        return chosen
    line = list(range(total))
    if order == "random":
        epoch, turn = divmod(turn, total // math.gcd(total, size))
        line = random.bits(random.mix(seed, epoch), range(1), total)[0].argsort(stable=True).tolist()
    elif order == "descending":
        line.reverse()
    elif order == "mirror":
        line = [end for pair in zip(line, reversed(line), strict=True) for end in pair][:total]
    return [line[(turn * size + place) % total] for place in range(size)]


def active(group: Group) -> frozenset[int]:
    """Identities of the parameters that are active now; before the first step, of those that will be in it."""
    parts = blocks(group)
    size = count(group, len(parts))
    if not size:
        return frozenset()
    refreshes = max(1, group.get(DONE, 0))
    chosen = window(group["block_order"] or "random", len(parts), size, refreshes, group["seed"])
    return frozenset(id(param) for block in chosen for param in parts[block])


def is_active(param: Tensor, group: Group) -> bool:
    """Tell whether a parameter is active now."""
    return id(param) in active(group)


def advance(group: dict[str, Any], states: MutableMapping[Any, Any]) -> None:
    """Count a step of a group, and where its window is over open the next, dropping the state of what changes.

    Blocks that remain active keep their state unless `carry="reset"`; at density 1 nothing ever changes.
    """
    if group[WAIT] <= 0:
        before = active(group) if group[DONE] else frozenset()
        group[DONE] += 1
        after = active(group)
        restarts = group["carry"] == "reset" and group["density"] != 1.0
        stale = before | after if restarts else before ^ after
        for param in group["params"]:
            if id(param) in stale:
                correction = states.pop(param, {}).get(CORRECTION)
                if correction is not None:  # the low bits of the weight, which stays
                    states[param] = {CORRECTION: correction}
        group[WAIT] = group["update_proj_gap"]
    group[WAIT] -= 1


def only_creates_state(group: Group) -> bool:
    """Recognise the step of `state_creation` in a group of blocks, which must not open a window either."""
    return not group[DONE] and state_creation.only_creates_state([group])
