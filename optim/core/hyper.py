"""Hyper-parameters of a group: names and aliases, validation, and the frozen record that travels through a step."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...kernels import BACKENDS
from .adaptive import AUTO
from .basis import DENSE, Basis
from .codec import STATE_DTYPES
from .cross_head import Heads, Segments, check_heads, frozen
from .descend import BASIS_RULES
from .projector import PROJECTORS, Projector
from .rules import RULES
from .view import SIDES, rank_of

ALIASES = {
    "alpha": "scale",
    "update_gap": "update_proj_gap",
    "projection_type": "proj_type",
    "proj_side": "proj_type",
    "kappa": "update_proj_gap",
}
"""Names of the neighbours for our options, accepted in parameter groups."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "proj_type": SIDES,
    "projector": tuple(PROJECTORS),
    "carry": (None, "keep", "rotate", "reset"),
    "rule": tuple(RULES),
    "state_dtype": (None, *STATE_DTYPES),
    "gemm_dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "rounding": ("nearest",),
    "backend": BACKENDS,
    "compat": (None, "official"),
    "proj_rule": tuple(BASIS_RULES),
    "proj_init": ("sketch", "svd", "random"),
}

UNSUPPORTED = ("amsgrad", "capturable", "differentiable")
"""Switches of torch.optim.AdamW that may be present in a group but not on."""


@dataclass(frozen=True, slots=True)
class Hyper:
    """Live hyper-parameters of one group in one step; fields are documented by the optimizers' constructors."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float | tuple[float, float]
    weight_decay: float
    rule: str
    rank: int | str | None
    scale: float
    proj_type: str
    carry: str
    projector: str
    update_proj_gap: int
    stagger: bool
    seed: int
    state_dtype: str
    gemm_dtype: str
    rounding: str
    backend: str
    maximize: bool
    foreach: bool | None
    fused: bool | None
    compat: str | None
    density: float | None = None
    correct_bias: bool = True
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False
    clip_threshold: float = 1.0
    beta2_decay: float = -0.8
    lazy: float | None = None
    proj_rule: str = "adam"
    proj_init: str = "sketch"
    proj_ratio: float = 5.0
    proj_betas: tuple[float, float] | None = None
    proj_weight_decay: float = 0.0
    ortho: float = 0.1
    weight_norm: bool = False
    num_heads: Heads | None = None
    head_select: str = "random"

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyper:
        """Read the record from a parameter group, with the defaults that depend on `compat`."""
        values = {name: scalar(group[name]) for name in _FIELDS if name in group}
        official = values["compat"] == "official"
        values["carry"] = values["carry"] or ("keep" if official else "rotate")
        values["state_dtype"] = values["state_dtype"] or ("parameter" if official else "float32")
        values["betas"] = tuple(values["betas"])
        values["num_heads"] = frozen(values.get("num_heads"))
        values["eps"] = tuple(values["eps"]) if isinstance(values["eps"], list) else values["eps"]
        return cls(**values)

    @property
    def official(self) -> bool:
        """Follow the authors' code where it differs from the paper."""
        return self.compat == "official"

    @property
    def chooses(self) -> Projector:
        """How the subspace is chosen and kept."""
        return PROJECTORS[self.projector]

    @property
    def basis(self) -> Basis:
        """How the basis is kept: the projector's way, for a fused weight one for every range of rows."""
        return Segments.of(self.num_heads) if isinstance(self.num_heads, tuple) else self.chooses.basis

    @property
    def side(self) -> str:
        """The projected side: the projector's own, or what the group says."""
        return self.chooses.side or self.proj_type

    @property
    def counts_coordinates(self) -> bool:
        """Coordinates that stay keep their own age at a refresh, which Adam's bias correction needs."""
        return self.rule == "adamw" and self.carry == "rotate" and self.basis.counted

    def rank_for(self, shape: tuple[int, int]) -> int | None:
        """Rank of a matrix of this shape, or None where the group is plain."""
        return rank_of(shape, self.rank if isinstance(self.rank, int) else None, self.density)


def scalar(value: Any) -> Any:
    """View a 1-element tensor as 0-d, so that it multiplies a tensor of any shape; leave other values."""
    return value.reshape(()) if isinstance(value, Tensor) else value


_FIELDS = tuple(field.name for field in fields(Hyper))


