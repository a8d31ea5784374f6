"""Accelerate: prepared optimizers, accumulation, clipping, saved states."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration
from lowmem.optim import (
    Adafactor,
    AdamW8bit,
    Fira,
    Flora,
    Frugal,
    GaLore,
    GaLorePlus,
    SubspaceAccumulator,
    convert_state,
    enable_gradient_release,
    full_precision_state_dict,
    param_groups,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests.tiny import assert_equal, batch, llama, rows

LR = 1e-2
OPTIMIZERS: dict[str, Any] = {
    "galore": lambda model: GaLore(param_groups(model, rank=32, update_proj_gap=3), lr=LR),
    "galore 8bit": lambda model: GaLore(
        param_groups(model, rank=32, update_proj_gap=3), lr=LR, state_dtype="8bit", rounding="stochastic"
    ),
    "galore int4 compensated": lambda model: GaLore(
        param_groups(model, rank=32, update_proj_gap=3), lr=LR, basis_dtype="int4", rounding="compensated"
    ),
    "fira bnb8": lambda model: Fira(param_groups(model, rank=32, update_proj_gap=3), lr=LR, state_dtype="bnb8"),
    "galore+": lambda model: GaLorePlus(param_groups(model, rank=16, update_proj_gap=3), lr=LR, residual_warmup=2),
    "frugal": lambda model: Frugal(param_groups(model, density=0.25, update_proj_gap=3), lr=LR),
    "flora": lambda model: Flora(param_groups(model, rank=16), lr=LR),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=LR),
    "adamw 8bit": lambda model: AdamW8bit(model.parameters(), lr=LR),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Accelerate's states are shared by all accelerators of a process, the Trainer's of other tests too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator(folder: Path | None = None, **options: Any) -> Accelerator:
    config = None if folder is None else ProjectConfiguration(project_dir=str(folder))
    return Accelerator(cpu=True, project_config=config, **options)


def stepped(name: str, steps: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, torch.optim.Optimizer]:
    model = llama(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preparing_changes_neither_state_nor_dtypes(name: str, steps: int) -> None:
    """Preparing loads the optimizer's own state dict, by which torch casts all state to bf16 (torchao#3314)."""
    model, optimizer = stepped(name, steps)
    before = deepcopy(optimizer.state_dict())
    prepared_model, prepared = accelerator().prepare(model, optimizer)
    assert_equal(prepared.state_dict(), before)
    twin_model, twin = stepped(name, steps)
    train(prepared_model, prepared, range(steps, steps + 3))
    train(twin_model, twin, range(steps, steps + 3))
    assert_equal(prepared.state_dict(), twin.state_dict())
    assert_equal(model.state_dict(), twin_model.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_save_state_and_load_state_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        fast = accelerator(tmp_path)
        model = llama(seed=int(resume), dtype=torch.bfloat16)
        optimizer = OPTIMIZERS[name](model)
        model, optimizer, scheduler = fast.prepare(model, optimizer, LambdaLR(optimizer, lambda step: 0.9**step))
        if resume:
            fast.load_state(str(tmp_path / "saved"))
        for step in range(4 if resume else 0, 7):
            if step == 4 and not resume:
                fast.save_state(str(tmp_path / "saved"))
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
        found.append((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert_equal(*found)


def test_accumulation_clipping_and_schedule_are_those_of_a_plain_loop() -> None:
    fast = accelerator(gradient_accumulation_steps=2)
    model = llama()
    optimizer = GaLore(param_groups(model, rank=16), lr=LR)
    loader = DataLoader(rows(16), batch_size=2)
    batches = list(loader)
    prepared = fast.prepare(model, optimizer, loader, LambdaLR(optimizer, lambda step: 0.9**step))
    model, optimizer, loader, scheduler = prepared
    norms, rates = [], []
    for inputs in loader:
        with fast.accumulate(model):
            fast.backward(model(**inputs).loss)
            if fast.sync_gradients:
                norms.append(fast.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates.append(scheduler.get_last_lr()[0])
            assert not fast.optimizer_step_was_skipped
    twin = llama()
    plain = GaLore(param_groups(twin, rank=16), lr=LR)
    expected = []
    for index, inputs in enumerate(batches):
        (twin(**inputs).loss / 2).backward()
        if index % 2:
            expected.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
            plain.step()
            plain.zero_grad()
            for group in plain.param_groups:
                group["lr"] *= 0.9
    assert_equal(norms, expected)
    assert min(norms) > 0.5  # all were clipped
    assert rates == pytest.approx([LR * 0.9 ** ((index + 1) // 2) for index in range(8)])
    assert_equal(model.state_dict(), twin.state_dict())


def test_a_prepared_optimizer_is_pickled_with_its_state() -> None:
    model, optimizer = accelerator().prepare(*stepped("galore 8bit", 4))
    optimizer.eval()
    optimizer.train()
    copied_model, copied = pickle.loads(pickle.dumps((model, optimizer)))
    assert_equal(copied.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(4, 7))
    train(copied_model, copied, range(4, 7))
    assert_equal(copied.state_dict(), optimizer.state_dict())
    assert_equal(copied_model.state_dict(), model.state_dict())


def test_what_needs_the_optimizer_itself_asks_a_prepared_one_for_it() -> None:
    model, optimizer = accelerator().prepare(*stepped("galore", 1))
    asks = "of a wrapper pass wrapper.optimizer"
    with pytest.raises(TypeError, match=asks):
        enable_gradient_release(model, optimizer)
    with pytest.raises(TypeError, match=asks):
        full_precision_state_dict(model, optimizer)
    with pytest.raises(TypeError, match=asks):
        convert_state(optimizer.state_dict(), optimizer)
    with pytest.raises(ValueError, match=asks):
        SubspaceAccumulator(optimizer)
    handle = enable_gradient_release(model, optimizer.optimizer)
    train(model, optimizer, range(1, 4))
    handle.remove()
    twin, plain = stepped("galore", 4)
    assert_equal(model.state_dict(), twin.state_dict())
    assert_equal(optimizer.state_dict(), plain.state_dict())


def test_closures_and_sets_to_none_pass_through() -> None:
    fast = accelerator()
    model, optimizer = fast.prepare(*stepped("galore", 1))

    def closure() -> torch.Tensor:
        loss = model(**batch(0)).loss
        loss.backward()
        return loss

    before = model(**batch(0)).loss.item()
    optimizer.step(closure)
    optimizer.zero_grad(set_to_none=False)
    assert model(**batch(0)).loss.item() < before
    assert all(not param.grad.any() for param in model.parameters())
