"""Sparse residuals: k entries S of a weight keep moments of their own beside the low-rank ones.

    E_t  = G_t - back(R_t)                         what the projection leaves out
    dM_t = b1 dM_{t-1} + (1 - b1) E_t              (m, n), during a warm-up only
    S    = flat indices of the k largest |dM|      (k,), ascending, fixed from then on

    exact       D = Adam((G_t)_S),   W_S <- (1 - lr wd) W_S - lr scale D      in the place of the low-rank step
    additive    D = Adam((E_t)_S),   W_S <- W_S - lr scale D                  on top of the low-rank step

E is formed at S only, and for dM in the buffer itself. Where the basis changes, `dM + back(M)`, the first moment of the
whole gradient, does not: both dM and the additive first moment at S take up what `back(M)` loses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.reference import Move
from ...kernels.rounding import Target
from . import codec
from .apply import rates, run_rule
from .basis import DENSE, Dense, State, Step
from .bucket import Bucket
from .cross_head import Segments
from .hyper import Hyper
from .projector import PROJECTORS
from .rules import Work
from .spec import Spec, counter
from .state import zeros
from .view import MatrixView

AVERAGE, INDEX = "residual_avg", "residual_index"
"""dM while the support is not chosen, S from then on: the names in a state tell its phase."""
WARMUP, STEP = "residual_warmup_step", "residual_step"
"""Steps of the warm-up, and steps that S has seen, which correct the bias of its moments."""
PREFIX, MOMENTS = "residual_", ("exp_avg", "exp_avg_sq")
"""Moments at S: the names of Adam's with this prefix."""

GATHER = 1 << 20
"""Elements of R, and of P, that are gathered at a time."""


@dataclass(frozen=True, slots=True)
class Support:
    """What is kept of a residual.

    Args:
        mode: "exact", "additive", or None for nothing.
        count: k.
        warmup: Steps of the warm-up; none where every entry is kept.
        size: Entries of the weight.
    """

    mode: str | None
    count: int
    warmup: int
    size: int

    @classmethod
    def of(cls, group: Mapping[str, Any], view: MatrixView) -> Support:
        """Read it from the options of a group; the warm-up ends with the first interval."""
        size = view.m * view.n
        count = round(group["residual_density"] * size)
        warmup = 0 if count == size else min(group["residual_warmup"], group["update_proj_gap"])
        return cls(group["residual"] if count else None, count, warmup, size)

    def specs(self, param: Tensor, view: MatrixView, hyper: Hyper, *, chosen: bool) -> dict[str, Spec]:
        """Describe the state: `m n` elements before S is chosen, then `chosen`."""
        counters = {WARMUP: counter(), STEP: counter()}
        if self.warmup and not chosen:
            return counters | {AVERAGE: Spec((view.m, view.n), codec.work_dtype(param.dtype), param.device)}
        return counters | self.chosen(param, hyper)

    def chosen(self, param: Tensor, hyper: Hyper) -> dict[str, Spec]:
        """Describe S and its moments: k indices of 4 bytes, two moments of k elements."""
        integer = torch.int32 if self.size < 1 << 31 else torch.int64
        described = {INDEX: Spec((self.count,), integer, param.device)}
        for name in MOMENTS:
            described |= codec.specs(PREFIX + name, (self.count,), param, hyper.state_dtype)
        return described


class Entries(NamedTuple):
    """New values (k,) of some entries of a weight, or what is added to them, at flat indices (k,)."""

    position: int
    where: Tensor
    values: Tensor


