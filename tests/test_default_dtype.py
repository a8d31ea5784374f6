"""torch.set_default_dtype, which frameworks set around training steps, is that of new models and not of our numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lowmem import optim
from lowmem.kernels import blockwise, random
from torch import Tensor, nn

from tests.helpers import randn

SHAPES = ((160, 96), (96, 160), (40,))
CACHES = (
    random.quantiles,
    random._byte_signs,
    random._cosines,
    random.angles,
    blockwise.dynamic_map,
    blockwise.borders,
)

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def build(name: str, **options: Any) -> Build:
    return lambda params: getattr(optim, name)(params, lr=1e-2, **options)


BUILDS: dict[str, Build] = {
    "galore": build("GaLore", rank=24, update_proj_gap=2),
    "galore, 8 bits": build("GaLore", rank=48, update_proj_gap=2, state_dtype="8bit", rounding="stochastic"),
    "galore, bnb8": build("GaLore", rank=48, update_proj_gap=2, state_dtype="bnb8", basis_dtype="int8"),
    "galore, lion in 8 bits": build("GaLore", rank=48, update_proj_gap=2, state_dtype="8bit", rule="lion"),
    "galore, auto": build("GaLore", rank="auto", energy=0.9, update_proj_gap=2),
    "galore, dct": build("GaLore", rank=24, update_proj_gap=2, projector="dct"),
    "galore, on the device": build("GaLore", rank=24, update_proj_gap=2, capturable=True),
    "fira": build("Fira", rank=24, update_proj_gap=2),
    "apollo": build("Apollo", rank=24, update_proj_gap=2),
    "frugal": build("Frugal", density=0.25, update_proj_gap=2),
    "online": build("OnlineSubspaceDescent", rank=24),
    "flora": build("Flora", rank=24, update_proj_gap=30),
    "adamw, 8 bits": build("AdamW8bit", rounding="compensated"),
    "adafactor": build("Adafactor"),
    "galore_adamw": build("GaLoreAdamW", rank=24, update_proj_gap=2),
}


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    for cached in CACHES:
        cached.cache_clear()
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)
    for cached in CACHES:
        cached.cache_clear()


def train(make: Build, dtype: torch.dtype, default: torch.dtype) -> list[Tensor]:
    """Weights and state after five steps; made and stepped under a default dtype."""
    params = [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]
    grads = [[randn(*shape, seed=10 * step + i).to(dtype) for i, shape in enumerate(SHAPES)] for step in range(5)]
    torch.set_default_dtype(default)
    optimizer = make(params)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    torch.set_default_dtype(torch.float32)
    held = [optimizer.state[param] for param in params]
    return [*params, *(value for state in held for value in state.values() if isinstance(value, Tensor))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BUILDS)
def test_the_default_dtype_changes_no_bit(name: str, dtype: torch.dtype, default: torch.dtype) -> None:
    found = train(BUILDS[name], dtype, default)  # first, for tables are made once
    expected = train(BUILDS[name], dtype, torch.float32)
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    assert all(map(torch.equal, found, expected))
