"""Adam on a list of small matrices in one launch, by torch's fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def has_fused_adam(tensor: Tensor) -> bool:
    """Tell whether torch's fused Adam runs on this tensor."""
    return tensor.device.type in _FUSED_DEVICES and tensor.is_floating_point()


def adam(
    grads: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    counts: list[int],
    out: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    *,
    raw_eps: bool = False,
) -> None:
    """Compute `lowmem.kernels.reference.adam`: one fused pass over all tensors of equal step count.

    The kernel updates a parameter by `-lr N`; a zero parameter and lr = -1 leave the direction N itself.
    """
    for t in set(counts):
        chosen = [i for i, count in enumerate(counts) if count == t]
        directions = [out[i].zero_() for i in chosen]
        # On a GPU the kernel reads the count on the device; full() gets it there without a synchronisation.
        count = torch.full((), float(t), device=out[chosen[0]].device)
        torch._fused_adamw_(
            directions,
            [grads[i] for i in chosen],
            [moments[0][i] for i in chosen],
            [moments[1][i] for i in chosen],
            [],
            [count] * len(chosen),
            lr=-1.0,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps / (1 - betas[1] ** t) ** 0.5 if raw_eps else eps,
            amsgrad=False,
            maximize=False,
        )
