"""Checkpoints of sharded optimizers, as ranks write and read them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from .layouts import local, model, shard, train, whole
from .work import METHODS

MIDDLE, END = 6, 10
"""Steps of the checkpoint, within an interval, and of the end."""

Sizes = dict[str, int] | None


def fresh(name: str, layout: str, sizes: Sizes, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    made = shard(model(sizes, dtype), layout)
    return made, METHODS[name](made)


def all_state(optimizer: torch.optim.Optimizer, gather: bool = True) -> dict[str, Any]:
    """Every state tensor by position and name, as arrays: whole ones, or this rank's pieces."""
    view = whole if gather else local
    return {
        f"{position}.{name}": view(value.detach()).numpy().copy()
        for position, held in optimizer.state_dict()["state"].items()
        for name, value in held.items()
    }


def resumes(name: str, layout: str, sizes: Sizes, dtype: torch.dtype, flatten: bool) -> list[str]:
    """Names of weights and state of this rank that are others after a resume than after the uninterrupted run."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    made, optimizer = fresh(name, layout, sizes, dtype)
    train(made, optimizer, range(MIDDLE), layout)
    saved = copy.deepcopy((get_model_state_dict(made), get_optimizer_state_dict(made, optimizer, options=options)))
    train(made, optimizer, range(MIDDLE, END), layout)
    twin, resumed = fresh(name, layout, sizes, dtype)
    set_model_state_dict(twin, saved[0])
    set_optimizer_state_dict(twin, resumed, saved[1], options=options)
    train(twin, resumed, range(MIDDLE, END), layout)
    (one, other) = ((pieces(m), all_state(o, gather=False)) for m, o in ((made, optimizer), (twin, resumed)))
    return [key for a, b in zip(one, other, strict=True) for key in a | b if not same(a.get(key), b.get(key))]


def pieces(made: nn.Module) -> dict[str, Any]:
    return {name: local(p.detach()).numpy().copy() for name, p in made.named_parameters()}


def same(one: Any, other: Any) -> bool:
    known = one is not None and other is not None
    return known and one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def save(name: str, sizes: Sizes, dtype: torch.dtype, folder: str) -> dict[str, Any]:
    """Train half of the way, save by DCP, and return the state as arrays."""
    made, optimizer = fresh(name, "fsdp", sizes, dtype)
    train(made, optimizer, range(MIDDLE), "dense")  # all ranks see the whole batch, in worlds of any size
    dcp.save(
        {"model": get_model_state_dict(made), "optim": get_optimizer_state_dict(made, optimizer)}, checkpoint_id=folder
    )
    return all_state(optimizer)


def load(
    name: str, layout: str, sizes: Sizes, dtype: torch.dtype, folder: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load by DCP: return the state as arrays, and the weights after the rest of the way."""
    made, optimizer = fresh(name, layout, sizes, dtype)
    found = {"model": get_model_state_dict(made), "optim": get_optimizer_state_dict(made, optimizer)}
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(made, found["model"])
    set_optimizer_state_dict(made, optimizer, found["optim"])
    state = all_state(optimizer)
    train(made, optimizer, range(MIDDLE, END), "dense")
    return state, {key: whole(p.detach()).numpy().copy() for key, p in made.named_parameters()}


def full(name: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    """Load a gathered state dict into a sharded and into a plain optimizer: names of the state that differs."""
    options = StateDictOptions(full_state_dict=True)
    made, optimizer = fresh(name, "fsdp", sizes, dtype)
    train(made, optimizer, range(MIDDLE), "fsdp")
    expected = all_state(optimizer)
    found = get_optimizer_state_dict(made, optimizer, options=options)
    assert not any(isinstance(v, DTensor) for held in found["state"].values() for v in held.values())
    differs = []
    for layout in ("fsdp", "dense"):
        twin, other = fresh(name, layout, sizes, dtype)
        set_optimizer_state_dict(twin, other, copy.deepcopy(found), options=options)
        assert placements(other) == placements(METHODS[name](twin), twin)
        state = all_state(other)
        differs += [f"{layout}.{key}" for key in expected | state if not same(expected.get(key), state.get(key))]
    return differs


def placements(optimizer: torch.optim.Optimizer, stepped: nn.Module | None = None) -> dict[str, Any]:
    """Where every state lies, of a fresh optimizer after a step without gradients."""
    if stepped is not None:
        for param in stepped.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
    return {
        f"{position}.{name}": (type(value).__name__, tuple(getattr(value, "placements", ())))
        for position, held in optimizer.state_dict()["state"].items()
        for name, value in held.items()
    }


def plain_file(name: str, sizes: Sizes, dtype: torch.dtype, path: str) -> tuple[list[str], dict[str, Any]]:
    """Load a file of plain tensors by `load_state_dict`: state that is not placed as ever, and weights at the end."""
    made, optimizer = fresh(name, "fsdp", sizes, dtype)
    twin, other = fresh(name, "fsdp", sizes, dtype)
    saved = torch.load(path, weights_only=True)
    set_model_state_dict(made, saved["model"], options=StateDictOptions(full_state_dict=True))
    optimizer.load_state_dict(saved["optim"])
    one, expected = placements(optimizer), placements(other, twin)
    differs = [f"{key} {one[key]} {expected[key]}" for key in expected if one[key] != expected[key]]
    train(made, optimizer, range(MIDDLE, END), "fsdp")
    return differs, {key: whole(p.detach()).numpy().copy() for key, p in made.named_parameters()}


def sharded_into_plain(name: str) -> str:
    """What an optimizer of plain parameters says to sharded state."""
    made, optimizer = fresh(name, "fsdp", None, torch.float64)
    train(made, optimizer, range(1), "fsdp")
    _, other = fresh(name, "dense", None, torch.float64)
    try:
        other.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        return str(error)
    return "loaded"
