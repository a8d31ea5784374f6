"""One run in memory: its model, optimizer and batches, and what a checkpoint holds of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import RunConfig
from .data import Source
from .measure import peak_memory
from .models import build_model, model_config
from .optimizers import build_optimizer
from .rundir import Record

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)


@dataclass
class Job:
    """A run in memory."""

    config: RunConfig
    source: Source
    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    peaks: list[float]
    held_out: list[Tensor]
    start_memory: int
    peak_memory: int = 0

    def measure_peak(self) -> int:
        """Return the peak memory over all sessions of the run."""
        self.peak_memory = max(self.peak_memory, peak_memory(self.device))
        return self.peak_memory


def identity(config: RunConfig, source: Source) -> Record:
    """Return, as JSON values, all that the numbers of a run depend on beside code and hardware."""
    llama = model_config(config.model, source.vocab_size, config.length)
    shape = {key: getattr(llama, key, None) for key in SHAPE_KEYS}
    return {"config": config.to_json(), "model": shape, "data": source.identity}


def prepare(config: RunConfig, source: Source) -> Job:
    """Build the model and the optimizer on the device that there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_memory = peak_memory(device)
    model = build_model(
        config.model,
        source.vocab_size,
        max_length=config.length,
        dtype=TORCH_DTYPES[config.dtype],
        seed=config.seed,
        checkpointing=config.checkpointing,
    ).to(device)
    optimizer = build_optimizer(config.optimizer, config.options, model, config.seed)
    return Job(
        config=config,
        source=source,
        model=model,
        optimizer=optimizer,
        device=device,
        peaks=[group["lr"] for group in optimizer.param_groups],
        held_out=source.held_out_batches(config.eval_batches),
        start_memory=start_memory,
    )


def checkpoint(job: Job, done: int) -> Record:
    """Return all that the run goes on from, as plain tensors and values."""
    return {
        "step": done,
        "model": job.model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "peak_memory": job.measure_peak(),
    }


def restore(job: Job, state: Record | None) -> int:
    """Put a checkpoint back and return the number of steps that it had done."""
    if state is None:
        return 0
    job.model.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"].cpu())
    job.peak_memory = state["peak_memory"]
    return int(state["step"])
