"""Gradient release: the same weights as ordinary steps, one gradient at a time."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

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


def batches(k: int, step: int) -> list[Tensor]:
    return [randn(6, 12, seed=100 * step + i) for i in range(k)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def test_micro_batches_are_accumulated_in_the_subspace_as_whole_gradients_would_be() -> None:
    k, found = 3, []
    for release in (False, True):
        model = Net().double()
        optimizer = GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)
        handle = enable_gradient_release(model, optimizer, accumulation_steps=k) if release else None
        for step in range(8):
            for index, batch in enumerate(batches(k, step)):
                (loss_of(model, batch.double()) / k).backward()
                kept = [layer.weight.grad for layer in model.layers]
                if (handle is not None and index == k - 1) or (handle is not None and step % 3):
                    assert all(grad is None for grad in kept)
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_parameters_that_miss_the_last_micro_batch_are_stepped_all_the_same() -> None:
    """Experts of a mixture get gradients in some micro-batches only."""
    found = []
    for release in (False, True):
        model = Net()
        optimizer = GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=2)
        if release:
            enable_gradient_release(model, optimizer, accumulation_steps=2)
        for step in range(4):
            first, second = batches(2, step)
            model(first).square().mean().backward()
            torch.tanh(model.layers[0](second)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_ends_a_cycle_early_as_at_the_end_of_an_epoch() -> None:
    model = Net()
    optimizer = GaLore(model.parameters(), lr=1e-2, rank=4)
    enable_gradient_release(model, optimizer, accumulation_steps=4)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, randn(6, 12)).backward()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("build", [Fira, Frugal, AdamW8bit, Adafactor], ids=lambda cls: cls.__name__)
def test_methods_that_need_whole_gradients_refuse_to_accumulate(build: Any) -> None:
    model = Net()
    options = {} if build in (AdamW8bit, Adafactor) else {"rank": 4}
    with pytest.raises(ValueError, match=f"{build.__name__} uses whole gradients in every step"):
        enable_gradient_release(model, build(model.parameters(), **options), accumulation_steps=2)


def test_parameters_unfrozen_or_added_later_are_released_too() -> None:
    model = Net()
    model.layers[1].requires_grad_(False)
    late = list(model.head.parameters())
    optimizer = GaLore([p for p in model.parameters() if p is not late[0]], lr=1e-2, rank=4)
    with enable_gradient_release(model, optimizer):
        loss_of(model, randn(6, 12)).backward()
        assert late[0].grad is not None
        model.layers[1].requires_grad_(True)
        optimizer.add_param_group({"params": late})
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, randn(6, 12)).backward()
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())


def test_a_model_whose_parameters_the_optimizer_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter of the Net is in the optimizer"):
        enable_gradient_release(Net(), GaLore(Net().parameters(), rank=4))


def test_step_one_of_a_stranger_is_refused_with_the_line_to_write() -> None:
    with pytest.raises(ValueError, match=r"does not have this \(3, 3\) parameter: add it"):
        GaLore(Net().parameters(), rank=4).step_one(nn.Parameter(randn(3, 3)))


def test_a_grad_scaler_is_refused_with_the_line_to_write() -> None:
    model = Net()
    optimizer = GaLore(model.parameters(), rank=4)
    scaler = torch.amp.GradScaler("cpu")
    with enable_gradient_release(model, optimizer):
        scaler.scale(loss_of(model, randn(6, 12))).backward()
        with pytest.raises(RuntimeError, match=r"GradScaler with gradient release: .* torch\.autocast"):
            scaler.step(optimizer)
    model.zero_grad()
    scaler.scale(loss_of(model, randn(6, 12))).backward()
    scaler.step(optimizer)


def test_a_graph_that_is_used_twice_is_refused() -> None:
    model = Net(tied=True)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model.head, checkpoint(model.layers[0], x, use_reentrant=True), use_reentrant=True)

    model.forward = forward  # type: ignore[method-assign]
    enable_gradient_release(model, GaLore(model.parameters(), rank=4))
    with pytest.raises(RuntimeError, match=r"second gradient after it was stepped.* use_reentrant=False"):
        model(randn(6, 12).requires_grad_()).sum().backward()


@pytest.mark.parametrize("clip_by", ["previous", "matrix"])
def test_gradients_are_clipped_and_their_norm_is_told(clip_by: str) -> None:
    most = 0.05
    model, twin = Net(), Net()
    optimizer, plain = (GaLore(net.parameters(), lr=1e-2, rank=4, rule="sgd") for net in (model, twin))
    handle = enable_gradient_release(model, optimizer, max_norm=most, clip_by=clip_by)
    assert handle.grad_norm is None
    last = None
    for step in range(5):
        batch = randn(6, 12, seed=step)
        loss_of(model, batch).backward()
        optimizer.step()
        loss_of(twin, batch).backward()
        norms = torch.stack([p.grad.norm() for p in twin.parameters()])
        total = norms.norm()
        torch.testing.assert_close(handle.grad_norm, total)
        own = clip_by == "matrix" or last is None
        for norm, param in zip(norms, twin.parameters(), strict=True):
            param.grad.mul_((most / ((norm if own else last) + 1e-6)).clamp(max=1.0))
        plain.step()
        plain.zero_grad()
        last = total
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    assert last is not None
    assert last > most


@pytest.mark.parametrize("options", [{"accumulation_steps": 0}, {"max_norm": -1.0}, {"clip_by": "norm"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    model = Net()
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
        enable_gradient_release(model, GaLore(model.parameters(), rank=4), **options)


def test_a_model_that_is_wrapped_in_ddp_later_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Net()
        enable_gradient_release(model, GaLore(model.parameters(), rank=4))
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match=r"averages its gradients after .* fully_shard\(model\)"):
            wrapped(randn(6, 12))
    finally:
        torch.distributed.destroy_process_group()


def cycle(optimizer: GaLore, model: nn.Module, step: int, k: int = 2) -> None:
    for batch in batches(k, step):
        (loss_of(model, batch) / k).backward()
    optimizer.step()
    optimizer.zero_grad()


def released(**options: Any) -> tuple[Net, GaLore, Any]:
    model = Net()
    optimizer = GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)
    return model, optimizer, enable_gradient_release(model, optimizer, **options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_handle_that_is_removed_in_the_middle_of_a_step_leaves_gradients() -> None:
    model, optimizer, handle = released(accumulation_steps=2)
    twin, plain, kept = released(accumulation_steps=2)
    for one, of in ((optimizer, model), (plain, twin)):
        cycle(one, of, 0)
    first, second = batches(2, 1)
    for net in (model, twin):
        (loss_of(net, first) / 2).backward()
    handle.remove()
    for net in (model, twin):
        (loss_of(net, second) / 2).backward()
    for one in (optimizer, plain):
        one.step()
    assert_same(model, twin)
    optimizer.zero_grad()
    assert not optimizer._low_grads
    kept.remove()


def test_a_batch_that_is_given_up_is_forgotten() -> None:
    model, optimizer, _ = released(accumulation_steps=2)
    twin, plain, _ = released(accumulation_steps=2)
    for one, of in ((optimizer, model), (plain, twin)):
        cycle(one, of, 0)
    (100 * loss_of(model, randn(6, 12))).backward()
    optimizer.zero_grad()
    for one, of in ((optimizer, model), (plain, twin)):
        cycle(one, of, 1)
    assert_same(model, twin)


def test_closures_end_a_step_after_they_have_run() -> None:
    """Lightning steps with a closure in the last micro-batch alone."""
    model, optimizer, _ = released(accumulation_steps=2)
    twin, plain, _ = released(accumulation_steps=2)
    for step in range(4):
        first, second = batches(2, step)
        (loss_of(model, first) / 2).backward()
        optimizer.step(lambda second=second: (loss_of(model, second) / 2).backward())
        optimizer.zero_grad()
        cycle(plain, twin, step)
    assert_same(model, twin)


def test_two_calls_under_reentrant_checkpointing_are_refused() -> None:
    model = Net()
    enable_gradient_release(model, GaLore(model.parameters(), rank=4))
    x = randn(6, 12).requires_grad_()
    loss = sum(checkpoint(model, x, use_reentrant=True).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="second gradient after it was stepped"):
        loss.backward()


def test_a_second_handle_is_refused_and_a_first_one_survives_loading() -> None:
    model, optimizer, handle = released()
    with pytest.raises(ValueError, match="released already"):
        enable_gradient_release(model, optimizer)
    loss_of(model, randn(6, 12)).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.release is not None
    handle.remove()
    assert optimizer.release is None


def test_open_ranks_that_come_later_are_not_stepped_alone() -> None:
    model = Net()
    optimizer = GaLore(list(model.layers.parameters()), rank=4)
    enable_gradient_release(model, optimizer)
    optimizer.add_param_group({"params": list(model.head.parameters()), "rank": "auto", "energy": 0.9})
    with pytest.raises(RuntimeError, match="cannot be stepped alone: rank='auto' chooses ranks from all gradients"):
        loss_of(model, randn(6, 12)).backward()


def test_groups_that_change_places_keep_their_rates() -> None:
    model = Net()
    groups = [{"params": list(model.layers.parameters()), "lr": 0.0}, {"params": list(model.head.parameters())}]
    optimizer = GaLore(groups, lr=1e-2)
    with enable_gradient_release(model, optimizer):
        loss_of(model, randn(6, 12)).backward()
        optimizer.param_groups.reverse()
        before = model.layers[0].weight.detach().clone()
        loss_of(model, randn(6, 12)).backward()
        assert torch.equal(model.layers[0].weight, before)


@pytest.mark.parametrize("clip_by", ["previous", "matrix"])
def test_a_run_resumes_in_the_middle_of_a_step_to_the_bit(clip_by: str) -> None:
    model, optimizer, handle = released(accumulation_steps=2, max_norm=0.1, clip_by=clip_by)
    cycle(optimizer, model, 0)
    first, second = batches(2, 1)
    (loss_of(model, first) / 2).backward()
    twin, again, other = released(accumulation_steps=2, max_norm=0.1, clip_by=clip_by)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    other.load_state_dict(handle.state_dict())
    for net, one in ((model, optimizer), (twin, again)):
        (loss_of(net, second) / 2).backward()
        one.step()
        one.zero_grad()
        cycle(one, net, 2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True))


def test_loading_in_the_middle_of_a_step_drops_whole_gradients_too() -> None:
    model, optimizer, _ = released(accumulation_steps=2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    (100 * loss_of(model, randn(6, 12))).backward()
    optimizer.load_state_dict(saved)
    twin, plain, _ = released(accumulation_steps=2)
    twin.load_state_dict(weights)
    for one, of in ((optimizer, model), (plain, twin)):
        cycle(one, of, 0)
    assert_same(model, twin)


def test_a_handle_saved_between_backward_and_step_knows_the_norm() -> None:
    model, optimizer, handle = released(max_norm=0.1)
    loss_of(model, randn(6, 12)).backward()
    twin, again, other = released(max_norm=0.1)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    other.load_state_dict(handle.state_dict())
    assert other.grad_norm == handle.grad_norm
    for net, one in ((model, optimizer), (twin, again)):
        one.step()
        loss_of(net, randn(6, 12, seed=3)).backward()
        one.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="accumulation_steps=1, this one 2"):
        released(accumulation_steps=2)[2].load_state_dict(handle.state_dict())


def test_a_copied_model_trains_nothing() -> None:
    model, optimizer, _ = released()
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in twin.parameters()]
    loss_of(twin, randn(6, 12)).backward()
    assert all(torch.equal(p, old) for p, old in zip(twin.parameters(), before, strict=True))
    assert all(p.grad is not None for p in twin.parameters())
    loss_of(pickle.loads(pickle.dumps(model)), randn(6, 12)).backward()
    assert not optimizer.state


def test_a_step_without_gradient_does_not_switch_clipping_off() -> None:
    model, _, handle = released(max_norm=1e-3)
    (0 * loss_of(model, randn(6, 12))).backward()
    before = [p.detach().clone() for p in model.parameters()]
    (1e6 * loss_of(model, randn(6, 12))).backward()
    assert float(handle.grad_norm) > 1e3
    for param, old in zip(model.parameters(), before, strict=True):
        assert (param - old).abs().max() < 0.1


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


def test_copies_of_parameters_that_nobody_would_average_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = GaLore(model[0].parameters(), rank=2)
    with pytest.raises(ValueError, match=r"a parameter '1\.weight' that is not in the optimizer"):
        enable_gradient_release(model, optimizer, replicas=cast(Any, "any group"))
