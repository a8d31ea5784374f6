"""How much of a gradient's energy the sketched basis holds, against the best basis of its rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..kernels import random
from ..optim.core import linalg
from ..optim.core.layout import Layout
from ..optim.core.projector import Request, sketch
from ..optim.core.view import MatrixView


def captured_energy(params: Sequence[Tensor], rank: int, at_most: int = 12) -> dict[str, float]:
    """Compare the energy that the sketch captures, cold and warm-started, with that of the best basis.

    Args:
        params: Weights with gradients.
        rank: Columns of the bases.
        at_most: Weights that are looked at, evenly chosen.
    """
    cold: list[float] = []
    warm: list[float] = []
    for index, param in enumerate(params[:: max(1, len(params) // at_most)]):
        assert param.grad is not None
        view = MatrixView.of(param.shape, rank, "std")
        matrix = view.orient(param.grad).float()
        scale = matrix.abs().amax()
        best = _energy(matrix, linalg.exact_basis(matrix, rank, scale.double()).float())
        old = linalg.orthonormal(random.normal(index, view.b, rank, matrix.device))
        for kind, start in ((cold, None), (warm, old)):
            (found,) = sketch([Request(matrix, scale, view, view, Layout(), random.mix(index), start)])
            kind.append(_energy(matrix, found.basis) / best)
    return {
        "cold_min": min(cold),
        "cold_mean": float(np.mean(cold)),
        "warm_min": min(warm),
        "warm_mean": float(np.mean(warm)),
    }


def _energy(matrix: Tensor, basis: Tensor) -> float:
    return float((matrix @ basis).double().square().sum())
