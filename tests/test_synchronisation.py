"""No step between two refreshes waits for the device.

Parameters on the meta device have no values, so that a step which asks for one, as `.item()`, `if tensor`, `nonzero` or
a copy to the host do, fails there. Code that asks a CPU, where asking is free, does not ask this device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem import optim
from lowmem.optim.core.lifecycle import Lifecycle
from lowmem.optim.core.state import zeros

SHAPES = ((24, 16), (16, 40), (32, 32), (7,), (3, 4, 5, 5))
GAP = 1000

METHODS: dict[str, Callable[..., Lifecycle]] = {
    "galore": optim.GaLore,
    "galore plus": lambda params, **options: optim.GaLorePlus(params, residual_warmup=1, **options),
    "fira": optim.Fira,
    "apollo": optim.Apollo,
    "apollo mini": lambda params, rank, **options: optim.Apollo.mini(params, **options),
    "frugal columns": lambda params, rank, **options: optim.Frugal(params, density=0.25, **options),
    "frugal sketch": lambda params, **options: optim.Frugal(params, projector="sketch", **options),
    "descent": lambda params, update_proj_gap, **options: optim.OnlineSubspaceDescent(params, **options),
    "flora": optim.Flora,
    "adafactor": lambda params, rank, update_proj_gap, **options: optim.Adafactor(params, **options),
    "adamw 8 bit": lambda params, rank, update_proj_gap, **options: optim.AdamW8bit(params, **options),
    "low rank": lambda params, **options: optim.LowRank(params, residual="norm", **options),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "ascending, tensor rate": {"maximize": True, "lr": torch.tensor(1e-3)},
    "decay": {"weight_decay": 0.1},
    "bf16 moments": {"state_dtype": "bfloat16"},
    "stochastic": {"rounding": "stochastic"},
    "compensated": {"rounding": "compensated"},
}
CAPTURABLE = {name: OPTIONS[name] for name in ("usual", "ascending, tensor rate", "decay", "compensated")}
COUNTS = ("step", "residual_step", "basis_step")
COUNTS_ON_HOST = {"flora", "adafactor", "adamw 8 bit"}


def between_refreshes(optimizer: Lifecycle, params: list[torch.nn.Parameter]) -> None:
    """Make the state that there is after some steps, with bases and without a refresh that is due."""
    for plan in optimizer._planned():
        for param in plan.params:
            held = optimizer.state[param] = zeros(optimizer._specs_to_load(param, plan.view, plan.group))
            for name, value in {
                "step": 30,
                "residual_step": 30,
                "residual_warmup_step": 1,
                "until_refresh": 100,
                "refreshes": 1,
            }.items():
                if name in held:
                    held[name].fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)
def test_a_step_asks_the_device_for_nothing(
    build: Callable[..., Lifecycle], options: dict[str, Any], dtype: torch.dtype
) -> None:
    optimizer = stepped(build, dtype, **options)
    assert all(int(held["step"]) == 33 for held in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CAPTURABLE.values(), ids=CAPTURABLE)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in COUNTS_ON_HOST])
def test_a_capturable_step_asks_for_its_count_neither(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    optimizer = stepped(METHODS[name], dtype, capturable=True, **options)
    counts = [value for held in optimizer.state.values() for key, value in held.items() if key in COUNTS]
    assert len(counts) >= len(SHAPES)
    assert all(count.is_meta for count in counts)


def stepped(build: Callable[..., Lifecycle], dtype: torch.dtype, **options: Any) -> Lifecycle:
    """An optimizer after three steps between refreshes."""
    params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    optimizer = build(params, rank=4, update_proj_gap=GAP, **options)
    between_refreshes(optimizer, params)
    for _ in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "ask",
    [lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t.nonzero(), lambda t: t.cpu()],
    ids=["item", "if", "nonzero", "copy"],
)
def test_asking_this_device_fails(ask: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.empty(3, device="meta"))
