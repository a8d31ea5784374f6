"""What an optimizer does with each parameter, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .bucket import Plan
from .spec import Spec
from .state import is_counter
from .view import MatrixView


@dataclass(frozen=True, slots=True)
class Row:
    """Parameters of one group that are treated alike."""

    group: int
    shape: tuple[int, ...]
    count: int
    side: str
    """left, right, full or plain."""
    rank: int | None
    weights: int
    """Elements of the parameters."""
    state_bytes: int
    """Bytes of their bases and moments, step counters left out."""


class Summary(tuple[Row, ...]):
    """Rows of `Row`; prints as a table."""

    @property
    def state_bytes(self) -> int:
        """Bytes of all bases and moments."""
        return sum(row.state_bytes for row in self)

    @property
    def projected(self) -> int:
        """Number of projected matrices."""
        return sum(row.count for row in self if row.rank is not None)

    def __str__(self) -> str:
        lines = [f"{'group':>5}  {'shape':<20} {'count':>5}  {'side':<5} {'rank':>5} {'weights':>13} {'state':>12}"]
        for row in self:
            shape, rank = "x".join(map(str, row.shape)) or "scalar", "-" if row.rank is None else row.rank
            lines.append(
                f"{row.group:>5}  {shape:<20} {row.count:>5}  {row.side:<5} {rank:>5} {row.weights:>13,} "
                f"{row.state_bytes / 2**20:>8.2f} MiB"
            )
        weights = sum(row.weights for row in self)
        lines.append(
            f"{self.projected} of {sum(row.count for row in self)} parameters projected; "
            f"{weights:,} weights, {self.state_bytes / 2**20:.2f} MiB of state"
        )
        return "\n".join(lines)


def summarise(plans: list[Plan], specs: Callable[[Tensor, MatrixView | None, int], dict[str, Spec]]) -> Summary:
    """Describe the buckets, splitting plain ones by shape."""
    rows: dict[tuple[int, tuple[int, ...], MatrixView | None], Row] = {}
    for plan in plans:
        for param in plan.params:
            described = specs(param, plan.view, plan.group)
            size = sum(spec.nbytes for name, spec in described.items() if not is_counter(name))
            shape = tuple(param.shape)
            key = (plan.group, shape, plan.view)
            side, rank = ("plain", None) if plan.view is None else (plan.view.side, plan.view.rank)
            row = rows.get(key, Row(plan.group, shape, 0, side, rank, 0, 0))
            rows[key] = replace(
                row, count=row.count + 1, weights=row.weights + param.numel(), state_bytes=row.state_bytes + size
            )
    return Summary(rows.values())
