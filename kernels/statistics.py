"""Adafactor's statistics by torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor


def square_means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `lowmem.kernels.reference.square_means` without the squares, of a batch of matrices and in fp64 too."""
    m, n = max(matrix.shape[-2], 1), max(matrix.shape[-1], 1)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    row = torch.linalg.vector_norm(matrix, dim=-1, dtype=dtype).square_().div_(n)
    return row, torch.linalg.vector_norm(matrix, dim=-2, dtype=dtype).square_().div_(m)
