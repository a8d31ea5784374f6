"""Refuses groups whose matrices a framework has flattened into vectors, which leaves nothing to project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...kernels.blockwise import FORMATS

Group = Mapping[str, Any]

SHARD = "shard with torch.distributed.fsdp.fully_shard(model), which keeps matrices"
REMEDY = (
    "with DeepSpeed take ZeRO stage 1 or 2 and pass lowmem.optim.deepspeed.ZeroOptimizer(GaLore, "
    f"param_groups(model, rank=128), ...) to deepspeed.initialize; or {SHARD}"
)
STAGE = f"""set {{"zero_optimization": {{"stage": 2}}}}, or {SHARD}"""


class FlatteningGuard:
    """Remembers which groups had matrices when they were added, to notice when a framework has flattened them.

    Args:
        groups: The list of groups of an optimizer.
        before: The guard of the groups that these replace, as where a state dict was loaded.
    """

    def __init__(self, groups: list[dict[str, Any]] | None = None, before: FlatteningGuard | None = None) -> None:
        self._groups = groups
        known = set() if before is None else before.places()
        self._wide = [group for place, group in enumerate(groups or []) if place in known or _has_matrices(group)]

    def places(self) -> set[int]:
        """Indices of the groups that had matrices."""
        return {place for place, group in enumerate(self._groups or []) if self._knows(group)}

    def _knows(self, group: dict[str, Any]) -> bool:
        return any(group is known for known in self._wide)

    def add(self, groups: list[dict[str, Any]], *, explicit: bool) -> None:
        """Take note of the group that was added last.

        Args:
            groups: All groups.
            explicit: The group named a rank or a density itself.

        Raises:
            ValueError: `explicit` and the group has nothing but vectors; or ZeRO stage 3 has cut its matrices.
        """
        group = groups[-1]
        _check_partitioned(group)
        if explicit:
            _check_vectors(group)
        self._groups = groups
        if _has_matrices(group):
            self._wide.append(group)

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Refuse groups that have been flattened or taken away since they were added.

        Raises:
            ValueError: Matrices of a group with an option for matrices have become vectors, or groups are hidden from
                the optimizer, which would drop the state of their parameters.
        """
        for group in groups:
            if self._knows(group):
                _check_vectors(group)
        if self._groups is not None and groups is not self._groups and len(groups) < len(self._groups):
            raise ValueError(
                f"param_groups was replaced by a list of {len(groups)} of its {len(self._groups)} groups, which would "
                f"drop the state of the others: {REMEDY}; to remove a group, del optimizer.param_groups[index]"
            )


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO stage 3 of DeepSpeed has it in pieces; told as DeepSpeed itself does."""
    return hasattr(param, "ds_id")


def _check_partitioned(group: Group) -> None:
    shapes = [tuple(getattr(param, "ds_shape", ())) for param in group["params"] if is_partitioned(param)]
    wide = [shape for shape in shapes if len(shape) > 1]
    if wide and (found := _for_matrices(group)):
        raise ValueError(
            f"a group with {found[0]} has a {wide[0]} parameter that ZeRO stage 3 of DeepSpeed has cut into pieces "
            f"without rows: {found[2]}"
        )


def _has_matrices(group: Group) -> bool:
    return any(param.ndim > 1 for param in group["params"])


def _check_vectors(group: Group) -> None:
    found = _for_matrices(group)
    if found is None or not group["params"] or _has_matrices(group):
        return
    what, advice, remedy = found
    largest = max(group["params"], key=lambda param: param.numel())
    raise ValueError(
        f"a group with {what} has only vectors, the largest of shape {tuple(largest.shape)}, and no matrix: "
        f"{advice}where a framework has flattened matrices, {remedy}"
    )


def _for_matrices(group: Group) -> tuple[str, str, str] | None:
    """An option of the group that needs matrices, advice where its parameters are vectors, advice where flattened."""
    for name in ("rank", "density"):
        if group.get(name) is not None:
            return f"{name}={group[name]}", f"leave {name} out for biases and norms; ", REMEDY
    if group.get("rule", "adafactor") == "adafactor":  # Adafactor and Flora name no rule
        return "factored second moments", "", SHARD
    if group.get("state_dtype") in FORMATS:
        return f"state_dtype={group['state_dtype']!r}", "pass state_dtype='bfloat16'; ", REMEDY
    return None
