"""Converting the state of a checkpoint to another rank or other bits."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .core import stack
from .core.adaptive import AUTO
from .core.checkpoint import CONVERTIBLE, merged_groups
from .core.conversion import Conversion
from .core.lifecycle import Lifecycle
from .core.sharding import is_dtensor

OURS = (*CONVERTIBLE, "ranks", "energy", "budget")
"""Options that the result takes from the optimizer; all others are the checkpoint's, as whenever one is loaded."""

UNNAMED: dict[str, Any] = {"rank": None, "density": None, "rule": "adamw", "state_dtype": "float32"}
UNNAMED |= {"basis_dtype": None, "rounding": "nearest", "lazy": None, "weight_norm": False, "num_heads": None}
"""The values of options that a checkpoint lacks, as an older one, or one of torch's AdamW, does."""

Group = dict[str, Any]
StateDict = dict[str, Any]


def convert_state(state_dict: Mapping[str, Any], optimizer: Lifecycle) -> StateDict:
    """Convert a state dict into one for an optimizer of the same method with another rank or other bits.

        optimizer = GaLore(param_groups(model, rank=64), lr=1e-2, state_dtype="8bit")
        optimizer.load_state_dict(convert_state(torch.load("rank128-fp32.pt"), optimizer))

    A lower rank keeps the leading columns of basis and moments. A higher one adds orthonormal columns at random, with
    no momentum and the mean of the second moments, and has the basis found anew in the next step. Moments are decoded
    and coded, corrections of rounding converted, started at zero or left out. Ranks that `rank="auto"` has chosen are
    the optimizer's, or where it has not chosen yet the checkpoint's. All other options are the checkpoint's, as ever
    when one is loaded.

    Args:
        state_dict: What `state_dict()` returned, of this package or of torch.optim.AdamW.
        optimizer: The optimizer that will load it; it is not changed.

    Returns:
        A state dict for `optimizer.load_state_dict`; tensors are copies.

    Raises:
        TypeError: The optimizer is not of this package.
        ValueError: Groups or parameters do not correspond, or differ in more than ranks and bits.
        NotImplementedError: Parameters or their state are sharded.
    """
    if not isinstance(optimizer, Lifecycle):
        raise TypeError(
            f"got a {type(optimizer).__name__}, need an optimizer of lowmem.optim; of a wrapper pass wrapper.optimizer"
        )
    saved_state, state, groups, position = state_dict["state"], {}, [], 0
    _check(optimizer.param_groups, state_dict["param_groups"], saved_state)
    for mine, named in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        saved = {name: value for name, value in UNNAMED.items() if name in mine} | named
        held = {
            param: saved_state[key]
            for param, key in zip(mine["params"], saved["params"], strict=True)
            if saved_state.get(key)
        }
        result = _result(mine, saved, stepped=bool(held))
        before, after = ({**mine, **group, "params": mine["params"]} for group in (saved, result))
        optimizer._validate(after)
        with _holding(optimizer, held):
            for param, key in zip(mine["params"], saved["params"], strict=True):
                if param in held:
                    state[key] = _converted(optimizer, param, (before, after), position, held[param])
                position += stack.count(param, mine)
        groups.append(copy.deepcopy(result))
    return {"state": state, "param_groups": groups}


def _converted(
    optimizer: Lifecycle, param: Tensor, groups: tuple[Group, Group], position: int, saved: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The state of a parameter; of a stack, that of every matrix."""
    if not groups[1].get(stack.OPTION):
        return Conversion(optimizer, param, groups, position).of(saved)
    if any(value.shape[:1] != param.shape[:1] for value in saved.values()):
        raise ValueError(f"the state of a {tuple(param.shape)} parameter is not that of a stack: drop 'stacked'")
    before, after = ({name: value for name, value in group.items() if name != stack.OPTION} for group in groups)
    parts = [
        Conversion(optimizer, stack.one(param, groups[1]), (before, after), position + number).of(held)
        for number, held in enumerate(stack.states(saved, len(param)))
    ]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _check(ours: list[Group], theirs: list[Group], state: Mapping[Any, Mapping[str, Any]]) -> None:
    counts, saved = ([len(group["params"]) for group in groups] for groups in (ours, theirs))
    if counts != saved:
        raise ValueError(
            f"the checkpoint has groups of {saved} parameters, this optimizer of {counts}: construct it with the "
            "groups of the checkpoint"
        )
    params = [param for group in ours for param in group["params"]]
    if any(map(is_dtensor, (*params, *(value for held in state.values() for value in held.values())))):
        raise NotImplementedError(
            "got sharded parameters or state (DTensor): convert a full state dict, as get_optimizer_state_dict(model, "
            "optimizer, options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict "
            "returns it, for an optimizer of the model that is not sharded"
        )


def _result(mine: Group, saved: Group, *, stepped: bool) -> Group:
    """The group of a checkpoint with the rank and the bits of ours.

    Raises:
        ValueError: They differ in an option that cannot be converted, or our ranks are not chosen yet.
    """
    ranks = mine.get("ranks") if stepped else None
    if mine.get("rank") == AUTO and stepped and ranks is None:
        ranks = saved.get("ranks")
        if ranks is None:
            raise ValueError(
                f"rank='auto' is chosen from the gradients of the first step, which this optimizer has not taken, and "
                f"the checkpoint has rank={saved.get('rank')!r}: construct it with that rank"
            )
    result = {name: value for name, value in saved.items() if name not in OURS}
    result |= {name: mine[name] for name in OURS if name in mine}
    if "ranks" in result:
        result["ranks"] = ranks
    merged_groups([mine], [result])  # raises as loading would
    return result


@contextmanager
def _holding(optimizer: Lifecycle, held: dict[Tensor, Any]) -> Iterator[None]:
    """Let the optimizer hold the checkpoint's state for a while: its names tell the phase of a sparse residual."""
    own = optimizer.state
    optimizer.state = defaultdict(dict, held)
    try:
        yield
    finally:
        optimizer.state = own