def normalise(group: dict[str, Any], known: frozenset[str]) -> None:
    """Spell a parameter group canonically, in place.

    Aliases become our names, a kind of basis given as `proj_type` becomes the `projector` (FRUGAL's spelling), dtypes
    become their names.

    Args:
        group: A parameter group.
        known: The option names of the optimizer.

    Raises:
        ValueError: An option is given twice, or a key nearly matches a known one.
    """
    for alias, name in ALIASES.items():
        if alias in group and name in known:
            if name in group:
                raise ValueError(f"a parameter group names both {alias!r} and {name!r}, its alias: keep one of them")
            group[name] = group.pop(alias)
    if group.get("proj_type") in PROJECTORS and group["proj_type"] not in SIDES:
        group["projector"] = group.pop("proj_type")
    for name in ("state_dtype", "gemm_dtype", "momentum_dtype"):
        if isinstance(group.get(name), torch.dtype):
            group[name] = str(group[name]).removeprefix("torch.")
    for key in group:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        swapped = [name for name in known if sorted(name) == sorted(key)]
        if (near or swapped) and key not in known:
            raise ValueError(f"unknown option {key!r} in a parameter group: did you mean {(near or swapped)[0]!r}?")


def check_adam(group: Mapping[str, Any]) -> None:
    """Validate what every optimizer shares with torch.optim.AdamW, with torch's own messages."""
    lr, eps = group["lr"], group["eps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= float(lr) < float("inf"):
        raise ValueError(f"Invalid learning rate: {lr}")
    if isinstance(lr, Tensor) and group.get("foreach"):
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    if group.get("foreach") and group.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for value in eps if isinstance(eps, (tuple, list)) else (eps,):
        if value is not None and not 0.0 <= value < float("inf"):
            raise ValueError(f"Invalid epsilon value: {value}")
    for index, beta in enumerate(group.get("betas", ())):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= group["weight_decay"] < float("inf"):
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"{name}=True is not supported by this optimizer; drop it or pass {name}=False")


def check_subspace(group: Mapping[str, Any]) -> None:
    """Validate the options of a subspace method.

    Raises:
        ValueError: A value is out of range or not one of the choices.
    """
    check_adam(group)
    check_choices(group, CHOICES)
    check_rank(group)
    if not 0.0 < group["scale"] < float("inf"):
        raise ValueError(f"Invalid scale: {group['scale']}; need a positive number")
    _check_projector(group)
    if group.get("dim", 2) != 2:
        raise ValueError(f"Invalid dim: {group['dim']}; drop the key, more dimensions are viewed as a matrix")


def check_rank(group: Mapping[str, Any]) -> None:
    """Validate the size of a subspace and the time that it lasts."""
    _check_open_rank(group)
    _check_positive_int("update_proj_gap", group["update_proj_gap"])
    density = group.get("density")
    if density is not None and not 0.0 < density <= 1.0:
        raise ValueError(f"Invalid density: {density}; need 0 < density <= 1, the rank as a share of the smaller side")
    if density is not None and group.get("rank") is not None:
        raise ValueError(f"rank={group['rank']} and density={density} contradict each other: keep one of them")


def _check_open_rank(group: Mapping[str, Any]) -> None:
    rank, energy, budget = group.get("rank"), group.get("energy"), group.get("budget")
    if rank != AUTO:
        _check_positive_int("rank", rank, optional=True)
        if rank is not None and (energy is not None or budget is not None):
            raise ValueError(f"energy={energy}, budget={budget} contradict rank={rank}: drop them, or pass rank='auto'")
        return
    if energy is None and budget is None:
        raise ValueError("rank='auto' needs a target: pass energy=0.9, or budget=BYTES of state, or both")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"Invalid energy: {energy}; need a share of the gradient's energy, 0 < energy <= 1")
    _check_positive_int("budget", budget, optional=True)


def _check_projector(group: Mapping[str, Any]) -> None:
    projector, side, lazy = PROJECTORS[group["projector"]], group["proj_type"], group.get("lazy")
    if projector.side is not None and side not in ("std", projector.side):
        raise ValueError(f"projector={group['projector']!r} chooses its own side: drop proj_type={side!r}")
    if side == "full" and (projector.basis is not DENSE):
        raise ValueError(
            f"proj_type='full' needs two dense bases, projector={group['projector']!r} has none: choose "
            "proj_type='std', or projector='sketch', 'svd', 'track' or 'random'"
        )
    check_heads(group)
    if lazy is not None and not 0.0 <= lazy <= 1.0:
        raise ValueError(f"Invalid lazy: {lazy}; need an overlap between 0 and 1, or None")
    if lazy is not None and group["projector"] == "descend":
        raise ValueError(f"lazy={lazy}: projector='descend' is never refreshed, drop the option")
    for name in ("proj_ratio", "proj_weight_decay", "ortho"):
        if name in group and not 0.0 <= group[name] < float("inf"):
            raise ValueError(f"Invalid {name}: {group[name]}; need a number of at least 0")


def check_choices(group: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Check every option that is one of a few values."""
    for name, choices in allowed.items():
        if name in group and group[name] not in choices:
            names = ", ".join(repr(choice) for choice in choices if choice is not None)
            raise ValueError(f"Invalid {name}: {group[name]!r}; choose one of {names}")


def _check_positive_int(name: str, value: Any, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Invalid {name}: {value!r}; need an integer of at least 1")
