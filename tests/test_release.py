"""Gradient release: the same weights as ordinary steps, one gradient at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    BAdam,
    Fira,
    Frugal,
    GaLore,
    enable_gradient_release,
    full_precision_state_dict,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import randn


class Net(nn.Module):
    def __init__(self, *, tied: bool = False, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 12, bias=False)
        self.recompute = recompute
        if tied:
            self.head.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = torch.tanh(x)
        return self.head(x)


def losses(model: Net, optimizer: torch.optim.Optimizer, steps: int = 9) -> list[float]:
    found = []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for seed in range(steps):
        loss = (model(randn(6, 12, seed=seed)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("build", [GaLore, Fira, Frugal, AdamW8bit, Adafactor], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("net", [{}, {"tied": True}, {"recompute": True}], ids=["plain", "tied", "recomputed"])
def test_released_steps_are_ordinary_steps(build: Any, net: dict[str, bool]) -> None:
    options = {} if build in (AdamW8bit, Adafactor) else {"rank": 4, "update_proj_gap": 3}
    found = []
    for release in (False, True):
        model = Net(**net)
        optimizer = build(model.parameters(), lr=1e-2, **options)
        if release:
            enable_gradient_release(model, optimizer)
        found.append((losses(model, optimizer), optimizer.state_dict()["state"]))
    assert found[0][0] == found[1][0]
    assert found[0][0][-1] < found[0][0][0]
    for key, held in found[0][1].items():
        assert all(torch.equal(value, found[1][1][key][name]) for name, value in held.items())


def test_gradients_are_gone_as_soon_as_they_are_used() -> None:
    model, alive = Net(), []
    optimizer = GaLore(model.parameters(), rank=4)
    with enable_gradient_release(model, optimizer):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
            )
        model(randn(6, 12)).sum().backward()
    assert max(alive) <= 1
    assert all(param.grad is None for param in model.parameters())


def test_after_removal_gradients_stay_and_step_is_due() -> None:
    model = Net()
    optimizer = GaLore(model.parameters(), rank=4)
    handle = enable_gradient_release(model, optimizer)
    handle.remove()
    before = model.head.weight.detach().clone()
    model(randn(6, 12)).sum().backward()
    assert model.head.weight.grad is not None
    assert torch.equal(model.head.weight, before)


def test_what_needs_all_gradients_at_once_is_refused() -> None:
    model = Net()
    with pytest.raises(TypeError, match="got a SGD: gradient release needs"):
        enable_gradient_release(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank='auto' chooses ranks from all gradients"):
        enable_gradient_release(model, GaLore(model.parameters(), rank="auto", energy=0.9))
    matrices = BAdam([(name, p) for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers")])
    with pytest.raises(ValueError, match="projector='blocks' counts the steps of a group"):
        enable_gradient_release(model, matrices)


def test_weights_in_fp32_are_saved_from_bf16_with_corrections() -> None:
    model = Net(tied=True).to(torch.bfloat16)
    optimizer = GaLore(model.parameters(), lr=1e-3, rank=4, rounding="compensated")
    for seed in range(3):
        model(randn(6, 12, seed=seed).bfloat16()).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = full_precision_state_dict(model, optimizer)
    assert saved.keys() == model.state_dict().keys()
    for name, value in saved.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.bfloat16(), model.state_dict()[name])
    assert any((value != value.bfloat16().float()).any() for value in saved.values())
    Net(tied=True).load_state_dict(saved)
