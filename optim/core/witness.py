"""Groups whose matrices were flattened behind the optimizer's back, which leaves nothing to project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Group = Mapping[str, Any]

REMEDY = (
    "for ZeRO stage 1 or 2 of DeepSpeed pass lowmem.optim.deepspeed.ZeroOptimizer(GaLore, param_groups(model, rank=128)"
    ", ...) to deepspeed.initialize; or shard with torch.distributed.fsdp.fully_shard(model)"
)


class Witness:
    """Remembers the groups as they were added, to tell when they are others.

    Args:
        groups: The list of groups of an optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]] | None = None) -> None:
        self._groups = groups
        self._wide: set[int] = set()

    def add(self, groups: list[dict[str, Any]], *, explicit: bool) -> None:
        """Take note of the group that was added last.

        Args:
            groups: All groups.
            explicit: The group named a rank or a density itself.

        Raises:
            ValueError: It did, and has nothing but vectors.
        """
        group = groups[-1]
        if explicit:
            _check_vectors(group)
        self._groups = groups
        if any(param.ndim > 1 for param in group["params"]):
            self._wide.add(id(group))

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Tell whether groups are what they were.

        Raises:
            ValueError: Matrices of a group with a rank have become vectors, or groups are hidden from the optimizer,
                which would drop the state of their parameters.
        """
        for group in groups:
            if id(group) in self._wide:
                _check_vectors(group)
        if self._groups is not None and groups is not self._groups and len(groups) < len(self._groups):
            raise ValueError(
                f"param_groups was replaced by a list of {len(groups)} of its {len(self._groups)} groups, which would "
                f"drop the state of the others: {REMEDY}; to remove a group, del optimizer.param_groups[index]"
            )


def _check_vectors(group: Group) -> None:
    size = next((f"{n}={group[n]}" for n in ("rank", "density") if group.get(n) is not None), None)
    if size is None or not group["params"] or any(param.ndim > 1 for param in group["params"]):
        return
    largest = max(group["params"], key=lambda param: param.numel())
    raise ValueError(
        f"a group with {size} has only vectors, the largest of shape {tuple(largest.shape)}, and no matrix to project: "
        f"leave {size.partition('=')[0]} out for biases and norms; where a framework has flattened matrices, {REMEDY}"
    )
