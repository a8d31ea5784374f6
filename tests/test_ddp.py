"""Replicas that reduce R instead of gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lowmem.optim import Fira, GaLore, SubspaceReduction
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import randn

WORLD, STEPS = 2, 8


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12)).double()


def optimizer_of(model: nn.Module) -> GaLore:
    return GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def batch(step: int, rank: int) -> Tensor:
    return randn(6, 24, seed=10 * step + rank, dtype=torch.float64)


def replica(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    model = DistributedDataParallel(net())
    optimizer = optimizer_of(model)
    model.register_comm_hook(SubspaceReduction(optimizer), SubspaceReduction.reduce)
    sent: list[int] = []
    run = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return run(tensor, *args, **options)

    dist.all_reduce = counted
    elements = []
    for step in range(STEPS):
        sent.clear()
        loss_of(model, batch(step, rank)).backward()
        elements.append(sum(sent))
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"weights": model.module.state_dict(), "sent": elements}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_replicas_that_send_r_follow_the_run_of_whole_gradients(tmp_path: Path) -> None:
    mp.spawn(replica, (tmp_path,), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    model = net()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for rank in range(WORLD):
            (loss_of(model, batch(step, rank)) / WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-9, atol=1e-10)
        assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])
    whole = 24 * 40 + 40 + 40 * 12 + 12
    low = 4 * 40 + 40 + 4 * 40 + 12
    assert found[0]["sent"] == [whole if step % 3 == 0 else low for step in range(STEPS)]


def test_methods_that_need_whole_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="Fira uses whole gradients in every step"):
        SubspaceReduction(Fira(net().parameters(), rank=4))
