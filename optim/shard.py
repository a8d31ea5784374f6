"""`kept_shard`: which dimension of a weight to shard, so that projections send nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .core.view import matrix_shape

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def kept_shard(param: Tensor) -> Shard:
    """Shard the longer side of a matrix, which a projection keeps: steps between refreshes then send nothing.

        fully_shard(layer, shard_placement_fn=kept_shard)

    For methods that project the smaller side (`proj_type="std"`). Dimensions other than the first must divide evenly,
    FSDP2 says so.

    Args:
        param: A parameter; vectors are sharded as ever.
    """
    from torch.distributed.tensor import Shard  # slow to import, and there for those who call this

    if param.ndim < 2:
        return Shard(0)
    rows, cols = matrix_shape(param.shape)
    return Shard(0 if rows >= cols else 1)
