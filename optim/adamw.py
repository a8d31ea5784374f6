"""AdamW with moments in 8 bits and weights that may be bf16 (arXiv 1711.05101, 2110.02861)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core.optimizer import SubspaceOptimizer


class AdamW8bit(SubspaceOptimizer):
    """AdamW whose two moments take 2.06 bytes a weight: torch.optim.AdamW in the state of a quarter.

        M_t = b1 M_{t-1} + (1 - b1) G_t,  V_t = b2 V_{t-1} + (1 - b2) G_t^2     decoded, updated, coded again
        W_t = (1 - lr wd) W_{t-1} - lr (M_t / c1) / (sqrt(V_t / c2) + eps),  c_i = 1 - b_i^t

    It is what every optimizer of this package does with parameters that it does not project, by itself. State of a
    weight (m, n): `2 m n` bytes of codes and `8 m ceil(n / 128)` of scales; vectors, tensors of
    fewer than 4096 elements and those whose rows are shorter than 16 keep their moments in fp32.

    Args:
        params: Parameters, groups or (name, parameter) pairs.
        lr: Learning rate, a number or a 1-element tensor.
        betas: Decay rates b1, b2.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update.
        state_dtype: "8bit", "bnb8" (the codes of bitsandbytes, which are converted by `from_bitsandbytes`), or a
            floating dtype as in `GaLore`.
        rounding: How bf16 weights are written, see `GaLore`.
        seed: Seed of stochastic rounding.
        maximize: Ascend instead of descend.
        backend: "auto", or the only kernel backend to use.
        capturable: Keep step counts on the device, see `GraphedStep`.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: str | torch.dtype = "8bit",
        rounding: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        numerics: dict[str, Any] = {"state_dtype": state_dtype, "rounding": rounding, "seed": seed}
        numerics |= {"backend": backend, "capturable": capturable}
        super().__init__(params, lr, betas, eps, weight_decay, rank=None, maximize=maximize, **numerics)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        named = [name for name in ("rank", "density") if group.get(name) is not None]
        if named:
            raise ValueError(
                f"{named[0]}={group[named[0]]}: AdamW8bit projects nothing; use GaLore(state_dtype='8bit')"
            )
