"""The support S of a sparse residual: k entries of a weight, described before they are known.

Indices and moments of S have k elements on any number of ranks. Each rank keeps an even share of them, wherever the
entries lie; the average that finds them lies as the weight does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import codec, counts
from .basis import DENSE
from .hyper import Hyper
from .projector import PROJECTORS
from .spec import Spec, counter
from .view import MatrixView

AVERAGE, INDEX = "residual_avg", "residual_index"
"""dM while the support is not chosen, S from then on: the names in a state tell its phase."""
WARMUP, STEP = "residual_warmup_step", "residual_step"
"""Steps of the warm-up, and steps that S has seen, which correct the bias of its moments."""
PREFIX, MOMENTS = "residual_", ("exp_avg", "exp_avg_sq")
"""Moments at S: the names of Adam's with this prefix."""


@dataclass(frozen=True, slots=True)
class Support:
    """How a sparse residual is kept.

    Args:
        mode: "exact", "additive", or None for no residual.
        count: k, entries of S.
        warmup: Steps before S is chosen; 0 where every entry is kept.
        size: Entries of the weight.
    """

    mode: str | None
    count: int
    warmup: int
    size: int

    @classmethod
    def of(cls, group: Mapping[str, Any], view: MatrixView) -> Support:
        """Read it for a whole weight from the options of a group; the warm-up ends with the first interval."""
        size = view.m * view.n
        count = round(group["residual_density"] * size)
        warmup = 0 if count == size else min(group["residual_warmup"], group["update_proj_gap"])
        return cls(group["residual"] if count else None, count, warmup, size)

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper, *, chosen: bool) -> dict[str, Spec]:
        """Describe the state: `m n` elements before S is chosen, then `chosen`."""
        counters = {WARMUP: counter(), STEP: counts.spec(param, hyper)}
        if self.warmup and not chosen:
            work = codec.work_dtype(param.dtype)
            return counters | {AVERAGE: Spec((view.m, view.n), work, param.device, axis="param")}
        return counters | self.chosen(param, hyper)

    def chosen(self, param: Tensor, hyper: Hyper) -> dict[str, Spec]:
        """Describe S and its moments: k indices of 4 bytes, two moments of k elements."""
        integer = torch.int32 if self.size < 1 << 31 else torch.int64
        described = {INDEX: Spec((self.count,), integer, param.device, axis="entries")}
        for name in MOMENTS:
            described |= codec.specs(PREFIX + name, (self.count,), param, hyper.state_dtype, "entries")
        return described


def specs_to_load(described: dict[str, Spec], support: Support, param: Tensor, hyper: Hyper) -> dict[str, Spec]:
    """Describe state to load a checkpoint into: with S chosen, as in all but those written during the warm-up."""
    if AVERAGE not in described:
        return described
    return {name: spec for name, spec in described.items() if name != AVERAGE} | support.chosen(param, hyper)


def check(group: Mapping[str, Any]) -> None:
    """Validate the options of a residual.

    Raises:
        ValueError: They are out of range, or the group's rule or projector cannot have one.
    """
    density, warmup = group["residual_density"], group["residual_warmup"]
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"Invalid residual_density: {density}; need a share between 0 and 1")
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
        raise ValueError(f"Invalid residual_warmup: {warmup!r}; need an integer of at least 1")
    if group["residual"] is None or density == 0:
        return
    if group["rule"] != "adamw":
        raise ValueError(
            f"rule={group['rule']!r}: the residual keeps Adam's two moments; pass rule='adamw', or residual=None"
        )
    projector = PROJECTORS[group["projector"]]
    if group["residual"] == "additive" and (projector.basis is not DENSE or projector.follows):
        raise ValueError(
            f"projector={group['projector']!r}: the additive residual needs a dense basis that stays between "
            "refreshes; pass projector='sketch', or residual='exact'"
        )
