"""The state of one parameter, from the group in which it was saved to the one in which it will be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels import random
from ...kernels.rounding import converted
from . import codec, compact, linalg, sparse
from .basis import DENSE, Dense
from .checkpoint import restore
from .groups import Groups
from .spec import Spec
from .state import zeros
from .target import CORRECTION
from .view import MatrixView

Group = dict[str, Any]
State = dict[str, Tensor]


class Conversion:
    """Rank, bits and mode of rounding of a parameter's state; all other options are the same in both groups.

    Args:
        optimizer: Describes the state. It must hold the saved state meanwhile: sparse residuals tell their phase
            (warm-up or chosen) by the names of the state that there is.
        param: The parameter.
        groups: The complete group that it was saved in, and the one that it will be in.
        position: Position of the parameter in the optimizer, for messages and seeds.

    Raises:
        ValueError: The subspaces differ in more than the rank of a dense basis.
    """

    def __init__(self, optimizer: Groups, param: Tensor, groups: tuple[Group, Group], position: int) -> None:
        self.param, self.seed = param, random.mix(int(groups[1].get("seed", 0)), position)
        self.dtype = codec.work_dtype(param.dtype)
        self.label = f"parameter {position} {tuple(param.shape)}"
        self.reader = f"a {type(optimizer).__name__} of its rank and bits"
        self.additive = groups[1].get("residual") == "additive"
        self.views = tuple(optimizer._view(param, group) for group in groups)
        pairs = zip(self.views, groups, strict=True)
        self.old, self.new = (optimizer._specs_in(param, view, group) for view, group in pairs)
        self.how = tuple(optimizer._hyper(group) for group in groups)
        one, other = self.views
        if one != other and not all(map(_divisible, (self.old, self.new), self.how)):
            raise ValueError(
                f"{self.label} is {_told(one)} in the checkpoint and {_told(other)} here: only ranks of one dense "
                "basis can be converted; construct the optimizer with the rank, side and projector of the checkpoint"
            )
        self.growth = 0 if one is None or other is None else other.rank - one.rank

    def of(self, saved: Mapping[str, Any]) -> State:
        """Convert the state, in tensors of its own.

        Raises:
            ValueError: It is that of another method.
        """
        held, made = restore(saved, self.old, self.label, self.reader), zeros(self.new)
        for name in made.keys() & held.keys():
            if name in DENSE.names:
                self._basis(held, made, name)
            elif name == CORRECTION:
                made[name] = converted(held[name], made[name].dtype)
            elif not name.endswith(codec.SCALE):
                self._moment(held, made, name)
        if self.growth > 0 and made["until_refresh"].isfinite():
            made["until_refresh"].zero_()
        if self.growth < 0:
            self._shift(held, made)
        return made

    def _moment(self, held: State, made: State, name: str) -> None:
        """Convert a moment or a counter: decode it, cut it or fill it up to the new shape, and code it."""
        if not self._same(held, made, name):
            value = codec.load(held, name, self.how[0].state_dtype, self.dtype)
            value = _fit(value, self.new[name].shape, mean="exp_avg_sq" in name)
            codec.store(made, name, value, self.how[1].state_dtype, self.seed if "exp_avg_sq" in name else None)

    def _basis(self, held: State, made: State, name: str) -> None:
        """Leading columns of a dense basis, and orthonormal ones at random where there are more."""
        if self._same(held, made, name):
            return
        rank = made[name + compact.SCALE if name + compact.SCALE in made else name].shape[-1]
        value = DENSE.read(held, self.dtype, name)[:, :rank]  # (b, r)
        if rank > value.shape[1]:
            fresh = random.normal(self.seed, len(value), rank - value.shape[1], value.device).to(value.dtype)
            for _ in range(2):
                fresh = fresh - value @ (value.T @ fresh)
            value = torch.cat([value, linalg.orthonormal(fresh)], dim=1)
        if name + compact.SCALE in made:
            compact.write([made[name]], [made[name + compact.SCALE]], value[None])
        else:
            made[name].copy_(value)

    def _same(self, held: State, made: State, name: str) -> bool:
        """Take a tensor over to the bit, with its scales, where both are described alike."""
        keys = (name, name + codec.SCALE)
        same = all(self.old.get(key) == self.new.get(key) for key in keys)
        if same:
            made.update({key: held[key] for key in keys if key in made})
        return same

    def _shift(self, held: State, made: State) -> None:
        """Keep `dM + back(M)`, the first moment of the whole gradient: dM takes up what a lower rank cuts off."""
        average = sparse.AVERAGE in made
        if not average and not (self.additive and sparse.INDEX in made):
            return
        lost = self._back(held, 0) - self._back(made, 1)  # (m, n)
        if average:
            made[sparse.AVERAGE] += lost
            return
        name, stored = sparse.PREFIX + "exp_avg", self.how[1].state_dtype
        moment = codec.load(made, name, stored, self.dtype)
        codec.store(made, name, moment + lost.take(made[sparse.INDEX].long()), stored)

    def _back(self, held: State, side: int) -> Tensor:
        """`M P^T`, or `Q M P^T`, in the order of the weight (m, n)."""
        low, left = codec.load(held, "exp_avg", self.how[side].state_dtype, self.dtype), DENSE.left(held, self.dtype)
        whole = (low if left is None else left @ low) @ DENSE.read(held, self.dtype).T  # (a, b)
        view = self.views[side]
        return whole.T if view is not None and view.transposed else whole


def _fit(value: Tensor, shape: tuple[int, ...], *, mean: bool) -> Tensor:
    """Cut a tensor to a shape, or fill it up: with zeros, or with the mean of what there is along the dimension."""
    for dim, size in enumerate(shape):
        value = value.narrow(dim, 0, min(size, value.shape[dim]))
        missing = size - value.shape[dim]
        if missing:
            fill = value.mean(dim, keepdim=True) if mean else torch.zeros_like(value.narrow(dim, 0, 1))
            value = torch.cat([value, fill.expand(*value.shape[:dim], missing, *value.shape[dim + 1 :])], dim)
    return value


def _divisible(described: Mapping[str, Spec], how: Any) -> bool:
    """Tell whether the state has a basis that can lose or gain columns."""
    return "basis" in described and isinstance(how.basis, Dense)


def _told(view: MatrixView | None) -> str:
    if view is None:
        return "plain"
    return f"projected on its {view.side} side at rank {view.rank}" if view.rank else "without moments"
