"""How a parameter (a DTensor) is sharded over a device mesh: its local piece, and the placements of its state."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .spec import Axis

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


class Box(NamedTuple):
    """The local piece of a parameter as a matrix (first dimension, rest): its first cell, and its size."""

    row: int
    col: int
    m: int
    n: int


@dataclass(frozen=True)
class Sharding:
    """Placements of a DTensor parameter.

    Args:
        mesh: The device mesh.
        placements: One a mesh dimension.
        shape: Global shape of the parameter.
        device: Where pieces lie: not on the device of the mesh if they are offloaded to the CPU.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, param: Tensor) -> Sharding | None:
        """Read it from a parameter; None for a plain tensor.

        Raises:
            NotImplementedError: A weight of more than two dimensions is sharded in its third or a later one, or a
                placement is neither a shard nor a replica; or it belongs to FSDP1, which flattens matrices.
        """
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            raise NotImplementedError(
                f"got a {tuple(param.shape)} parameter of FullyShardedDataParallel, which cuts matrices into flat "
                "pieces: shard with torch.distributed.fsdp.fully_shard(model)"
            )
        if not is_dtensor(param):
            return None
        for placement in param.placements:
            dim = shard_dim(placement)
            if not placement.is_replicate() and (dim is None or dim > 1):
                raise NotImplementedError(
                    f"got a {tuple(param.shape)} parameter with placements {param.placements}, need Shard(0), Shard(1) "
                    "or Replicate(): pass fully_shard(model, shard_placement_fn=lambda p: Shard(0))"
                )
        sizes = (param.device_mesh.size(i) for i, placement in enumerate(param.placements) if shard_dim(placement) == 1)
        parts = math.prod(sizes)
        if param.ndim > 2 and param.shape[1] % parts:
            raise NotImplementedError(
                f"got a {tuple(param.shape)} parameter whose second dimension is cut into {parts} pieces of unequal "
                "size: shard the first one, Shard(0)"
            )
        return cls(param.device_mesh, tuple(param.placements), tuple(param.shape), param.device)

    def groups(self, dim: int) -> tuple[ProcessGroup, ...]:
        """Process groups over which a dimension is sharded."""
        return tuple(
            self.mesh.get_group(index) for index, placement in enumerate(self.placements) if shard_dim(placement) == dim
        )

    @property
    def everywhere(self) -> tuple[ProcessGroup, ...]:
        """Process groups of all mesh dimensions that shard the parameter, in the order of the mesh."""
        sharded = (index for index, placement in enumerate(self.placements) if shard_dim(placement) is not None)
        return tuple(self.mesh.get_group(index) for index in sharded)

    @property
    def own(self) -> tuple[Placement, ...]:
        """Placements of the parameter."""
        return self.placements

    def box(self) -> Box | None:
        """The local piece."""
        local, offset = self._cut(self.shape, self.placements)
        rest = math.prod(self.shape[2:])
        if len(self.shape) < 2:  # a vector is one row
            return Box(0, offset[0] if offset else 0, 1, local[0] if local else 1)
        return Box(offset[0], offset[1] * rest, local[0], local[1] * rest)

    def _cut(
        self, shape: tuple[int, ...], placements: tuple[Placement, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of this rank's piece of a whole tensor, and where it begins."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        local, offset = compute_local_shape_and_global_offset(shape, self.mesh, placements)
        return tuple(local), tuple(offset)

    def place(self, axis: Axis, *, transposed: bool = False, everywhere: bool = False) -> tuple[Placement, ...]:
        """Placements of a state tensor.

        Args:
            axis: What its first dimension runs over.
            transposed: The parameter is projected from the left, so that its columns are the kept side.
            everywhere: Shard the first dimension over every mesh dimension that shards the parameter in any of its own.
        """
        if axis == "param":
            return self.placements
        kept = 1 if transposed else 0
        dim = {"m": 0, "n": 1, "kept": kept, "basis": 1 - kept, "projected": 1 - kept}.get(axis)
        return tuple(self._follow(placement, dim, everywhere) for placement in self.placements)

    @staticmethod
    def _follow(placement: Placement, dim: int | None, everywhere: bool) -> Placement:
        """Placement of a state whose first dimension is dimension `dim` of the parameter (None: of neither)."""
        from torch.distributed.tensor import Replicate, Shard

        own = shard_dim(placement)
        if own is None or (own != dim and not everywhere):
            return Replicate()
        return moved(placement, 0) if own == dim else Shard(0)

    def wrap(self, local: Tensor, shape: tuple[int, ...], placements: tuple[Placement, ...]) -> DTensor:
        """Make a DTensor of a local piece; the global shape is passed, as it does not follow from uneven pieces."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
        if local.device.type == self.mesh.device_type:
            return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=size, stride=stride)
        # Offloaded: `from_local` would move the piece to the device of the mesh.
        spec = DTensorSpec(self.mesh, placements, tensor_meta=TensorMeta(size, stride, local.dtype))
        made: DTensor = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
        return made

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, placements: tuple[Placement, ...]) -> DTensor:
        """Zeros of a global shape, of which this rank allocates its piece."""
        local, _ = self._cut(shape, placements)
        return self.wrap(torch.zeros(local, dtype=dtype, device=self.device), shape, placements)

    def adopt(self, value: Tensor, placements: tuple[Placement, ...]) -> DTensor:
        """Make a DTensor of a whole tensor, of which this rank keeps its piece; other placements are gathered first."""
        if is_dtensor(value):
            if value.device_mesh == self.mesh and tuple(value.placements) == placements:
                return value
            value = value.full_tensor()
        local, offset = self._cut(tuple(value.shape), placements)
        piece = value[tuple(slice(first, first + size) for first, size in zip(offset, local, strict=True))]
        return self.wrap(piece.to(self.device), tuple(value.shape), placements)


def shard_dim(placement: Placement) -> int | None:
    """The dimension that a placement shards, strided shards (of two mesh dimensions) included."""
    dim = getattr(placement, "dim", None)
    return dim if isinstance(dim, int) and not placement.is_partial() else None


def moved(placement: Placement, dim: int) -> Placement:
    """The same placement with another dimension in the place of the one that it shards."""
    from torch.distributed.tensor import Shard

    if isinstance(placement, Shard):
        return Shard(dim)
    strided: Any = type(placement)  # _StridedShard: two mesh dimensions shard one dimension
    made: Placement = strided(dim, split_factor=getattr(placement, "split_factor", 1))
    return made


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; does not import their module, which is slow: before someone has there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def beside(param: Tensor, value: Tensor) -> Tensor:
    """A copy of a value that lies as a parameter does: of a whole one, or one that lies elsewhere, the piece."""
    if not is_dtensor(param):
        return value.to(param.device, copy=True)
    own = Sharding(param.device_mesh, tuple(param.placements), tuple(param.shape), param.device)
    return own.adopt(value, own.placements).clone()


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered; a plain tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The local piece of a DTensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor
