"""Ranks by matrix: as many directions as its gradient's spectrum deserves, under a budget of bytes for all.

Gradients of different layers are low-rank to different degrees (arXiv 2407.11239). With `e_i(j)` the share of matrix
i's energy in its j-th direction and `c_i` the bytes of state that one more direction costs,

    maximise  sum_i sum_{j <= r_i} e_i(j)   subject to   sum_i c_i r_i <= budget

is solved by taking directions in the order of `e_i(j) / c_i`, since shares fall with j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .magnitude import magnitude
from .sharding import whole
from .view import matrix_shape

AUTO = "auto"
"""Value of `rank` that leaves the choice to the gradients."""

ALL = 1.0 - 1e-9
"""Share of the energy beyond which directions hold rounding errors."""

Cost = Callable[[Tensor, int, dict[str, Any]], int | None]


class Candidate(NamedTuple):
    """A matrix that waits for a rank.

    Args:
        shares: Share of the energy by direction, falling, (min(m, n),).
        cost: Bytes of state that one direction more costs.
        least: Bytes of state with one direction.
    """

    shares: Tensor
    cost: int
    least: int


def choose_ranks(group: dict[str, Any], cost: Cost) -> list[int]:
    """Choose the rank of every parameter of a group, 0 for those that are not projected.

    Args:
        group: The group, with `energy` and `budget`; a gradient that does not tell counts as having a flat spectrum.
        cost: Bytes of state of a parameter of the group at a rank, None where it cannot have it.

    Raises:
        ValueError: As `ranks`.
    """
    candidates, places = [], []
    for place, param in enumerate(group["params"]):
        one, two = (cost(param, rank, group) for rank in (1, 2))
        if one is not None:
            grad = whole(torch.zeros_like(param) if param.grad is None else param.grad)
            shares = spectrum(grad.reshape(matrix_shape(param.shape)))
            candidates.append(Candidate(shares, one if two is None else two - one, one))
            places.append(place)
    chosen = [0] * len(group["params"])
    for place, rank in zip(places, ranks(candidates, group["energy"], group["budget"]), strict=True):
        chosen[place] = rank
    return chosen


def tells(param: Tensor) -> bool:
    """Whether the gradient of a parameter says anything of its rank; of a sharded one all ranks hear the same."""
    return param.ndim >= 2 and 0.0 < magnitude(param) < math.inf


def rank_in(group: dict[str, Any], param: Tensor) -> int:
    """Return the rank chosen for a parameter of a group, 0 while there is none."""
    pairs = zip(group["params"], group.get("ranks") or (), strict=False)
    return next((rank for member, rank in pairs if member is param), 0)


def spectrum(matrix: Tensor) -> Tensor:
    """Shares of the energy by direction, falling, fp64 (min(m, n),); flat where the gradient does not tell.

    By the eigenvalues of the smaller Gram matrix in fp64.
    """
    size = min(matrix.shape)
    flat = torch.full((size,), 1 / max(size, 1), dtype=torch.float64, device="cpu")
    largest = matrix.abs().amax()
    if not largest.isfinite() or largest == 0:
        return flat
    scaled = matrix.double() / largest
    gram = scaled.T @ scaled if matrix.shape[1] == size else scaled @ scaled.T
    energy: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0.0).cpu()
    return energy / energy.sum()


def ranks(candidates: Sequence[Candidate], energy: float | None, budget: int | None) -> list[int]:
    """Choose a rank for every matrix, at least 1 and below its smaller side.

    Args:
        candidates: The matrices.
        energy: Share of its energy at which a matrix needs no more directions; None asks for all that is not rounding.
        budget: Bytes for all of them; None sets no limit. What is left over does not pay for the next direction.

    Raises:
        ValueError: The budget does not pay for one direction of every matrix.
    """
    if not candidates:
        return []
    limits = [_limit(candidate.shares, energy) for candidate in candidates]
    if budget is None:
        return limits
    least = sum(candidate.least for candidate in candidates)
    if least > budget:
        raise ValueError(
            f"budget={budget} bytes is too little: one direction of every matrix takes {least}, pass budget={least} or "
            "more, or leave matrices plain, in a group without 'rank'"
        )
    owners = torch.arange(len(limits), device="cpu").repeat_interleave(torch.tensor(limits, device="cpu") - 1)
    costs = torch.tensor([candidate.cost for candidate in candidates], device="cpu")[owners]
    gains = torch.cat([c.shares[1:limit] / c.cost for c, limit in zip(candidates, limits, strict=True)])
    order = gains.argsort(descending=True, stable=True)
    affordable = order[costs[order].cumsum(0) <= budget - least]
    extra = torch.bincount(owners[affordable], minlength=len(candidates))
    return [1 + int(count) for count in extra]


def _limit(shares: Tensor, energy: float | None) -> int:
    target = ALL if energy is None else energy - 1e-12
    enough = int((shares.cumsum(0) < target).sum()) + 1
    return min(enough, max(len(shares) - 1, 1))
