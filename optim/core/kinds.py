"""What kind of value an option takes, before its range is looked at: configuration files have text for numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_kinds(group: Mapping[str, Any]) -> None:
    """Refuse values of another kind than an option takes.

    Raises:
        ValueError: Text or nothing for a number, a number for a flag, one number for a pair, and so on.
    """
    for name, (fits, needed) in KINDS.items():
        value = group.get(name)
        if name not in group or fits(value) or (value is None and name in OPEN):
            continue
        hint = ": YAML takes 1e-3 for text, write 1.0e-3 there" if isinstance(value, str) and fits is _number else ""
        raise ValueError(f"Invalid {name}: {value!r}; need {needed}{', or None' if name in OPEN else ''}{hint}")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _integer(value: Any) -> bool:
    return isinstance(value, Integral)


def _number(value: Any) -> bool:
    return isinstance(value, Real | Tensor)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_number, value))


def _eps(value: Any) -> bool:
    whole = isinstance(value, tuple | list) and len(value) == 2 and value[0] is None  # torch's Adafactor has it so
    return _number(value) or _pair(value) or (whole and _number(value[1]))


Kind = tuple[Callable[[Any], bool], str]

_FLAGS = ("maximize", "stagger", "weight_norm", "capturable", "scale_parameter", "relative_step", "warmup_init")
_RATES = ("lr", "weight_decay", "scale", "residual_scale", "free_scale", "proj_ratio", "proj_weight_decay")
_NUMBERS = (*_RATES, "beta2_decay", "ortho", "residual_density")
_OPEN_FLAGS = ("foreach", "fused", "shard_basis")
_OPEN_NUMBERS = ("gamma", "lazy", "energy", "density", "beta1", "clip_threshold")

OPEN = (*_OPEN_FLAGS, *_OPEN_NUMBERS, "proj_betas")
"""Options that may be None."""

KINDS: dict[str, Kind] = {
    **dict.fromkeys((*_FLAGS, *_OPEN_FLAGS), (_flag, "True or False")),
    **dict.fromkeys((*_NUMBERS, *_OPEN_NUMBERS), (_number, "a number")),
    **dict.fromkeys(("betas", "proj_betas"), (_pair, "a pair of numbers, as (0.9, 0.999)")),
    "eps": (_eps, "a number, as 1e-8, or Adafactor's pair"),
    "seed": (_integer, "an integer"),
}
"""Whether a value is of the kind of an option, and that kind in words."""
