"""Distances of weights that were trained in two ways."""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, Any]
"""Weights by name."""


def distance(found: Arrays, expected: Arrays) -> float:
    """The largest difference of two weights."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


def share(found: Arrays, expected: Arrays, start: Arrays) -> float:
    """The distance of weights as a share of the way that they have come."""
    norm = np.linalg.norm
    return max(float(norm(found[k] - expected[k]) / norm(expected[k] - start[k])) for k in found)
