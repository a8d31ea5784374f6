"""BAdam (arXiv 2404.02827) and LISA (arXiv 2403.17919): FRUGAL's blocks are layers, the others are frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .frugal import Frugal


class BAdam(Frugal):
    """BAdam: Adam on one layer for K steps from fresh moments, then on the next; all other layers stand still.

        every K steps:    i = the next layer of a random order,  M = V = 0,  t = 0
        every step:       W_i <- (1 - lr wd) W_i - lr Mhat / (sqrt(Vhat) + eps)

    State: two moments of one layer. Every layer has its K steps before any has more. The matrices of the group take
    turns; its norms and biases, and groups with `"rank": None`, are always active:

        BAdam([{"params": others, "rank": None}, {"params": layers, "rank": 1}], lr=1e-5)

    with (name, parameter) pairs in both, of which the names in `layers` hold the number of the layer. Gradients of
    frozen layers are still computed and kept by autograd, unless you set their `requires_grad` yourself.

    Args:
        params: (Name, parameter) pairs or groups of them.
        lr: Learning rate; the paper fine-tunes with 1e-6 to 1e-5.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, of active layers only.
        rank: Layers active at a time, 1 where no `density` says it as a share.
        update_proj_gap: K, steps of a layer.
        block_order: Order of the layers: "random", "ascending", "descending", "mirror" or "iid".
        block_by: "layer", or "tensor" to take single matrices in turn.
        free_rule: What becomes of the other layers; "signsgd" makes this FRUGAL with blocks.
        options: Further options of `Frugal`.

    Raises:
        ValueError: As `Frugal`, and where a matrix has no name with a number in it.

    Differences from the authors' code: the first layer has K steps too, always-active parameters keep their moments,
    the schedule is in the state dict, and there are no fp32 copies of bf16 weights.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
        update_proj_gap: int = 100,
        block_order: str = "random",
        block_by: str = "layer",
        free_rule: str = "freeze",
        **options: Any,
    ) -> None:
        fixed = sorted({"projector", "scale"} & options.keys())
        if fixed:
            given = f"{fixed[0]}={options[fixed[0]]!r}"
            raise ValueError(
                f"{given} is not an option of {type(self).__name__}, whose layers take turns at the rate lr: drop it "
                f"or construct Frugal(params, {given})"
            )
        if rank is None and options.get("density") is None:
            rank = 1
        options |= {"rank": rank, "update_proj_gap": update_proj_gap, "block_order": block_order, "block_by": block_by}
        super().__init__(
            params, lr, betas, eps, weight_decay, projector="blocks", scale=1.0, free_rule=free_rule, **options
        )


class LISA(BAdam):
    """LISA: every K steps other layers are drawn, which AdamW trains while all others stand still.

        every K steps:    S = layers (the option) of them, drawn uniformly without replacement
        every step:       AdamW on the layers in S; all others are frozen

    State: two moments of the layers in S, and of what is always active: embeddings, head and norms in the paper. See
    `BAdam` for the groups (`"rank"` of a group is its number of layers) and for the gradients of frozen layers.

    Args:
        params: (Name, parameter) pairs or groups of them.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, of active layers only.
        layers: Layers active at a time, where no group names a `rank`.
        update_proj_gap: K.
        carry: "keep" goes on with the moments of a layer that is drawn twice in a row, "reset" starts them afresh.
        options: Further options of `BAdam`.

    Raises:
        ValueError: As `BAdam`.

    Difference from the authors' code: the state of a layer that is frozen is freed; there it stays, so that memory
    grows to that of AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        layers: int = 2,
        update_proj_gap: int = 20,
        carry: str = "keep",
        **options: Any,
    ) -> None:
        if "rank" in options:
            raise ValueError(f"rank={options['rank']}: LISA calls it layers, pass layers={options['rank']}")
        options = {"block_order": "iid", **options, "rank": layers, "update_proj_gap": update_proj_gap, "carry": carry}
        super().__init__(params, lr, betas, eps, weight_decay, **options)
