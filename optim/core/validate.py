"""Validation of the options of a parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...kernels import BACKENDS, bnb
from ...kernels.dispatch import ADDITIONS
from ...kernels.rounding import ROUNDINGS
from .adaptive import AUTO
from .basis import DENSE
from .codec import STATE_DTYPES
from .compact import BASIS_DTYPES
from .cross_head import check_heads
from .descend import BASIS_RULES
from .kinds import check_kinds
from .projector import GAUSSIAN, PROJECTORS
from .rules import RULES
from .view import SIDES

CHOICES: dict[str, tuple[Any, ...]] = {
    "proj_type": SIDES,
    "projector": tuple(PROJECTORS),
    "carry": (None, "keep", "rotate", "reset"),
    "rule": tuple(RULES),
    "state_dtype": (None, *STATE_DTYPES),
    "gemm_dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "rounding": ROUNDINGS,
    "basis_dtype": BASIS_DTYPES,
    "backend": BACKENDS,
    "compat": (None, "official"),
    "proj_rule": tuple(BASIS_RULES),
    "proj_init": ("sketch", "svd", "random"),
}

UNSUPPORTED = ("amsgrad", "capturable", "differentiable")
"""Switches of torch.optim.AdamW that may be present in a group but not on."""


def check_adam(group: Mapping[str, Any], *, capturable: bool = False) -> None:
    """Validate what every optimizer shares with torch.optim.AdamW, with torch's own messages.

    Args:
        group: A complete group.
        capturable: Whether the optimizer has that option.
    """
    check_kinds(group)
    lr, eps = group["lr"], group["eps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= float(lr) < float("inf"):
        raise ValueError(f"Invalid learning rate: {lr}")
    if isinstance(lr, Tensor) and group.get("foreach") and not group.get("capturable"):
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
        if group.get(name) and not (capturable and name == "capturable"):
            raise ValueError(f"{name}=True is not supported by this optimizer; drop it or pass {name}=False")


def check_factored(group: Mapping[str, Any]) -> None:
    """Validate Adafactor's clipping and decay, where a group has them."""
    decay, d = group.get("beta2_decay", -0.8), group.get("clip_threshold")
    if not decay <= 0.0:
        raise ValueError(f"Invalid beta2_decay: {decay}; need an exponent of at most 0, as -0.8")
    if d is not None and not d > 0.0:
        raise ValueError(f"Invalid clip_threshold: {d}; need a positive number, or None to not clip")


def check_subspace(group: Mapping[str, Any]) -> None:
    """Validate the options of a subspace method.

    Raises:
        ValueError: A value is out of range or not one of the choices.
    """
    check_adam(group, capturable=True)
    check_factored(group)
    check_choices(group, CHOICES)
    _check_eps(group)
    if group.get("capturable"):
        _check_capturable(group)
    _check_backend(group)
    check_rank(group)
    if not 0.0 < group["scale"] < float("inf"):
        raise ValueError(f"Invalid scale: {group['scale']}; need a positive number")
    _check_projector(group)
    if group.get("dim", 2) != 2:
        raise ValueError(f"Invalid dim: {group['dim']}; drop the key, more dimensions are viewed as a matrix")


def _check_eps(group: Mapping[str, Any]) -> None:
    """Adafactor has a pair of them, both numbers."""
    eps = group["eps"]
    if not isinstance(eps, (tuple, list)):
        return
    if group["rule"] != "adafactor":
        raise ValueError(
            f"eps={eps} is a pair, of rule='adafactor' alone; rule={group['rule']!r} adds one number to a root: pass "
            "eps=1e-8"
        )
    if eps[0] is None:
        raise ValueError(f"Invalid eps: {eps}; need two numbers, as (1e-30, 1e-3)")


def _check_capturable(group: Mapping[str, Any]) -> None:
    """Refuse what takes a number from the host that is another in every step, which a graph would freeze."""
    heads = isinstance(group.get("num_heads"), (list, tuple)) and group.get("residual") == "additive"
    follows = group["projector"] == "descend"
    refused = {
        "compat": (group["compat"], "the authors' order of operations reads step counts: pass compat=None"),
        "rule": (group["rule"] == "adafactor", "its rates are numbers of the host: pass rule='adamw' or 'rmsprop'"),
        "proj_rule": (follows and group.get("proj_rule") == "adafactor", "as rule='adafactor': pass proj_rule='adam'"),
        "backend": (group["backend"] in ADDITIONS, "it takes numbers of the host: pass backend='auto'"),
        "weight_norm": (group.get("weight_norm"), "its rates of rows read a step count: pass weight_norm=False"),
        "projector": (
            group["projector"] == "dct",
            "its matrix lives in a cache, not in state: pass projector='columns' or 'sketch'",
        ),
        "num_heads": (heads, "ranges of heads put numbers on the device in a step: pass residual='exact'"),
    }
    for name, (wrong, reason) in refused.items():
        if wrong:
            raise ValueError(f"capturable=True does not go with {name}={group[name]!r}: {reason}, or capturable=False")


