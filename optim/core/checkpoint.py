"""Loading a state dict: what a checkpoint may change, and what it must agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...kernels.rounding import CORRECTIONS
from .layout import ALONE, Layout
from .projector import PROJECTORS
from .sharding import is_dtensor
from .spec import Spec
from .state import zeros
from .target import CORRECTION

STRUCTURAL = ("rank", "density", "proj_type", "rule", "state_dtype", "basis_dtype")
"""Options that decide which state a parameter has: they cannot differ between a checkpoint and its reader."""

CONVERTIBLE = ("rank", "density", "state_dtype", "basis_dtype", "rounding")
"""Options, structural ones and the mode of rounding, between whose values `convert_state` converts."""

CONVERT = ", or load convert_state(state_dict, optimizer)"

Groups = Sequence[dict[str, Any]]
StateDict = dict[str, Any]


def merged_groups(ours: Groups, saved: Groups) -> Groups:
    """Complete the groups of a checkpoint with options that it lacks, as one of torch's AdamW does.

    Raises:
        ValueError: A structural option differs.
    """
    if len(saved) != len(ours):
        return saved  # torch's error to raise
    merged = []
    for mine, theirs in zip(ours, saved, strict=True):
        if theirs.get("decoupled_weight_decay") is False and theirs.get("weight_decay"):
            raise ValueError(
                f"the checkpoint is torch.optim.Adam's with weight_decay={theirs['weight_decay']} in the gradient; "
                "this optimizer decays weights apart from it, as AdamW: set it to 0 in the checkpoint's groups"
            )
        for name in (*STRUCTURAL, "rounding"):
            if name in theirs and theirs[name] != mine.get(name) and _structural(name, mine, theirs):
                raise ValueError(
                    f"the checkpoint has {name}={theirs[name]!r}, this optimizer {name}={mine.get(name)!r}: "
                    f"construct it with {name}={theirs[name]!r}{CONVERT if name in CONVERTIBLE else ''}"
                )
        _check_basis(mine, theirs)
        options = {name: value for name, value in mine.items() if name not in ("params", "param_names")}
        merged.append({**options, **theirs})
    return merged


def _structural(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether a difference of this option changes the state; `rounding` does so only where either is compensated."""
    return name != "rounding" or not CORRECTIONS.keys().isdisjoint((mine.get(name), theirs[name]))


def _check_basis(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a projector that keeps its basis in another form; of the same form, the checkpoint's is taken over."""
    names = mine.get("projector"), theirs.get("projector", mine.get("projector"))
    ours, saved = (getattr(PROJECTORS.get(str(name)), "basis", name) for name in names)
    if ours != saved:
        raise ValueError(
            f"the checkpoint has projector={names[1]!r}, this optimizer projector={names[0]!r}, which keeps its basis "
            f"in another form: construct the optimizer that wrote it, with projector={names[1]!r}"
        )


def restore(
    saved: Mapping[str, Tensor | float],
    described: Mapping[str, Spec],
    label: str,
    reader: str,
    layout: Layout = ALONE,
) -> dict[str, Tensor]:
    """Bring loaded state to our dtypes and devices, in tensors of its own.

    Args:
        saved: The state of a parameter.
        described: What it should be.
        label: The parameter, for messages.
        reader: The optimizer, for messages.
        layout: Of the parameter: whole state is cut to its pieces.

    Raises:
        ValueError: Names or shapes are those of another method, rule or rank, or sharded state meets a plain parameter.
    """
    fresh = {CORRECTION} & described.keys() - saved.keys()  # one that the checkpoint lacks starts at zero
    if saved.keys() | fresh != described.keys():
        raise ValueError(
            f"the loaded state of {label} has {sorted(saved)}, {reader} keeps {sorted(described)}: "
            "construct it as the optimizer of the checkpoint was"
        )
    loaded: dict[str, Tensor] = {}
    for name, spec in described.items():
        if name in fresh:
            loaded |= zeros({name: spec}, layout)
            continue
        if not isinstance(saved[name], Tensor | float | int):
            raise ValueError(
                f"the loaded {name!r} of {label} is a {type(saved[name]).__name__}, {reader} needs a tensor"
            )
        value = torch.as_tensor(saved[name], device=None if isinstance(saved[name], Tensor) else spec.device)
        if tuple(value.shape) != spec.shape:
            raise ValueError(
                f"the loaded {name!r} of {label} has shape {tuple(value.shape)}, {reader} needs {spec.shape}: "
                "construct it with the options of the checkpoint"
            )
        placed = _placed(value.detach(), name, spec, layout, label)
        loaded[name] = placed.to(device=spec.device, dtype=spec.dtype, copy=True)
    return loaded


def _placed(value: Tensor, name: str, spec: Spec, layout: Layout, label: str) -> Tensor:
    if layout.sharding is not None and spec.shape:
        return layout.sharding.adopt(value, layout.place(spec.axis))
    if is_dtensor(value):
        raise ValueError(
            f"the loaded {name!r} of {label} is sharded (DTensor), the parameter is not: gather it, "
            "get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)), and "
            "load it by set_optimizer_state_dict(model, optimizer, state_dict)"
        )
    return value


def load_keeping(
    optimizer: Optimizer, load: Callable[[StateDict], None], state_dict: StateDict, settle: Callable[[StateDict], None]
) -> None:
    """Load a state dict by torch's own method, then settle its state; a refused one leaves the optimizer as it was.

    This is done in hooks, since other hooks may replace the state dict before it is loaded or read the state after.

    Args:
        optimizer: The optimizer.
        load: torch's `load_state_dict` of it.
        state_dict: What `state_dict()` returned.
        settle: Replaces the state that torch has cast to the dtypes of the parameters; gets the uncast state dict.

    Raises:
        ValueError: The checkpoint is of another rank, side, rule or method.
    """
    raw: StateDict = {}

    def check(_: Optimizer, loaded: StateDict) -> StateDict:
        raw.update(loaded, param_groups=merged_groups(optimizer.param_groups, loaded["param_groups"]))
        return raw

    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(lambda _: settle(raw), prepend=True),
    ]
    before = dict(optimizer.__dict__)
    try:
        load(state_dict)
    except Exception:
        optimizer.__dict__.update(before)
        raise
    finally:
        for handle in handles:
            handle.remove()
