"""Steps that are captured once and replayed are those that run: by a stand-in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lowmem import optim
from lowmem.optim import GraphedStep
from lowmem.optim.core.lifecycle import Lifecycle
from torch import Tensor
from torch.nn import Parameter

from tests.helpers import randn
from tests.recorder import CpuGraphs

SHAPES = ((24, 16), (16, 40), (32, 32), (24, 16), (7,), (3, 4, 5, 5))
GAP = 6

Build = Callable[..., Lifecycle]

METHODS: dict[str, Build] = {
    "galore": optim.GaLore,
    "galore lion": lambda params, **o: optim.GaLore(params, rule="lion", **o),
    "galore sgd, both sides": lambda params, **o: optim.GaLore(params, rule="sgd", proj_type="full", **o),
    "galore rmsprop, track": lambda params, **o: optim.GaLore(params, rule="rmsprop", projector="track", **o),
    "galore columns, rotate": lambda params, **o: optim.GaLore(params, projector="columns", **o),
    "galore entries": lambda params, **o: optim.GaLore(params, projector="randk", carry="reset", **o),
    "galore int8 bases": lambda params, **o: optim.GaLore(params, basis_dtype="int8", **o),
    "galore lazy, ascending": lambda params, **o: optim.GaLore(params, lazy=0.0, maximize=True, **o),
    "galore stagger": lambda params, **o: optim.GaLore(params, stagger=True, **o),
    "plain": lambda params, rank, **o: optim.GaLore(params, rank=None, **o),
    "plain, no form of torch": lambda params, rank, **o: optim.GaLore(params, rank=None, fused=False, **o),
    "plain lion": lambda params, rank, **o: optim.GaLore(params, rank=None, rule="lion", **o),
    "galore plus": lambda params, **o: optim.GaLorePlus(params, residual_warmup=2, residual_density=0.1, **o),
    "galore plus additive": lambda params, **o: optim.GaLorePlus(
        params, residual="additive", residual_warmup=2, residual_density=0.1, **o
    ),
    "galore plus, all entries": lambda params, **o: optim.GaLorePlus(params, residual_density=1.0, **o),
    "galore plus, no entries": lambda params, **o: optim.GaLorePlus(params, residual=None, **o),
    "fira": optim.Fira,
    "fira matrix": lambda params, **o: optim.Fira(params, scale_mode="matrix", gamma=None, **o),
    "apollo": optim.Apollo,
    "apollo mini": lambda params, rank, **o: optim.Apollo.mini(params, **o),
    "frugal columns": lambda params, rank, **o: optim.Frugal(params, density=0.25, **o),
    "frugal sketch": lambda params, **o: optim.Frugal(params, projector="sketch", **o),
    "frugal complement": lambda params, **o: optim.Frugal(params, projector="sketch", free_space="complement", **o),
    "frugal sgd": lambda params, **o: optim.Frugal(params, projector="sketch", free_rule="sgd", **o),
    "frugal blocks": lambda params, rank, **o: optim.Frugal(params, density=0.4, projector="blocks", **o),
    "badam": lambda params, rank, **o: optim.BAdam(params, density=0.4, block_by="tensor", **o),
    "descent": lambda params, update_proj_gap, **o: optim.OnlineSubspaceDescent(params, **o),
    "descent lion": lambda params, update_proj_gap, **o: optim.OnlineSubspaceDescent(params, proj_rule="lion", **o),
    "low rank norm": lambda params, **o: optim.LowRank(params, residual="norm", **o),
    "low rank signs": lambda params, **o: optim.LowRank(params, residual="signsgd", projector="columns", **o),
    "low rank channel": lambda params, **o: optim.LowRank(params, residual="channel", **o),
}


class Run:
    """An optimizer with gradients that stay where they are."""

    def __init__(self, build: Build, *, dtype: torch.dtype = torch.float32, graphed: bool = False, **options: Any):
        self.params = [Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
        options = {"rank": 4, "update_proj_gap": GAP, "lr": torch.tensor(1e-2), "capturable": True, **options}
        self.optimizer = build(self.params, **options)
        self.graphs = CpuGraphs(self.optimizer)
        self.step = GraphedStep(self.optimizer, graphs=self.graphs, warmup=1) if graphed else self.optimizer.step

    def feed(self, seed: int, skip: Sequence[int] = ()) -> None:
        """Copy new gradients in, or make them, for all parameters but some."""
        for i, param in enumerate(self.params):
            grad = randn(*param.shape, seed=1000 * seed + i, dtype=param.dtype)
            if i in skip:
                continue
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)

    def train(self, steps: int, start: int = 0, skip: Sequence[int] = ()) -> None:
        """Step with a learning rate that changes."""
        for number in range(start, start + steps):
            self.feed(number, skip)
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(1e-2 / (1 + number))
            self.step()

    def tensors(self) -> list[Tensor]:
        """Weights and state, counters of the host too."""
        held = (self.optimizer.state[param] for param in self.params)
        return [*self.params, *(value for state in held for _, value in sorted(state.items()))]


def assert_same(one: Run, other: Run) -> None:
    pairs = list(zip(one.tensors(), other.tensors(), strict=True))
    assert all(left.isfinite().all() or left.ndim == 0 for left, _ in pairs)
    for left, right in pairs:
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    assert [o["lr"] for o in one.optimizer.param_groups] == [o["lr"] for o in other.optimizer.param_groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)
def test_replayed_steps_are_those_that_run(build: Build, dtype: torch.dtype) -> None:
    eager, graphed = Run(build, dtype=dtype), Run(build, dtype=dtype, graphed=True)
    for start in range(0, 3 * GAP, GAP):
        eager.train(GAP, start)
        graphed.train(GAP, start)
        assert_same(eager, graphed)
    assert isinstance(graphed.step, GraphedStep)
    assert graphed.step.replays >= 3
