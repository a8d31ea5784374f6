"""State of a checkpoint at another rank or in other bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import random
from ..kernels.rounding import converted
from .core import codec, compact, linalg
from .core.basis import DENSE, Dense
from .core.checkpoint import CONVERTIBLE, STRUCTURAL, restore
from .core.lifecycle import Lifecycle
from .core.state import zeros
from .core.target import CORRECTION
from .core.view import MatrixView

StateDict = dict[str, Any]


def convert_state(state_dict: Mapping[str, Any], optimizer: Lifecycle) -> StateDict:
    """Convert a state dict into one for an optimizer of the same method with another rank or other bits.

        optimizer = GaLore(param_groups(model, rank=64), lr=1e-2, state_dtype="8bit")
        optimizer.load_state_dict(convert_state(torch.load("rank128-fp32.pt"), optimizer))

    A lower rank keeps the leading columns of basis and moments. A higher one adds orthonormal columns at random, with
    no momentum and the mean of the second moments, and has the basis found anew in the next step. Moments are decoded
    and coded, corrections of rounding converted, started at zero or left out.

    Args:
        state_dict: What `state_dict()` returned.
        optimizer: The optimizer that will load it; it is not changed.

    Returns:
        A state dict for `optimizer.load_state_dict`; tensors are copies.

    Raises:
        TypeError: The optimizer is not of this package.
        ValueError: Groups or parameters do not correspond, or differ in more than ranks and bits.
    """
    if not isinstance(optimizer, Lifecycle):
        raise TypeError(f"got a {type(optimizer).__name__}, need an optimizer of lowmem.optim")
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in ours] != [len(g["params"]) for g in theirs]:
        raise ValueError(
            f"the checkpoint has groups of {[len(g['params']) for g in theirs]} parameters, this optimizer of "
            f"{[len(g['params']) for g in ours]}: construct it with the groups of the checkpoint"
        )
    state, groups, position = {}, [], 0
    for mine, saved in zip(ours, theirs, strict=True):
        before = {**mine, **{name: value for name, value in saved.items() if name != "params"}}
        for param, key in zip(mine["params"], saved["params"], strict=True):
            held = state_dict["state"].get(key)
            if held:
                state[key] = _Change(optimizer, param, before, mine, position).of(held)
            position += 1
        groups.append({**saved, **{name: mine[name] for name in (*STRUCTURAL, "rounding") if name in mine}})
    return {"state": state, "param_groups": groups}


class _Change:
    """One parameter between two groups: the one it was saved in, and the one it is in now."""

    def __init__(
        self, optimizer: Lifecycle, param: Tensor, before: dict[str, Any], after: dict[str, Any], position: int
    ) -> None:
        self.param, self.seed = param, random.mix(int(after.get("seed", 0)), position)
        self.label = f"parameter {position} {tuple(param.shape)}"
        self.reader = f"a {type(optimizer).__name__} of its rank and bits"
        self.views = tuple(optimizer._view(param, group) for group in (before, after))
        self.old, self.new = (
            optimizer._specs_in(param, view, group) for view, group in zip(self.views, (before, after), strict=True)
        )
        self.how = tuple(optimizer._hyper(group) for group in (before, after))
        self._check(before, after)

    def of(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Convert the state."""
        held = restore(saved, self.old, self.label, self.reader)
        made = zeros(self.new)
        for name in self.new:
            if name in ("basis", "basis_left"):
                self._basis(held, made, name)
            elif name in held and not name.endswith(codec.SCALE) and name != CORRECTION:
                self._moment(held, made, name)
        if {CORRECTION} <= held.keys() & made.keys():
            made[CORRECTION] = converted(held[CORRECTION], made[CORRECTION].dtype)
        if self._grows() and "until_refresh" in made and made["until_refresh"].isfinite():
            made["until_refresh"].zero_()
        return made

    def _check(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        for name in STRUCTURAL:
            if name not in CONVERTIBLE and before.get(name) != after.get(name):
                raise ValueError(
                    f"the checkpoint has {name}={before.get(name)!r}, this optimizer {name}={after.get(name)!r}: only "
                    f"{', '.join(CONVERTIBLE)} can be converted; construct it with {name}={before.get(name)!r}"
                )
        one, other = self.views
        same = _orientation(one) == _orientation(other)
        dense = all(isinstance(getattr(how, "basis", None), Dense) for how in self.how)
        if not same or (one != other and not dense):
            raise ValueError(
                f"{self.label} is {_told(one)} in the checkpoint and {_told(other)} here: only ranks of one dense "
                "basis can be converted; construct the optimizer with the rank, side and projector of the checkpoint"
            )

    def _grows(self) -> bool:
        one, other = self.views
        return one is not None and other is not None and other.rank > one.rank

    def _moment(self, held: dict[str, Tensor], made: dict[str, Tensor], name: str) -> None:
        """Anything but a basis: decoded, cut or filled up, and coded."""
        old, new = self.old[name], self.new[name]
        if old == new:
            made[name] = held[name]
            if name + codec.SCALE in made:
                made[name + codec.SCALE] = held[name + codec.SCALE]
            return
        value = codec.load(held, name, self.how[0].state_dtype, codec.work_dtype(self.param.dtype))
        value = _fit(value, new.shape, mean="exp_avg_sq" in name)
        codec.store(made, name, value, self.how[1].state_dtype, self.seed if "exp_avg_sq" in name else None)

    def _basis(self, held: dict[str, Tensor], made: dict[str, Tensor], name: str) -> None:
        if self._kept(name):
            for key in {name, name + compact.SCALE} & made.keys():
                made[key] = held[key]
            return
        value = DENSE.read(held, torch.promote_types(self.param.dtype, torch.float32), name)  # (b, r)
        rank = self.views[1].rank if self.views[1] is not None else 0
        value = value[:, :rank]
        if rank > value.shape[1]:
            fresh = random.normal(self.seed, len(value), rank - value.shape[1], value.device).to(value.dtype)
            for _ in range(2):
                fresh = fresh - value @ (value.T @ fresh)
            value = torch.cat([value, linalg.orthonormal(fresh)], dim=1)
        if name + compact.SCALE in made:
            compact.write(made[name], made[name + compact.SCALE], value)
        else:
            made[name].copy_(value)

    def _kept(self, name: str) -> bool:
        keys = (name, name + compact.SCALE)
        return [self.old.get(key) for key in keys] == [self.new.get(key) for key in keys]


def _fit(value: Tensor, shape: tuple[int, ...], *, mean: bool) -> Tensor:
    """Cut a tensor, or fill it up with zeros or with the mean of what there is along the dimension."""
    for dim, size in enumerate(shape):
        value = value.narrow(dim, 0, min(size, value.shape[dim]))
        missing = size - value.shape[dim]
        if missing:
            fill = value.mean(dim, keepdim=True) if mean else torch.zeros_like(value.narrow(dim, 0, 1))
            value = torch.cat([value, fill.expand(*value.shape[:dim], missing, *value.shape[dim + 1 :])], dim)
    return value


def _orientation(view: MatrixView | None) -> tuple[bool, ...] | None:
    return None if view is None else (view.transposed, view.full, view.rank == 0)


def _told(view: MatrixView | None) -> str:
    return "plain" if view is None else f"projected on its {view.side} side at rank {view.rank}"
