"""Settings of the whole process that change nothing: the default dtype and device, deterministic algorithms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from lowmem.bench.models import default_dtype
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Apollo,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLoreAdamW8bit,
    GaLorePlus,
    LowRank,
    OnlineSubspaceDescent,
)
from torch import Tensor, nn

from tests.helpers import randn

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((80, 64), (64, 80), (9,))


def default_device() -> AbstractContextManager[Any]:
    """As after `torch.set_default_device`, of a device that holds nothing."""
    return torch.device("meta")


@contextmanager
def deterministic() -> Iterator[None]:
    """In which torch fills memory that is not written with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": partial(default_dtype, torch.float64),
    "bfloat16": partial(default_dtype, torch.bfloat16),
    "device": default_device,
    "deterministic": deterministic,
}

CASES: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "galore": (GaLore, F32, {"rank": 4}),
    "galore_bf16": (GaLore, BF16, {"rank": 4, "rounding": "stochastic", "state_dtype": "bfloat16"}),
    "galore_8bit": (GaLore, F32, {"rank": 60, "state_dtype": "8bit", "basis_dtype": "int8"}),
    "galore_auto": (GaLore, F32, {"rank": "auto", "energy": 0.5, "budget": 30_000}),
    "galore_official": (GaLore, F32, {"rank": 4, "compat": "official"}),
    "galore_on_device": (GaLore, F32, {"rank": 4, "capturable": True}),
    "galore_random": (GaLore, F32, {"rank": 4, "projector": "random", "weight_norm": True}),
    "bnb8": (GaLoreAdamW8bit, F32, {"rank": None}),
    "adamw_8bit": (AdamW8bit, BF16, {"rounding": "compensated"}),
    "apollo": (Apollo, F32, {"rank": 4}),
    "fira": (Fira, F32, {"rank": 4, "projector": "dct"}),
    "frugal": (Frugal, BF16, {"density": 0.3, "projector": "randk"}),
    "heads": (GaLorePlus, F32, {"rank": 4, "num_heads": 4, "head_select": "max_norm", "residual_warmup": 2}),
    "all_entries": (GaLorePlus, BF16, {"rank": 4, "residual_density": 1.0, "rounding": "compensated"}),
    "lowrank": (LowRank, F32, {"rank": 4, "residual": "additive", "residual_warmup": 1}),
    "online": (OnlineSubspaceDescent, F32, {"rank": 4}),
    "adafactor": (Adafactor, BF16, {"lr": 1e-3, "beta1": 0.9, "rounding": "compensated8"}),
    "flora_rademacher": (Flora, F32, {"lr": 1e-3, "rank": 4}),
    "flora_gaussian": (Flora, F32, {"lr": 1e-3, "rank": 4, "distribution": "gaussian"}),
    "flora_orthonormal": (Flora, BF16, {"lr": 1e-3, "rank": 4, "distribution": "orthonormal"}),
}


def forget_tables() -> None:
    """Tables are made once a process: let them be made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lowmem."):
            for member in vars(module).values():
                getattr(member, "cache_clear", lambda: None)()


def steps(name: str, setting: Callable[[], AbstractContextManager[Any]] | None = None) -> Iterator[list[Tensor]]:
    """Weights and state after every step; all but construction and gradients is done under the setting."""
    build, dtype, options = CASES[name]
    params = [nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    optimizer = build(params, **options)
    for seed in range(5):
        for i, param in enumerate(params):
            param.grad = randn(*param.shape, seed=10 * seed + i, dtype=dtype)
        if setting is None:
            optimizer.step()
        else:
            with setting():
                optimizer.step()
        yield [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_settings_of_the_process_change_nothing(name: str, setting: str) -> None:
    forget_tables()
    try:
        seen = list(steps(name, SETTINGS[setting]))
        after = list(islice(steps(name), 3))  # with the tables that were made under the setting
    finally:
        forget_tables()
    for one, other in zip((*seen, *after), (*(usual := list(steps(name))), *usual[:3]), strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
