"""Where the rows and columns of a matrix live: the sums that turn local products into global ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Layout:
    """Process groups that shard the oriented matrix A (a x b); both empty on a single device.

    Every optimizer is written with these two sums, so that sharding is a property of the layout:

        project   R_i = sum_cols A_ij P_j
        adjoint   Z_j = sum_rows A_ij^T Y_i

    Args:
        rows: Groups over which the kept side a is sharded.
        cols: Groups over which the projected side b is sharded.
    """

    rows: tuple[ProcessGroup, ...] = ()
    cols: tuple[ProcessGroup, ...] = ()

    @classmethod
    def of(cls, param: Tensor) -> Layout:
        """Derive the layout of a parameter.

        Raises:
            NotImplementedError: The parameter is sharded (a DTensor).
        """
        if hasattr(param, "placements"):
            raise NotImplementedError(
                f"got a sharded parameter (DTensor, placements {param.placements}), need a plain tensor: this version "
                "projects on a single device or under DistributedDataParallel; wrap with "
                "torch.nn.parallel.DistributedDataParallel(model) instead of fully_shard(model)"
            )
        return cls()

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """Sum a product contracted over the kept side."""
        return _sum(tensor, self.rows)

    def sum_cols(self, tensor: Tensor) -> Tensor:
        """Sum a product contracted over the projected side."""
        return _sum(tensor, self.cols)


def _sum(tensor: Tensor, groups: tuple[ProcessGroup, ...]) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor
