"""What `step-time` times of this package and of torch, each beside the floor of its own work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Adafactor, AdamW, Optimizer

from .. import optim
from ..optim import GaLore
from .floors import LR

NEVER = 1 << 30
EIGHT_BIT_BACKENDS = ("torch", "compile")


class Stepper(Protocol):
    """Anything that steps parameters with gradients in place."""

    def step(self) -> Any:
        """Step all parameters once."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        name: What is shown.
        stepper: What is timed.
        refresh: Makes the next step refresh all bases; None where there are none.
        floor: Names of `bench.floors.FLOORS` whose sum a step of this kind cannot beat.
        first: Milliseconds of the first step, which makes the state, where it has been made.
    """

    name: str
    stepper: Stepper
    refresh: Callable[[], None] | None = None
    floor: tuple[str, ...] = ()
    first: float | None = None


def ours(params: list[Tensor], rank: int, **options: Any) -> Contender:
    """GaLore of this package."""
    optimizer = GaLore(params, lr=LR, rank=rank, **{"update_proj_gap": NEVER, **options})
    return _refreshable(optimizer, "products")


def other_methods(params: list[Tensor], rank: int) -> list[Contender]:
    """The other methods of this package: at the same rank, FRUGAL at the same share of columns of the smallest side."""
    shared: dict[str, Any] = {"lr": LR, "rank": rank, "update_proj_gap": NEVER}
    share = rank / min(min(param.shape) for param in params)
    columns: dict[str, Any] = {"lr": LR, "density": share, "update_proj_gap": NEVER}
    return [
        _refreshable(optim.GaLorePlus(params, residual_warmup=1, **shared), "products"),
        _refreshable(optim.Fira(params, **shared), "products", "pass"),
        _refreshable(optim.Apollo(params, **shared), "product", "pass"),
        _refreshable(optim.Frugal(params, **columns), "columns", "pass"),
        _refreshable(optim.Frugal(params, projector="sketch", **columns), "products", "product", "pass"),
        Contender("OnlineSubspaceDescent", optim.OnlineSubspaceDescent(params, lr=LR, rank=rank), floor=("descent",)),
        Contender("Flora", optim.Flora(params, **shared), floor=("products", "pass", "pass")),
        Contender("Adafactor", optim.Adafactor(params, lr=LR), floor=("pass", "pass")),
    ]


def eight_bit(params: list[Tensor], rank: int) -> list[Contender]:
    """GaLore with moments in 8 bits, by torch's operations and compiled."""
    found = [ours(params, rank, state_dtype="8bit", backend=backend) for backend in EIGHT_BIT_BACKENDS]
    return [replace(c, name=f"GaLore 8bit, {b}") for c, b in zip(found, EIGHT_BIT_BACKENDS, strict=True)]


def eight_bit_adamw(params: list[Tensor]) -> list[Contender]:
    """AdamW with moments in 8 bits on whole parameters, by torch's operations and compiled."""
    return [
        Contender(f"AdamW8bit, {backend}", optim.AdamW8bit(params, lr=LR, backend=backend))
        for backend in EIGHT_BIT_BACKENDS
    ]


def torch_adamw(params: list[Tensor]) -> list[Contender]:
    """torch.optim.AdamW in its three forms."""
    forms = {"loop": (False, False), "foreach": (True, False), "fused": (False, True)}
    return [
        Contender(f"torch AdamW {name}", AdamW(params, lr=LR, foreach=foreach, fused=fused))
        for name, (foreach, fused) in forms.items()
    ]


def torch_adafactor(params: list[Tensor]) -> Contender:
    """torch.optim.Adafactor."""
    return Contender("torch Adafactor", Adafactor(params, lr=LR))


def _refreshable(optimizer: Optimizer, *floor: str) -> Contender:
    def refresh() -> None:
        for state in optimizer.state.values():
            state["until_refresh"].zero_()

    projector = optimizer.defaults.get("projector")
    shown = f", {projector}" if isinstance(optimizer, optim.Frugal) else ""
    return Contender(type(optimizer).__name__ + shown, optimizer, refresh, floor)
