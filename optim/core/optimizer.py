"""The constructor and the defaults that all subspace methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .lifecycle import Lifecycle


class SubspaceOptimizer(Lifecycle):
    """Base of the methods that project gradients; `GaLore` documents the arguments."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float, float] = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector: str = "sketch",
        carry: str | None = None,
        rule: str = "adamw",
        state_dtype: str | torch.dtype | None = None,
        gemm_dtype: str | torch.dtype = "auto",
        rounding: str = "nearest",
        num_heads: int | Sequence[tuple[int, int | None]] | None = None,
        head_select: str = "random",
        lazy: float | None = None,
        stagger: bool = False,
        seed: int = 0,
        maximize: bool = False,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        compat: str | None = None,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rule": rule}
        subspace = {"rank": rank, "scale": scale, "proj_type": proj_type, "carry": carry}
        schedule = {"update_proj_gap": update_proj_gap, "stagger": stagger, "lazy": lazy}
        search = {"projector": projector, "seed": seed, "num_heads": num_heads, "head_select": head_select}
        numerics = {"state_dtype": state_dtype, "gemm_dtype": gemm_dtype, "rounding": rounding, "backend": backend}
        torch_form = {"maximize": maximize, "foreach": foreach, "fused": fused}
        super().__init__(params, adam | subspace | schedule | search | numerics | torch_form | {"compat": compat})