def _check_backend(group: Mapping[str, Any]) -> None:
    """A backend that computes 8-bit moments of one kind needs that kind."""
    needed = {"compile": "8bit", "bitsandbytes": "bnb8"}.get(group["backend"])
    if needed and group["state_dtype"] != needed:
        raise ValueError(
            f"backend={group['backend']!r} computes moments of state_dtype={needed!r}, got {group['state_dtype']!r}: "
            f"pass state_dtype={needed!r}, or backend='auto'"
        )
    if needed and group["rule"] != "adamw":
        raise ValueError(
            f"backend={group['backend']!r} computes rule='adamw', got {group['rule']!r}: pass backend='auto'"
        )
    if group["backend"] == "bitsandbytes" and not bnb.available():
        raise ValueError("backend='bitsandbytes' needs that library: pip install 'bitsandbytes>=0.44'")


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
        return
    if group["proj_type"] == "full":
        raise ValueError("rank='auto' with proj_type='full': state grows with the square of the rank, choose a number")
    if energy is None and budget is None:
        raise ValueError("rank='auto' needs a target: pass energy=0.9, or budget=BYTES of state, or both")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"Invalid energy: {energy}; need a share of the gradient's energy, 0 < energy <= 1")
    _check_positive_int("budget", budget, optional=True)


def _check_projector(group: Mapping[str, Any]) -> None:
    projector, side, lazy = PROJECTORS[group["projector"]], group["proj_type"], group.get("lazy")
    if projector.side is not None and side not in ("std", projector.side):
        raise ValueError(f"projector={group['projector']!r} chooses its own side: drop proj_type={side!r}")
    if projector.basis is GAUSSIAN:
        _check_gaussian(group)
    if side == "full" and projector.basis not in (DENSE, GAUSSIAN):
        raise ValueError(
            f"proj_type='full' needs two dense bases, projector={group['projector']!r} has none: choose "
            "proj_type='std', or projector='sketch', 'svd', 'track' or 'random'"
        )
    check_heads(group)
    if group.get("basis_dtype") and (projector.basis is not DENSE or isinstance(group.get("num_heads"), (list, tuple))):
        raise ValueError(
            f"basis_dtype={group['basis_dtype']!r} is for one dense basis a matrix, projector={group['projector']!r} "
            "keeps another: choose 'sketch', 'svd', 'track' or 'random', or drop the option"
        )
    if lazy is not None and not 0.0 <= lazy <= 1.0:
        raise ValueError(f"Invalid lazy: {lazy}; need an overlap between 0 and 1, or None")
    for name in ("lazy", "stagger") if group["projector"] == "descend" else ():
        if group.get(name):
            raise ValueError(f"{name}={group[name]}: projector='descend' is never refreshed, drop the option")
    for index, beta in enumerate(group.get("proj_betas") or ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid proj_betas parameter at index {index}: {beta}")
    for name in ("proj_ratio", "proj_weight_decay", "ortho"):
        if name in group and not 0.0 <= group[name] < float("inf"):
            raise ValueError(f"Invalid {name}: {group[name]}; need a number of at least 0")


def _check_gaussian(group: Mapping[str, Any]) -> None:
    """A basis that is not orthonormal measures how a rule magnifies rows, and nothing else."""
    if group.get("residual") != "channel":
        raise ValueError(
            "projector='gaussian' is not orthonormal, R P^T is no projection of the gradient: it is for the gradient "
            "itself, rescaled, by Apollo(params, rank=256) or LowRank(params, projector='gaussian', "
            "residual='channel', carry='keep'); else pass projector='random', which is orthonormal"
        )
    carry = group["carry"] or ("keep" if group["compat"] == "official" else "rotate")
    if carry == "rotate":
        raise ValueError(
            "carry='rotate' (the default where carry is None) needs orthonormal bases, projector='gaussian' has none: "
            "pass carry='keep' or carry='reset'"
        )
    if group.get("lazy") is not None:
        raise ValueError(
            f"lazy={group['lazy']} compares orthonormal bases, those of projector='gaussian' are new at every refresh: "
            "drop the option"
        )


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
