"""What `step-time` times: our optimizers, torch's, the neighbours' and the bare matrix products."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from .. import optim
from ..optim import GaLore
from .errors import UserError

LR = 1e-6
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
    """

    name: str
    stepper: Stepper
    refresh: Callable[[], None] | None = None


class GemmFloor:
    """Projection into a buffer and `addmm_` into the weight, nothing else: what a step cannot do without.

    Args:
        params: Weights with gradients.
        rank: Columns of the (random orthonormal) bases.
    """

    def __init__(self, params: Iterable[Tensor], rank: int) -> None:
        self.work = []
        for param in params:
            m, n = param.shape
            basis = torch.linalg.qr(torch.randn(min(m, n), rank))[0].to(param)
            self.work.append((param, basis, param.new_empty(max(m, n), rank)))

    @torch.no_grad()
    def step(self) -> None:
        """Project and project back."""
        for param, basis, low in self.work:
            assert param.grad is not None
            if param.shape[0] >= param.shape[1]:
                torch.mm(param.grad, basis, out=low)
                param.addmm_(low, basis.T, beta=1 - LR, alpha=-LR)
            else:
                torch.mm(param.grad.T, basis, out=low)
                param.addmm_(basis, low.T, beta=1 - LR, alpha=-LR)


def ours(params: list[Tensor], rank: int, **options: Any) -> Contender:
    """GaLore of this package."""
    return _refreshable(GaLore(params, lr=LR, rank=rank, **{"update_proj_gap": NEVER, **options}))


def other_methods(params: list[Tensor], rank: int) -> list[Contender]:
    """The other methods of this package: at the same rank, FRUGAL at the same share of columns of the smallest side."""
    shared: dict[str, Any] = {"lr": LR, "rank": rank, "update_proj_gap": NEVER}
    share = rank / min(min(param.shape) for param in params)
    return [
        _refreshable(optim.GaLorePlus(params, residual_warmup=1, **shared)),
        _refreshable(optim.Fira(params, **shared)),
        _refreshable(optim.Frugal(params, lr=LR, density=share, update_proj_gap=NEVER)),
        Contender("OnlineSubspaceDescent", optim.OnlineSubspaceDescent(params, lr=LR, rank=rank)),
        Contender("Flora", optim.Flora(params, **shared)),
        Contender("Adafactor", optim.Adafactor(params, lr=LR)),
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


def eight_bit_peers(params: list[Tensor]) -> list[Contender]:
    """The 8-bit AdamW of bitsandbytes and of torchao, those that are installed."""
    found = []
    for name, module in (("bitsandbytes", "bitsandbytes.optim"), ("torchao", "torchao.optim")):
        try:
            build = importlib.import_module(module).AdamW8bit
        except ImportError:
            continue
        found.append(Contender(f"{name} AdamW8bit", build(params, lr=LR)))
    return found


def _refreshable(optimizer: Optimizer) -> Contender:
    def refresh() -> None:
        for state in optimizer.state.values():
            state["until_refresh"].zero_()

    return Contender(type(optimizer).__name__, optimizer, refresh)


def torch_adamw(params: list[Tensor]) -> list[Contender]:
    """torch.optim.AdamW in its three forms."""
    forms = {"loop": (False, False), "foreach": (True, False), "fused": (False, True)}
    return [
        Contender(f"torch AdamW {name}", AdamW(params, lr=LR, foreach=foreach, fused=fused))
        for name, (foreach, fused) in forms.items()
    ]


def galore_torch(params: list[Tensor], rank: int) -> Contender:
    """GaLoreAdamW of galore-torch.

    Raises:
        UserError: If galore-torch is not installed.
    """
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise UserError(f'--peers needs galore-torch ({error}): pip install "lowmem[peers]"') from error
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    optimizer: Optimizer = GaLoreAdamW([group], lr=LR, weight_decay=0.01, no_deprecation_warning=True)

    def refresh() -> None:
        for state in optimizer.state.values():
            state["step"] = 0  # it refreshes where the count divides the gap

    return Contender("galore-torch", optimizer, refresh)
