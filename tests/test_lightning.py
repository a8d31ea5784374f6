"""Lightning: automatic and manual optimization, schedules, clipping, checkpoints."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lowmem.optim import Adafactor, Fira, Flora, Frugal, GaLore, enable_gradient_release, param_groups
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from tests.tiny import assert_equal, llama, rows

LR, STEPS, DECAY = 1e-2, 6, 0.9
OPTIMIZERS: dict[str, Any] = {
    "galore 8bit": lambda model: GaLore(
        param_groups(model, rank=32, update_proj_gap=4), lr=LR, state_dtype="8bit", rounding="compensated"
    ),
    "fira": lambda model: Fira(param_groups(model, rank=16, update_proj_gap=4), lr=LR),
    "frugal": lambda model: Frugal(param_groups(model, density=0.25, update_proj_gap=4), lr=LR / 10),
    "flora": lambda model: Flora(param_groups(model, rank=16), lr=LR),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=LR),
}


class Module(lightning.LightningModule):
    def __init__(self, build: Any, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> None:
        super().__init__()
        self.model, self.build, self.losses = llama(seed, dtype), build, []

    def configure_optimizers(self) -> Any:
        optimizer = self.build(self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, DECAY), "interval": "step"},
        }

    def training_step(self, inputs: Any, index: int) -> torch.Tensor:
        loss = self.model(**inputs).loss
        self.losses.append(loss.item())
        return loss


class Manual(Module):
    """Steps by hand, with a closure where it is told so."""

    def __init__(self, *args: Any, closure: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization, self.closure = False, closure

    def training_step(self, inputs: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            loss = super(Manual, self).training_step(inputs, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            return loss

        if self.closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        self.lr_schedulers().step()


class Released(Module):
    """Lightning's own loop with every parameter stepped in the backward pass; `step` finds nothing to do."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        self.handle = enable_gradient_release(self.model, found["optimizer"])
        return found


def fit(module: Module, folder: Path, steps: int = STEPS, resume: str | None = None, **options: Any) -> Any:
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(rows(2 * STEPS), batch_size=2), ckpt_path=resume)
    return trainer


def by_hand(
    build: Any, clip: float | None = None, accumulate: int = 1
) -> tuple[Any, torch.optim.Optimizer, list[float]]:
    """The same training as a plain loop."""
    model, losses = llama(), []
    optimizer = build(model)
    for index, inputs in enumerate(DataLoader(rows(2 * STEPS), batch_size=2)):
        loss = model(**inputs).loss
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (index + 1) % accumulate == 0:
            if clip is not None:
                held = [param for group in optimizer.param_groups for param in group["params"]]  # Lightning's order
                torch.nn.utils.clip_grad_norm_(held, clip)
            optimizer.step()
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * DECAY
    return model, optimizer, losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_automatic_optimization_is_a_plain_loop(name: str, accumulate: int, tmp_path: Path) -> None:
    """Lightning steps with a closure that does forward and backward, once; peers run closures without gradients."""
    module = Module(OPTIMIZERS[name])
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": accumulate}
    trainer = fit(module, tmp_path, STEPS // accumulate, **options)
    model, optimizer, losses = by_hand(OPTIMIZERS[name], 0.5, accumulate)
    assert module.losses == losses
    assert losses[-1] < losses[1]  # of the same batch
    assert_equal(module.model.state_dict(), model.state_dict())
    assert_equal(trainer.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("closure", [False, True])
def test_manual_optimization_is_a_plain_loop(closure: bool, tmp_path: Path) -> None:
    module = Manual(OPTIMIZERS["fira"], closure=closure)
    fit(module, tmp_path)
    model, _, losses = by_hand(OPTIMIZERS["fira"], 0.5)
    assert module.losses == losses
    assert_equal(module.model.state_dict(), model.state_dict())


def test_released_gradients_in_lightnings_own_loop(tmp_path: Path) -> None:
    module = Released(OPTIMIZERS["fira"])
    fit(module, tmp_path)
    model, _, losses = by_hand(OPTIMIZERS["fira"])
    assert module.losses == losses
    assert_equal(module.model.state_dict(), model.state_dict())
    assert all(param.grad is None for param in module.parameters())


def test_the_logged_rate_is_the_schedules(tmp_path: Path) -> None:
    module = Module(OPTIMIZERS["galore 8bit"])
    logger = CSVLogger(str(tmp_path))
    fit(module, tmp_path, logger=logger, callbacks=[LearningRateMonitor("step")])
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as table:
        rates = [float(row["lr-GaLore/pg1"]) for row in csv.DictReader(table)]
    assert rates == pytest.approx([LR * DECAY**step for step in range(STEPS)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        module = Module(OPTIMIZERS[name], torch.bfloat16, seed=int(resume))
        saving = ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=2, save_top_k=-1)
        options = {} if resume else {"enable_checkpointing": True, "callbacks": [saving]}
        trainer = fit(module, tmp_path, resume=str(tmp_path / "step=2.ckpt") if resume else None, **options)
        found.append((module.model.state_dict(), trainer.optimizers[0].state_dict(), module.losses[-4:]))
    assert len(module.losses) == STEPS - 2
    assert_equal(*found)