@contextmanager
def rebased(b: Bucket, support: Support) -> Iterator[None]:
    """Keep `dM + back(M)` through a refresh within; with `carry="reset"` dM starts afresh, with "keep" it stays."""
    due = []
    for index, held in enumerate(b.states):
        relative = AVERAGE in held or support.mode == "additive"
        if support.mode and relative and held["refreshes"] > 0 and held["until_refresh"] <= 0:
            due.append((index, float(held["refreshes"])))
    rotates = b.hyper.carry == "rotate"
    for index, _ in due if rotates else ():
        _shift_(b, index, 1.0)
    yield
    for index, before in due:
        held = b.states[index]
        if rotates:
            _shift_(b, index, -1.0)
        elif b.hyper.carry == "reset" and held["refreshes"] > before:
            for name in {AVERAGE, STEP, *(PREFIX + name for name in MOMENTS)} & held.keys():
                codec.zero_(held, name)


def _shift_(b: Bucket, index: int, sign: float) -> None:
    """`dM <- dM + sign back(M)`."""
    held = b.states[index]
    stored, name = b.hyper.state_dtype, PREFIX + "exp_avg"
    moment = codec.load(held, "exp_avg", stored, b.dtype)
    if AVERAGE in held:
        _add_back_(b, index, moment, (1.0, sign))
    else:
        shifted = codec.load(held, name, stored, b.dtype).add(_at(b, held, moment), alpha=sign)
        codec.store(held, name, shifted, stored)


def _add_back_(b: Bucket, index: int, low: Tensor, rates: tuple[float, float]) -> None:
    """`dM <- decay dM + alpha back(R)`."""
    held, (decay, alpha) = b.states[index], rates
    step = Step(Move(decay, alpha, b.dtype), b.view.transposed, b.hyper.backend)
    b.basis.project_back_(Target(held[AVERAGE]), low, held, step)


def residual(b: Bucket, low: Tensor, support: Support) -> list[Entries]:
    """Take the residual of this step in: learn dM and choose S, or run Adam at S.

    Args:
        b: The bucket, before its weights move.
        low: R (k, a, r).
        support: What is kept.

    Returns:
        What `write_` does to weights whose S is chosen, after they have moved.

    Raises:
        NotImplementedError: A gradient arrived already projected.
    """
    if support.mode is None:
        return []
    if any(ready is not None for ready in b.ready):
        raise NotImplementedError("a sparse residual needs the full gradient, got a projected one: pass residual=None")
    chosen = [index for index, held in enumerate(b.states) if INDEX in held]
    for index, held in enumerate(b.states):
        if AVERAGE in held:
            _learn_(b, index, low[index], support)
    return _directions(b, low, chosen, support) if chosen else []


def write_(b: Bucket, entries: list[Entries], support: Support) -> None:
    """Write the entries at S into weights after their low-rank step."""
    for position, where, values in entries:
        at = where.long()
        for target in b.only(position).targets():
            chosen = target.take(at)
            chosen.write(values[None] if support.mode == "exact" else chosen.read().add_(values))
            target.put_at(chosen, at)


def _learn_(b: Bucket, index: int, low: Tensor, support: Support) -> None:
    """`dM <- b1 dM + (1 - b1) (G - back(R))` in place, and S after the warm-up; a bad gradient counts as zero."""
    held, beta1, matrix = b.states[index], b.hyper.betas[0], b.matrix(index)
    usable = b.usable[index] & torch.linalg.vector_norm(matrix, dtype=b.dtype).isfinite()
    dense = b.view.orient(held[AVERAGE])  # (a, b)
    _add_back_(b, index, _or_zero(low, usable), (beta1, beta1 - 1))
    dense.add_(_or_zero(matrix, usable), alpha=beta1 - 1 if b.hyper.maximize else 1 - beta1)
    held[WARMUP] += 1
    if held[WARMUP] >= support.warmup:
        largest = held.pop(AVERAGE).abs_().view(-1).topk(support.count).indices
        held.update(zeros(support.chosen(b.params[index], b.hyper)))
        held[INDEX].copy_(largest.sort().values)


