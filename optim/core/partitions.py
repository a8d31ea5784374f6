"""Checks for DeepSpeed's ZeRO, which flattens parameters and cuts them into pieces: what can be stepped there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .codec import form_of
from .flattening import STAGE, is_partitioned
from .optimizer import SubspaceOptimizer
from .rules import RULES

ALIGNMENT = 2
"""DeepSpeed pads a flat group to a multiple of so many elements a rank."""

INSTEAD = (
    "leave it plain, param_groups(model, exclude=[...]), or shard with torch.distributed.fsdp.fully_shard(model), "
    "which takes any shape"
)


def check_class(whole: SubspaceOptimizer) -> None:
    """Refuse an optimizer that cannot step flat groups one by one.

    Raises:
        ValueError: It needs the shapes of plain parameters, or all gradients at once.
    """
    name = type(whole).__name__
    if not isinstance(whole, SubspaceOptimizer):
        raise ValueError(f"got {name}, whose plain parameters have statistics of rows and columns: pass GaLore or Fira")
    if reason := whole.needs_all_gradients():
        raise ValueError(f"DeepSpeed steps groups one by one, which {name} cannot: {reason}")
    for group in whole.param_groups:
        if not RULES[group["rule"]].elementwise:
            raise ValueError(f"rule={group['rule']!r} needs the shape of plain parameters: pass rule='adamw'")
        for param in group["params"]:
            _check_coded(param, group, plain=whole._sees(param, group) is None)


def _check_coded(param: Tensor, group: dict[str, Any], *, plain: bool) -> None:
    """Refuse 8-bit moments of a plain matrix: as a vector it would get fp32 moments without being told."""
    if plain and form_of("exp_avg", param.shape, group["state_dtype"]) is not None:
        raise ValueError(
            f"state_dtype={group['state_dtype']!r} codes rows, which a plain {tuple(param.shape)} parameter loses as "
            "ZeRO flattens it: pass state_dtype='bfloat16' in its group"
        )


def check_rows(param: Tensor, world: int) -> None:
    """Refuse a projected matrix whose pieces are not whole rows.

    Raises:
        ValueError: The ranks do not divide its rows.
    """
    if param.shape[0] % world or param.numel() % (ALIGNMENT * world):
        raise ValueError(
            f"got a projected {tuple(param.shape)} parameter, of which ZeRO gives each of {world} ranks a piece that "
            f"has no whole rows ({world} must divide the first dimension, {ALIGNMENT * world} the number of elements): "
            f"{INSTEAD}"
        )


def check_stage(params: Iterable[Tensor]) -> None:
    """Refuse parameters of stage 3.

    Raises:
        RuntimeError: DeepSpeed has partitioned them.
    """
    if any(map(is_partitioned, params)):
        raise RuntimeError(f"got parameters that ZeRO stage 3 of DeepSpeed has cut into pieces without rows: {STAGE}")


def partition(params: list[Tensor], shape: tuple[int, ...] | None, world: int) -> Tensor:
    """Return this rank's piece of a group, the one flat parameter that stages 1 and 2 leave in it.

    Raises:
        RuntimeError: The group holds something else.
    """
    if len(params) != 1 or params[0].ndim != 1 or (shape is not None and params[0].numel() * world != math.prod(shape)):
        found = [tuple(param.shape) for param in params[:4]]
        raise RuntimeError(
            f"a group holds parameters of shapes {found}, need one flat partition: ZeroOptimizer is for "
            "deepspeed.initialize(model=model, optimizer=optimizer, config=...) with ZeRO stage 1 or 2; without "
            "DeepSpeed, or for stage 3, take the class itself and torch.distributed.fsdp.fully_shard(model)"
        )
    return params[0]
