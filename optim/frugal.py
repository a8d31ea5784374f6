"""FRUGAL: memory-efficient optimization by gradient splitting (arXiv 2411.07837)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core import blocks, counts, selection, state, weight_norm
from .core.bucket import Bucket
from .core.free import Free, descend_, silence_, undivided_
from .core.hyper import Hyper
from .core.optimizer import SubspaceOptimizer
from .core.spec import Spec
from .core.verbs import follow, inner, project, refresh
from .core.view import MatrixView


class Frugal(SubspaceOptimizer):
    """FRUGAL: a rule with moments inside a subspace, one without memory on all the rest of the gradient.

    For a weight W oriented so that its gradient A (a x b) is projected from the right:

        P_t    = a new subspace every T steps: columns of W, say            (b, r)
        R_t    = A_t P_t                                                    (a, r)
        N_t    = rule(R_t), for AdamW  Mhat_t / (sqrt(Vhat_t) + eps)        (a, r)
        F_t    = free(A_t - R_t P_t^T), for signSGD its sign                (a, b)
        W_t    = (1 - lr wd) W_{t-1} - lr s_p (N_t P_t^T + s_f F_t)

    State of a matrix (m x n) of density rho: columns `2 m k` with `k = floor(rho n)` and k indices of 4 bytes, rows
    `2 k n` with `k = floor(rho m)`, randk `2 k` with `k = floor(rho m n)`; bases of directions
    `2 max(m,n) r + min(m,n) r` with `r = round(rho min(m,n))`; blocks `2 m n` while active. Density 1 is the rule on
    the whole matrix, for AdamW exactly torch.optim.AdamW; density 0 has no state.

    Args:
        params: Parameters, groups or (name, parameter) pairs; see `GaLore`.
        lr: Learning rate. Signs move a weight by lr, so it is AdamW's, and clipping of gradients does not reach them.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, before the update, of the whole weight.
        density: Share rho of state-full entries, 0 to 1, 0.25 where no `rank` is named.
        rank: In its place the number of columns, rows or directions (`rank max(m,n)` entries with "randk"), or of
            active blocks.
        scale: s_p, a factor of the learning rate of projected matrices.
        projector: "columns", "rows", "randk" (entries), "randperm" (columns or rows as `proj_type` says), "blocks"
            (whole matrices), or a projector of `GaLore`.
        carry: What becomes of the moments at a refresh: "reset" starts afresh, "rotate" projects them into the new
            subspace (entries that stay keep theirs), "keep" leaves their numbers.
        free_rule: "signsgd", "sgd", "none", or for blocks "freeze", which leaves out their decay too.
        free_scale: s_f.
        free_space: "ambient" (the paper) or "complement", which takes out the part of F inside the subspace; a choice
            of entries or blocks has no such part.
        block_order: Turns of blocks: "random" (the default, permutations), "iid", "ascending", "descending", "mirror".
        block_by: "tensor" (the default) or "layer": matrices whose names agree up to their first integer.
        options: Every other option of `GaLore`: `update_proj_gap`, `proj_type`, `rule`, `state_dtype`, `seed`, ...

    Raises:
        ValueError: An option is out of range, unknown but close to a known one, or contradicts another.

    Differences from the authors' code: density 1 is AdamW across refreshes; entries are 4-byte indices from a seed, the
    same in every process; every matrix has its own refresh counter, blocks that of the group, so that a missing
    gradient resets nothing; rounding errors in place of a residual have no sign; random blocks have equal turns;
    "rotate" is the paper's re-projection, which that code leaves out.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        density: float | None = None,
        rank: int | None = None,
        scale: float = 1.0,
        projector: str = "columns",
        carry: str = "reset",
        free_rule: str = "signsgd",
        free_scale: float = 1.0,
        free_space: str = "ambient",
        block_order: str | None = None,
        block_by: str | None = None,
        **options: Any,
    ) -> None:
        groups: Any = params if isinstance(params, Tensor) else list(params)
        named = any(isinstance(group, dict) and {"rank", "density"} & group.keys() for group in groups)
        selection.check_density(density, rank)
        density = None if named else 0.25 if density is None and rank is None else density
        self._declare(density=density, free_rule=free_rule, free_scale=free_scale, free_space=free_space)
        self._declare(block_order=block_order, block_by=block_by)
        options |= {"rank": rank, "scale": scale, "projector": projector, "carry": carry}
        super().__init__(groups, lr, betas, eps, weight_decay, **options)

    def update(self, b: Bucket) -> None:
        """One step of FRUGAL on a bucket of same-shape matrices."""
        free = Free.of(self.param_groups[b.plan.group])
        if undivided_(b, free):  # blocks, or density 0 or 1: state-full or state-free as a whole
            return
        refresh(b)  # P_t, every T steps                     (b, r)
        low = project(b)  # R_t = A_t P_t                    (k, a, r)
        sound = silence_(b, low)
        step = inner(b, low)  # N_t = rule(R_t)              (k, a, r)
        descend_(b, step, low, sound, free)  # W <- (1 - lr wd) W - lr s_p (N P^T + s_f free(A - R P^T))
        follow(b, low)  # P_{t+1}, by projectors that move after the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step; see `Lifecycle.step`. For blocks it counts even if they have no gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turning = [group for group in self.param_groups if blocks.turns(group) and not blocks.only_creates_state(group)]
        if turning:
            self._planned()  # raises what it refuses before a window opens
        for group in turning:
            blocks.advance(group, self.state)
        super().step()
        return loss

    def needs_all_gradients(self) -> str | None:
        """Blocks take turns by the step of the whole group."""
        if any(blocks.turns(group) for group in self.param_groups):
            return "projector='blocks' counts the steps of a group, not of its parameters: use another projector"
        return super().needs_all_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `Lifecycle.add_param_group`; blocks are checked against it."""
        if isinstance(param_group, dict) and "rank" in param_group:
            param_group.setdefault("density", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if blocks.turns(group):
            group.setdefault(blocks.DONE, 0)
            group.setdefault(blocks.WAIT, 0)
            try:
                blocks.active(group)
            except ValueError:
                self.param_groups.pop()
                raise

    def _validate(self, group: dict[str, Any]) -> None:
        selection.check(group)
        super()._validate({**group, **selection.for_core(group)})

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        own = (group["block_by"], group["block_order"], group["seed"], group["free_rule"], group.get(blocks.DONE))
        return (*super()._structure(group), *own)

    def _view(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        return selection.view(param, group)

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        if view is None:
            return super()._specs(param, view, group)
        norms = weight_norm.specs(param, Hyper.of(group)) if group["weight_norm"] else {}
        if view.rank == 0:
            return {"step": counts.spec(param, Hyper.of(group)), **norms}
        whole = view.rank == view.b
        return {**state.specs(param, None if whole else view, Hyper.of(group)), **norms}