def _directions(b: Bucket, low: Tensor, chosen: list[int], support: Support) -> list[Entries]:
    """One step of Adam at S of some weights of the bucket: one launch for all."""
    states = [b.states[index] for index in chosen]
    torch._foreach_add_([held[STEP] for held in states], 1)
    counts = [int(held[STEP]) for held in states]
    grads = [_seen(b, index, low[index], support) for index in chosen]
    moments = [_unprefixed(held) for held in states]
    out = [torch.empty_like(grad) for grad in grads]
    keys: list[tuple[int, ...]] = [(b.positions[index], t, 1) for index, t in zip(chosen, counts, strict=True)]
    run_rule(b, Work(grads, moments, counts, [b.params[index] for index in chosen], out), keys)
    entries = []
    for index, held, direction in zip(chosen, states, out, strict=True):
        lr, decay = rates(b, index)
        values = direction.mul_(-lr * b.hyper.scale)
        if support.mode == "exact":
            for target in b.only(index).targets():
                values.add_(target.take(held[INDEX].long()).read()[0].mul_(decay))
        entries.append(Entries(index, held[INDEX], values))
    return entries


def _unprefixed(held: State) -> State:
    """The moments at S under Adam's names, with their scales where they are coded."""
    names = [name + suffix for name in MOMENTS for suffix in ("", codec.SCALE)]
    return {name: held[PREFIX + name] for name in names if PREFIX + name in held}


def _seen(b: Bucket, index: int, low: Tensor, support: Support) -> Tensor:
    """G_S or E_S (k,); a bad gradient counts as zero."""
    held = b.states[index]
    if support.count == support.size and held[STEP] == 1:
        torch.arange(support.size, out=held[INDEX])
    values = torch.take(b.grads[index], held[INDEX].long()).to(b.dtype)
    if b.hyper.maximize:
        values.neg_()
    if support.mode == "additive":
        values.sub_(_at(b, held, low))
    return _or_zero(values, b.usable[index] & torch.linalg.vector_norm(values).isfinite())


def _at(b: Bucket, held: State, thin: Tensor) -> Tensor:
    """`(R P^T)_S` (k,) for a thin R (a, r), in pieces: rows of R against rows of P."""
    view, basis = b.view, b.basis
    if not isinstance(basis, (Dense, Segments)):
        raise TypeError(f"the entries of a product with {type(basis).__name__} are not known")
    left = DENSE.left(held, b.dtype)
    if left is not None:
        thin = left @ thin  # (a, r)
    found = []
    for part in torch.split(held[INDEX].long(), max(1, GATHER // view.rank)):
        row, col = part // view.n, part % view.n
        rows, cols = (col, row) if view.transposed else (row, col)
        found.append(thin[rows].mul_(basis.across(held, rows, cols)).sum(1))
    return torch.cat(found)


def _or_zero(tensor: Tensor, usable: Tensor) -> Tensor:
    if usable.device.type != "cpu":
        return torch.where(usable, tensor, 0.0)  # asking would synchronise
    return tensor if usable else torch.zeros_like(tensor)


def check(group: Mapping[str, Any]) -> None:
    """Validate the options of a residual.

    Raises:
        ValueError: They are out of range, or the group's rule or projector cannot have one.
    """
    density, warmup = group["residual_density"], group["residual_warmup"]
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"Invalid residual_density: {density}; need a share between 0 and 1")
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
        raise ValueError(f"Invalid residual_warmup: {warmup!r}; need an integer of at least 1")
    if group["residual"] is None or density == 0:
        return
    if group["rule"] != "adamw":
        raise ValueError(
            f"rule={group['rule']!r}: the residual keeps Adam's two moments; pass rule='adamw', or residual=None"
        )
    projector = PROJECTORS[group["projector"]]
    if group["residual"] == "additive" and (projector.basis is not DENSE or projector.follows):
        raise ValueError(
            f"projector={group['projector']!r}: the additive residual needs a dense basis that stays between "
            "refreshes; pass projector='sketch', or residual='exact'"
        )
