"""Which share of a weight is state-full in FRUGAL: sizes, views, and checks of the options that decide it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import blocks
from .free import FREE_RULES, FREE_SPACES
from .hyper import Hyper
from .kinds import check_kinds
from .validate import check_choices
from .view import MatrixView, matrix_shape

CHOICES: dict[str, tuple[Any, ...]] = {
    "free_rule": FREE_RULES,
    "free_space": FREE_SPACES,
    "block_order": (None, *blocks.ORDERS),
    "block_by": (None, *blocks.BLOCKS),
    "carry": ("reset", "keep", "rotate"),
    "rule": ("adamw", "lion", "rmsprop", "sgd"),
}

THEIRS = {
    "inactive_lr_scale": "free_scale",
    "inactive_update_rule": "free_rule",
    "proj_params_lr_scale": "scale",
    "reset_statistics": "carry",
    "coord_choice": "projector",
    "is_proj_params": "density",
}
"""Options of the authors' groups, and the option of ours that says the same by other values."""

Group = Mapping[str, Any]


def size_of(hyper: Hyper, m: int, n: int) -> tuple[int, int]:
    """How many coordinates of a matrix (m x n) are state-full, and out of how many.

    columns     floor(rho n), or rank                 out of n
    rows        floor(rho m), or rank                 out of m
    randk       floor(rho m n), or rank max(m, n)     out of m n
    others      round(rho min(m, n)), or rank         out of min(m, n): directions of a basis
    """
    side = hyper.strategy.side if hyper.basis.picks else None
    whole: int = {"right": n, "left": m, "flat": m * n, None: min(m, n)}[side]
    if hyper.density is not None:
        size = round(hyper.density * whole) if side is None else int(hyper.density * whole)
    else:
        rank = hyper.rank if isinstance(hyper.rank, int) else 0
        size = rank * max(m, n) if side == "flat" else rank
    return min(size, whole), whole


def view(param: Tensor, group: Group) -> MatrixView | None:
    """Orient a parameter: None is plain, a view of rank 0 state-free as a whole, of rank b state-full as a whole."""
    if not blocks.is_matrix(param) or group["rank"] is group["density"] is None:
        return None
    m, n = matrix_shape(param.shape)
    if blocks.turns(group):
        size, whole = int(blocks.is_active(param, group)), 1
    else:
        size, whole = size_of(Hyper.of(group), m, n)
    if size in (0, whole):
        return MatrixView(m, n, n if size else 0, False, False)
    return replace(MatrixView.of(param.shape, 1, Hyper.of(group).side), rank=size)


def check(group: Group) -> None:
    """Validate the options that are FRUGAL's own.

    Raises:
        ValueError: One is out of range, or contradicts another.
    """
    for name in (name for name in THEIRS if name in group):
        raise ValueError(f"got {name}={group[name]!r}, an option of the authors' code: say it by {THEIRS[name]}")
    check_choices(group, CHOICES)
    check_density(group["density"], group["rank"])
    check_kinds(group)
    if not 0.0 <= group["free_scale"] < float("inf"):
        raise ValueError(f"Invalid free_scale: {group['free_scale']}; need a number of at least 0")
    if isinstance(group["rank"], str) or group.get("energy") is not None or group.get("budget") is not None:
        asked = ", ".join(f"{name}={group.get(name)!r}" for name in ("rank", "energy", "budget"))
        raise ValueError(f"{asked}: FRUGAL does not search for a size, pass density=0.25 or rank=128")
    if group["compat"] is not None:
        raise ValueError(f"compat={group['compat']!r}: the authors' code takes AdamW's order as we do, drop the option")
    if group["projector"] == "cross_head" or group.get("num_heads") is not None:
        raise ValueError(
            "heads have subspaces of their own (projector='cross_head', num_heads), FRUGAL has one in a whole matrix: "
            "drop num_heads and pass projector='columns'"
        )
    whole = group["projector"] == "blocks"
    foreign = (
        {"proj_type": "std", "lazy": None, "stagger": False, "weight_norm": False}
        if whole
        else {"block_order": None, "block_by": None}
    )
    for name, default in foreign.items():
        if group[name] != default:
            raise ValueError(
                f"{name}={group[name]!r} has no meaning with projector={group['projector']!r}: drop the option"
                + ("" if whole else ", or pass projector='blocks'")
            )
    if group["free_rule"] == "freeze" and not whole:
        raise ValueError("free_rule='freeze' is for whole tensors: pass projector='blocks', or free_rule='none'")


def check_density(density: float | None, rank: int | None) -> None:
    """Validate a density, which may be 0 or 1, and that no rank comes with it."""
    check_kinds({"density": density})
    if density is not None and not 0.0 <= density <= 1.0:
        raise ValueError(f"Invalid density: {density}; need 0 <= density <= 1, the share of state-full entries")
    if density is not None and rank is not None:
        raise ValueError(f"rank={rank} and density={density} contradict each other: keep one of them")


def for_core(group: Group) -> dict[str, Any]:
    """Replace values that only FRUGAL has, density 0 and blocks, so that the core can check all other options."""
    own = group["projector"] == "blocks"
    return {"density": group["density"] or None, "projector": "columns" if own else group["projector"]}
