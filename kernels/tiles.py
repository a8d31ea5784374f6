"""Cutting matrices into pieces whose working copies stay small."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Elements of a tile on a CPU, so that its working copies stay in the cache."""
GPU_CHUNK = 1 << 24
"""The same on a GPU, where fewer launches count for more."""


def tiles(matrix: Tensor, limit: int | None = None, *, even: bool = False) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into blocks of rows, or pieces of one row, of a bounded number of elements.

    Args:
        matrix: The matrix.
        limit: Elements of a tile, a power of two; by default what suits the device.
        even: Blocks of rows of one height, as matrix products are fastest, instead of a small one at the end.
    """
    limit = limit or chunk(matrix.device)
    a, b = matrix.shape
    height, width = max(1, limit // max(b, 1)), min(b, limit)
    if even and a:
        height = math.ceil(a / math.ceil(a / height))
    for row in range(0, a, height):
        for col in range(0, b, max(width, 1)):
            yield slice(row, min(row + height, a)), slice(col, min(col + width, b))


def row_blocks(matrix: Tensor, dtype: torch.dtype | None = None) -> Iterator[slice]:
    """Cut a matrix into blocks of whole rows of bounded size, into one where it has this dtype already."""
    a, b = matrix.shape
    height = max(1, a if matrix.dtype == dtype else chunk(matrix.device) // max(b, 1))
    for row in range(0, a, height):
        yield slice(row, min(row + height, a))


def chunk(device: torch.device) -> int:
    """Elements of a tile on this device; a multiple of every block of codes."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK
