"""`SubspaceOptimizer`: the constructor and the defaults that all subspace methods share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import stack, weight_norm
from .adaptive import AUTO, choose_ranks, rank_in, tells
from .bucket import Bucket
from .lifecycle import Lifecycle
from .sharding import is_dtensor
from .spec import Spec
from .summary import Summary
from .view import MatrixView


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
        rank: int | str | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector: str = "sketch",
        carry: str | None = None,
        rule: str = "adamw",
        state_dtype: str | torch.dtype | None = None,
        gemm_dtype: str | torch.dtype = "auto",
        basis_dtype: str | torch.dtype | None = None,
        shard_basis: bool | None = None,
        rounding: str = "nearest",
        num_heads: int | Sequence[tuple[int, int | None]] | None = None,
        head_select: str = "random",
        lazy: float | None = None,
        energy: float | None = None,
        budget: int | None = None,
        weight_norm: bool = False,
        stagger: bool = False,
        seed: int = 0,
        maximize: bool = False,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        compat: str | None = None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self.replicas = replicas
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rule": rule}
        subspace = {"rank": rank, "scale": scale, "proj_type": proj_type, "carry": carry}
        subspace |= {"energy": energy, "budget": budget, "weight_norm": weight_norm}
        schedule = {"update_proj_gap": update_proj_gap, "stagger": stagger, "lazy": lazy}
        search = {"projector": projector, "seed": seed, "num_heads": num_heads, "head_select": head_select}
        numerics: dict[str, Any] = {
            "state_dtype": state_dtype,
            "gemm_dtype": gemm_dtype,
            "rounding": rounding,
            "backend": backend,
        }
        numerics |= {"basis_dtype": basis_dtype, "shard_basis": shard_basis}
        torch_form = {"maximize": maximize, "foreach": foreach, "fused": fused, "capturable": capturable}
        super().__init__(params, adam | subspace | schedule | search | numerics | torch_form | {"compat": compat})
        if (energy is not None or budget is not None) and not any(group["rank"] == AUTO for group in self.param_groups):
            raise ValueError(f"energy={energy}, budget={budget} choose ranks, and no group has rank='auto': pass it")
        if head_select != "random" and all(group["num_heads"] is None for group in self.param_groups):
            raise ValueError(f"head_select={head_select!r} chooses among heads, and no group has num_heads: pass it")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one with a rank of its own does not inherit a target for ranks."""
        if isinstance(param_group, dict) and param_group.get("rank", AUTO) != AUTO:
            param_group.setdefault("energy", None)
            param_group.setdefault("budget", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["rank"] == AUTO:
            group.setdefault("ranks", None)  # not chosen yet; DCP loads only what has a key
            if len(group["ranks"] or group["params"]) != len(group["params"]):
                self.param_groups.pop()
                raise ValueError(
                    f"got ranks={group['ranks']} for {len(group['params'])} parameters: pass one for each, 0 for one "
                    "that is not projected, or leave ranks out"
                )

    def _restore(self, loaded: dict[str, Any]) -> None:
        super()._restore(loaded)
        for group in self.param_groups:
            if group["rank"] == AUTO and group.get("ranks") and not any(self.state.get(p) for p in group["params"]):
                raise ValueError(
                    f"the checkpoint has chosen ranks {group['ranks'][:8]} and no state of their matrices, lost where "
                    "it is flattened, or read by dcp.load into a fresh optimizer: save it nested, "
                    "StateDictOptions(flatten_optimizer_state_dict=False), or construct the optimizer with the ranks, "
                    "{'params': ..., 'rank': 'auto', 'ranks': other.param_groups[0]['ranks']}"
                )

    def _prepare(self) -> None:
        """Choose the ranks of groups that leave them open, from the gradients of their first step."""
        for group in self.param_groups:
            if self._waits(group) and any(tells(param) for param in group["params"]):
                self._validate(group)
                group["ranks"] = choose_ranks(group, self._bytes_at)

    def _waits(self, group: dict[str, Any]) -> bool:
        """A group with `rank="auto"` is not stepped before one of its gradients has a spectrum to choose ranks from."""
        return group["rank"] == AUTO and group.get("ranks") is None

    def needs_all_gradients(self) -> str | None:
        """Ranks that are open are chosen from all gradients, and a graph steps all parameters."""
        if any(self._waits(group) for group in self.param_groups):
            return "rank='auto' chooses ranks from all gradients of a step: take one step first"
        if any(group["capturable"] for group in self.param_groups):
            return "capturable=True is for steps of all parameters in one graph: pass capturable=False"
        return super().needs_all_gradients()

    def _bytes_at(self, param: Tensor, rank: int, group: dict[str, Any]) -> int | None:
        """Bytes of state that an eligible parameter takes at a rank; None where it cannot have it."""
        settled = {**group, "rank": rank}
        view = super()._view(param, settled)
        return None if view is None else sum(spec.nbytes for spec in self._specs(param, view, settled).values())

    def _view(self, param: Tensor, group: dict[str, Any]) -> MatrixView | None:
        if group["rank"] != AUTO:
            return super()._view(param, group)
        rank = rank_in(group, param)
        return super()._view(param, {**group, "rank": rank}) if rank else None

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        own = (group["weight_norm"], group["shard_basis"], group["capturable"])
        return (*super()._structure(group), *own, tuple(group.get("ranks") or ()))

    def _specs(self, param: Tensor, view: MatrixView | None, group: dict[str, Any]) -> dict[str, Spec]:
        described = super()._specs(param, view, group)
        if view is not None and group["weight_norm"]:
            described |= weight_norm.specs(param, self._hyper(group))
        return described

    def _admit(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._admit(param, group)
        if group["capturable"] and is_dtensor(param):
            raise ValueError(
                f"got a sharded {tuple(param.shape)} parameter with capturable=True, whose sums over ranks are not "
                "captured: pass capturable=False"
            )
        if group["weight_norm"] and self._sees(param, group) is not None:
            weight_norm.check(stack.one(param, group))

    def _step_projected(self, b: Bucket) -> None:
        if b.hyper.weight_norm:
            weight_norm.normalised(b, self.update)
        else:
            self.update(b)

    def summary(self) -> Summary:
        """Tell what was matched; see `Groups.summary`.

        Raises:
            RuntimeError: Ranks are not chosen yet.
        """
        if any(self._waits(group) for group in self.param_groups):
            raise RuntimeError("rank='auto' is decided by the gradients of the first step: call summary() after it")
        return super().summary()
