"""`matched`: a table of which parameter went into which group, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .core.view import matrix_shape
from .targets import is_quantised


@dataclass(frozen=True, slots=True)
class Match:
    """Parameters of one name, layer numbers apart, that are treated alike.

    Args:
        pattern: Their name, with * for the numbers of layers.
        shape: Their shape.
        treatment: As "rank 128", "rank 128, stacked", "density 0.25", "plain", "plain, no decay", "plain, rank 128 is
            too large" for a matrix whose smaller side is no larger; or why they are in no group: "frozen",
            "quantised", "in no group".
        names: Their full names.
    """

    pattern: str
    shape: tuple[int, ...]
    treatment: str
    names: list[str] = field(default_factory=list)


class Matched(tuple[Match, ...]):
    """Rows of `Match`, projected ones first; prints as a table."""

    def names(self, treatment: str) -> list[str]:
        """Full names of the parameters whose treatment starts so."""
        return [name for row in self if row.treatment.startswith(treatment) for name in row.names]

    def __str__(self) -> str:
        width = max((len(row.treatment) for row in self), default=0)
        return "\n".join(
            f"{row.treatment:<{width}}  {len(row.names):>4} x {'x'.join(map(str, row.shape)) or '1':<14} {row.pattern}"
            for row in self
        )


def matched(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> Matched:
    """Tell by name what is projected, what is plain and what is left out.

        groups = param_groups(model, rank=128, targets=["attn", "mlp"])
        print(matched(model, groups))

    Args:
        model: The model.
        groups: What `param_groups` or `head_groups` returned, groups written by hand, or an optimizer's `param_groups`,
            which alone tell what its own arguments decide, as `rank` or `compat="official"`.

    Returns:
        A row for every name, layer numbers apart.

    Raises:
        ValueError: A group holds a parameter that the model does not have.
    """
    known = {id(param) for param in model.parameters()}
    treatments: dict[int, str] = {}
    for index, group in enumerate(groups):
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            if id(param) not in known:
                raise ValueError(f"group {index} holds a {tuple(param.shape)} parameter that the model does not have")
            treatments[id(param)] = _treatment(param, group)
    quantised = {f"{name}.weight" for name, module in model.named_modules() if is_quantised(module)}
    rows: dict[Any, Match] = {}
    for name, param in model.named_parameters():
        treatment = treatments.get(id(param)) or _left_out(param, name in quantised)
        row = Match(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(param.shape), treatment)
        rows.setdefault((row.pattern, row.shape, treatment), row).names.append(name)
    return Matched(sorted(rows.values(), key=_place))


def _place(row: Match) -> int:
    order = ("rank", "density", "plain")
    return next((place for place, word in enumerate(order) if row.treatment.startswith(word)), len(order))


def _treatment(param: Tensor, group: Mapping[str, Any]) -> str:
    shape = param.shape[1:] if group.get("stacked") else param.shape
    sizes = ((name, group.get(name)) for name in ("density", "rank"))
    size = next((f"{name} {value}" for name, value in sizes if value is not None), "plain")
    if group.get("projector") != "blocks":  # whose rank is a number of layers
        if len(shape) < 2:
            size = "plain"
        elif _too_large(group, shape):
            size = f"plain, {size} is too large"
    size += ", stacked" if group.get("stacked") else ""
    return size + (", no decay" if group.get("weight_decay") == 0.0 else "")


def _too_large(group: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """The rank of a group leaves nothing to project of a matrix, unless its basis may be square, as the authors' is."""
    rank = group.get("rank") if group.get("density") is None else None
    return isinstance(rank, int) and group.get("compat") != "official" and rank >= min(matrix_shape(shape))


def _left_out(param: Tensor, quantised: bool) -> str:
    if quantised:
        return "quantised"
    return "in no group" if param.requires_grad else "frozen"
