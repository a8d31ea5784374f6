"""Hyper-parameters of a group: names and aliases, validation, and the frozen record that travels through a step."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...kernels.blockwise import FORMATS
from .basis import Basis
from .cross_head import Heads, frozen
from .projector import PROJECTORS, Projector
from .segments import Segments
from .view import SIDES, rank_of

ALIASES = {
    "alpha": "scale",
    "update_gap": "update_proj_gap",
    "projection_type": "proj_type",
    "proj_side": "proj_type",
    "kappa": "update_proj_gap",
    "momentum_dtype": "state_dtype",
}
"""Names of the neighbours for our options, accepted in parameter groups."""

NUMERICS = ("state_dtype", "gemm_dtype", "basis_dtype", "rounding", "backend")
"""Options that users put into groups of any optimizer; one that does not have them says so instead of ignoring them."""


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
    basis_dtype: str | None
    backend: str
    maximize: bool
    foreach: bool | None
    fused: bool | None
    compat: str | None
    capturable: bool = False
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
    def raw_eps(self) -> bool:
        """Add eps before bias correction, as the authors' AdamW does; their 8-bit one adds it after."""
        return self.official and self.state_dtype not in FORMATS

    @property
    def strategy(self) -> Projector:
        """How the subspace is found and kept: what the name `projector` stands for."""
        return PROJECTORS[self.projector]

    @property
    def basis(self) -> Basis:
        """How the basis is kept: the projector's way, for a fused weight one for every range of rows."""
        return Segments.read(self.num_heads) if isinstance(self.num_heads, tuple) else self.strategy.basis

    @property
    def side(self) -> str:
        """The projected side: the projector's own, or what the group says."""
        return self.strategy.side or self.proj_type

    @property
    def counts_coordinates(self) -> bool:
        """Whether every coordinate has a step count of its own: one that stays at a refresh keeps moments and age."""
        plain = self.rule == "adamw" and not self.official
        return plain and self.carry == "rotate" and self.basis.counted

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
        ValueError: An option is given twice, is one of `NUMERICS` that the optimizer does not have, or nearly matches a
            known one.
    """
    for alias, name in ALIASES.items():
        if alias in group and name in known:
            if name in group:
                raise ValueError(f"a parameter group names both {alias!r} and {name!r}, its alias: keep one of them")
            group[name] = group.pop(alias)
    if group.get("proj_type") in PROJECTORS and group["proj_type"] not in SIDES:
        group["projector"] = group.pop("proj_type")
    for name in ("state_dtype", "gemm_dtype", "basis_dtype"):
        if isinstance(group.get(name), torch.dtype):
            group[name] = str(group[name]).removeprefix("torch.")
    for key in group:
        if key in NUMERICS and key not in known:
            raise ValueError(
                f"{key}={group[key]!r} is not an option of this optimizer: drop it; it has "
                f"{', '.join(name for name in NUMERICS if name in known)}"
            )
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        swapped = [name for name in known if sorted(name) == sorted(key)]
        if (near or swapped) and key not in known:
            raise ValueError(f"unknown option {key!r} in a parameter group: did you mean {(near or swapped)[0]!r}?")
