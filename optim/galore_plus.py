"""GaLore+: cross-head projections and sparsely coded residuals (arXiv 2412.19820)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core import sparse
from .core.bucket import Bucket
from .core.hyper import Hyper
from .core.optimizer import SubspaceOptimizer
from .core.spec import Spec
from .core.validate import check_choices
from .core.verbs import follow, inner, project, project_back_, refresh
from .core.view import MatrixView

CHOICES: dict[str, tuple[Any, ...]] = {"residual": (None, "exact", "additive")}


class GaLorePlus(SubspaceOptimizer):
    """GaLore+: GaLore whose query and key weights share one head's basis, with full-space moments at a few entries.

    For a weight W oriented so that its gradient A (a x b) is projected from the right:

        P_t    = r leading right singular vectors of A_t, every T steps,
                 in groups with `num_heads` of the rows of one head             (b, r)
        R_t    = A_t P_t,  N_t = rule(R_t)                                      (a, r)
        W_t    = (1 - lr wd) W_{t-1} - lr scale N_t P_t^T
        S      = the k entries of largest |dM|, dM an average of A - R P^T over a warm-up
        W_t    at S: full-space Adam in the place of N P^T ("exact"), or Adam of A - R P^T added to it ("additive")

    State of a projected matrix: GaLore's `min(m,n) r + 2 max(m,n) r` elements, with `num_heads` always `n r + 2 m r`,
    and k indices of 4 bytes with two moments: k (4 + 2 * 4) bytes in fp32. During the warm-up there is an fp32 buffer
    of the weight's size instead, which is freed. `load_state_dict` reads checkpoints of both phases;
    `torch.distributed.checkpoint`, which creates state before it loads, those from after the warm-up.

    Args:
        params: Parameters, groups or (name, parameter) pairs; see `GaLore`. `head_groups(model)` makes the groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update.
        num_heads: Heads of the weights of a group, (heads dk) x d each; None (default) leaves it an ordinary one. For a
            fused weight the (rows, heads) of its ranges of rows, None heads for a range without:
            `[(4096, 32), (1024, 8), (1024, None)]`. It sets `projector="cross_head"`, which projects from the right.
        head_select: Whose basis is shared: a "random" head (seeded), the "first", the next in a "cycle", or the one of
            the largest gradient, "max_norm". A head is drawn anew at every refresh; of heads with dk < r there are
            ceil(r / dk).
        residual: "exact" (default), "additive", or None for no residual.
        residual_density: k over m n, 0 to 1; 1 keeps every entry and needs no warm-up.
        residual_warmup: Steps before S is chosen, at least 1; it ends with the first interval at the latest.
        options: Every option of `GaLore` but `compat`: `rank`, `update_proj_gap`, `scale`, `projector`, ...

    Raises:
        ValueError: An option is out of range or unknown but close to a known one, heads do not divide the rows, or a
            residual is asked of a rule other than "adamw".

    What the paper says: one randomly chosen head's basis for all query heads and for all key heads, randomized subspace
    iteration, and residuals at positions that a warm-up finds. There is no public code, and the rest is our completion:

    - The shared basis is that of the input side, of another head (or stack of heads) at every refresh.
    - The iteration is that of `projector="sketch"`: at most two rounds, warm-started, 8 columns more than the rank.
    - S is chosen once, by |dM|. "exact" and "additive" stand for the paper's residuals of both moments and the update;
      their bias correction counts from the first step of S.
    - Moments are rotated at a refresh (`carry`). The additive first moment at S then takes up what the low-rank one
      loses; its second moment stays as it is.
    - The default values of `residual_density` and `residual_warmup`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float, float] = 1e-8,
        weight_decay: float = 1e-2,
        *,
        num_heads: int | Sequence[tuple[int, int | None]] | None = None,
        residual: str | None = "exact",
        residual_density: float = 0.01,
        residual_warmup: int = 20,
        **options: Any,
    ) -> None:
        self._declare(residual=residual, residual_density=residual_density, residual_warmup=residual_warmup)
        if num_heads is not None:
            options.setdefault("projector", "cross_head")
        super().__init__(params, lr, betas, eps, weight_decay, num_heads=num_heads, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, one with `num_heads` as `projector="cross_head"`; raises as the constructor."""
        if isinstance(param_group, dict) and "num_heads" in param_group:
            heads = param_group["num_heads"]
            param_group.setdefault("projector", "sketch" if heads is None else "cross_head")
        super().add_param_group(param_group)

    def update(self, b: Bucket) -> None:
        """One step of GaLore+ on a bucket of same-shape matrices."""
        support = sparse.Support.of(self.param_groups[b.plan.group], b.whole)
        with sparse.rebased(b, support):
            refresh(b)  # P_t, every T steps                     (b, r)
        low = project(b)  # R_t = A_t P_t                        (k, a, r)
        step = inner(b, low)  # N_t = rule(R_t)                  (k, a, r)
        entries = sparse.residual(b, low, support)  # dM, or Adam at S
        project_back_(b, step)  # W <- (1 - lr wd) W - lr scale N P^T
        sparse.write_(b, entries, support)  # W_S
        follow(b, low)  # P_{t+1}, by projectors that move after the step

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        check_choices(group, CHOICES)
        if group["compat"] is not None:
            raise ValueError(f"compat={group['compat']!r}: GaLore+ has no authors' code to follow, drop the option")
        sparse.check(group)

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (*super()._structure(group), group["residual"], group["residual_density"])

    def _specs_to_load(self, param: Tensor, view: MatrixView | None, group: int) -> dict[str, Spec]:
        described, options = super()._specs_to_load(param, view, group), self.param_groups[group]
        if view is None:
            return described
        return sparse.specs_to_load(described, sparse.Support.of(options, view), param, Hyper.of(options))

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        described = super()._specs(param, view, group)
        if view is None:
            return described
        held, support = self.state.get(param, {}), sparse.Support.of(group, view)
        if support.mode is None and sparse.STEP not in held:
            return described
        return described | support.specs(param, view, Hyper.of(group), chosen=sparse.INDEX in held)
