"""One run in memory: its model, optimizer and batches, and what a checkpoint holds of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import RunConfig
from .data import Source
from .errors import UserError, one_line
from .measure import peak_memory
from .models import build_model, model_config
from .optimizers import build_optimizer, run_options
from .parallel import Ranks
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
    ranks: Ranks
    peak_memory: int = 0

    def measure_peak(self) -> int:
        """Return the peak memory of this process, or of any that was in an earlier session of the run."""
        self.peak_memory = max(self.peak_memory, peak_memory(self.device))
        return self.peak_memory


def identity(config: RunConfig, source: Source) -> Record:
    """Return, as JSON values, all that the numbers of a run depend on beside code and hardware."""
    llama = model_config(config.model, source.vocab_size, config.length)
    shape = {key: getattr(llama, key, None) for key in SHAPE_KEYS}
    return {"config": config.to_json(), "model": shape, "data": source.identity}


def prepare(config: RunConfig, source: Source, ranks: Ranks) -> Job:
    """Build the model and the optimizer on the device that there is, shared out over the ranks."""
    device = ranks.device
    start_memory = peak_memory(device)
    build = partial(
        build_model,
        config.model,
        source.vocab_size,
        max_length=config.length,
        dtype=TORCH_DTYPES[config.dtype],
        seed=config.seed,
        checkpointing=config.checkpointing,
    )
    known, options = run_options(config.optimizer), dict(config.options)
    model = ranks.put(build, projected="rank" in known)
    if ranks.mode == "ddp" and "replicas" in known:
        options["replicas"] = dist.group.WORLD
    if ranks.readers > 1:  # what the model drops differs as its batches do
        torch.manual_seed(config.seed + (ranks.rank << 32))
    optimizer = build_optimizer(config.optimizer, options, getattr(model, "module", model), config.seed)
    if ranks.size > 1 and hasattr(optimizer, "summary"):
        _check_sharded(config.optimizer, optimizer)
    return Job(
        config=config,
        source=source,
        model=model,
        optimizer=optimizer,
        device=device,
        peaks=[group["lr"] for group in optimizer.param_groups],
        held_out=source.held_out_batches(config.eval_batches),
        start_memory=start_memory,
        ranks=ranks,
    )


def _check_sharded(name: str, optimizer: Any) -> None:
    """Refuse before the first step what the optimizer cannot shard, and not in it."""
    try:
        optimizer.summary()
    except NotImplementedError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
