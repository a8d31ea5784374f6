"""Sparse residuals: k entries S of a weight keep moments of their own beside the low-rank ones.

    E_t  = G_t - back(R_t)                         the residual; back(R) = R P^T in the orientation of the weight
    dM_t = b1 dM_{t-1} + (1 - b1) E_t              (m, n), during a warm-up only
    S    = flat indices of the k largest |dM|      (k,), ascending, fixed from then on

    exact       D = Adam((G_t)_S),   W_S <- (1 - lr wd) W_S - lr scale D      in the place of the low-rank step
    additive    D = Adam((E_t)_S),   W_S <- W_S - lr scale D                  on top of the low-rank step

E is never formed as a whole: only at S, and for dM by updating the buffer of dM in place. A refresh must not change
`dM + back(M)`, the first moment of the whole gradient; so dM, or the additive first moment at S, takes up what
`back(M)` loses as M moves to the new basis.

Where a weight is sharded, each rank reads the entries in its piece and keeps the moments of its even share of S. A step
gathers indices, deals out gradients and gathers directions: three times k numbers, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.reference import Count, Move
from ...kernels.rounding import Target
from . import codec, counts, entries
from .apply import rates, run_rule
from .basis import DENSE, Dense, State, Step
from .bucket import Bucket
from .entries import Place
from .rules import Work
from .segments import Segments
from .sharding import local
from .spec import Spec
from .state import zeros
from .support import AVERAGE, INDEX, MOMENTS, PREFIX, STEP, WARMUP, Support, check, specs_to_load

__all__ = ["AVERAGE", "INDEX", "MOMENTS", "PREFIX", "STEP", "WARMUP", "Support", "check"]
__all__ += ["Entries", "rebased", "residual", "specs_to_load", "write_"]

GATHER = 1 << 20
"""Elements of R, and of P, that are gathered at a time."""


class Entries(NamedTuple):
    """What to write to some entries of a weight after its low-rank step.

    Args:
        position: Number of the weight in its bucket.
        where: Flat indices of the entries in this rank's piece.
        values: Their new values ("exact"), or what is added to them ("additive").
    """

    position: int
    where: Tensor
    values: Tensor


@contextmanager
def rebased(b: Bucket, support: Support) -> Iterator[None]:
    """Context of a refresh that keeps `dM + back(M)`; with `carry="reset"` dM starts afresh, with "keep" it stays."""
    due = []
    for index, held in enumerate(b.states):
        relative = AVERAGE in held or support.mode == "additive"
        if support.mode and relative and held["refreshes"] > 0 and held["until_refresh"] <= 0:
            due.append((index, float(held["refreshes"])))
    rotates = b.hyper.carry == "rotate"
    for index, _ in due if rotates else ():
        _shift_(b, index, 1.0, support)
    yield
    for index, before in due:
        held = b.states[index]
        if rotates:
            _shift_(b, index, -1.0, support)
        elif b.hyper.carry == "reset" and held["refreshes"] > before:
            for name in {AVERAGE, STEP, *(PREFIX + name for name in MOMENTS)} & held.keys():
                codec.zero_(held, name)


def _shift_(b: Bucket, index: int, sign: float, support: Support) -> None:
    """`dM <- dM + sign back(M)`."""
    held = b.states[index]
    stored, name = b.hyper.state_dtype, PREFIX + "exp_avg"
    moment = b.layout.gather(codec.load(held, "exp_avg", stored, b.dtype)[None], b.view.a)[0]
    if AVERAGE in held:
        _add_back_(b, index, moment, (1.0, sign))
        return
    (place,) = _places(b, [held], support)
    lost = entries.deal([place.among(_at(b, held, moment, place), support.count)], b.layout)[0]
    codec.store(held, name, codec.load(held, name, stored, b.dtype).add(lost, alpha=sign), stored)


def _add_back_(b: Bucket, index: int, low: Tensor, rates: tuple[float, float]) -> None:
    """`dM <- decay dM + alpha back(R)`."""
    held, (decay, alpha) = b.states[index], rates
    step = Step(Move(decay, alpha, b.dtype), b.view.transposed, b.hyper.backend, b.mine)
    b.basis.project_back_(Target(held[AVERAGE]), low, held, step)


def residual(b: Bucket, low: Tensor, support: Support) -> list[Entries]:
    """Use the residual of this step: update dM and choose S at the end of the warm-up, or run Adam at S.

    Args:
        b: The bucket, before its weights move.
        low: R (k, a, r).
        support: How the residual is kept.

    Returns:
        What `write_` is to write after the weights have moved; nothing for weights in their warm-up.

    Raises:
        NotImplementedError: A gradient arrived already projected.
    """
    if support.mode is None:
        return []
    if any(ready is not None for ready in b.ready):
        raise NotImplementedError("a sparse residual needs the full gradient, got a projected one: pass residual=None")
    for index, held in enumerate(b.states):
        if INDEX in held and support.warmup and held[WARMUP] == 0:  # created for a checkpoint that was never loaded
            average = support.specs(b.params[index], b.whole, b.hyper, chosen=False)[AVERAGE]
            _exchange_(b, index, {AVERAGE: average})
    chosen = [index for index, held in enumerate(b.states) if INDEX in held]
    if support.mode == "additive" or len(chosen) < len(b.states):
        low = b.layout.gather(low, b.view.a)
    for index, held in enumerate(b.states):
        if AVERAGE in held:
            _learn_(b, index, low[index], support)
    return _directions(b, low, chosen, support) if chosen else []


def write_(b: Bucket, written: list[Entries], support: Support) -> None:
    """Write the entries at S into weights after their low-rank step."""
    for position, where, values in written:
        for target in b.only(position).targets():
            chosen = target.take(where)
            chosen.write(values[None] if support.mode == "exact" else chosen.read().add_(values))
            target.put_at(chosen, where)


def _learn_(b: Bucket, index: int, low: Tensor, support: Support) -> None:
    """`dM <- b1 dM + (1 - b1) (G - back(R))` in place, and S after the warm-up; a bad gradient counts as zero."""
    held, beta1, matrix = b.states[index], b.hyper.betas[0], b.matrix(index)
    usable = b.usable[index] & torch.linalg.vector_norm(matrix, dtype=b.dtype).isfinite()
    dense = b.view.orient(held[AVERAGE])  # (a, b)
    _add_back_(b, index, _or_zero(low, usable), (beta1, beta1 - 1))
    dense.add_(_or_zero(matrix, usable), alpha=beta1 - 1 if b.hyper.maximize else 1 - beta1)
    held[WARMUP] += 1
    if held[WARMUP] >= support.warmup:
        _choose_(b, index, support)


def _choose_(b: Bucket, index: int, support: Support) -> None:
    """Put S and its moments in the place of dM."""
    found = entries.largest(b.states[index][AVERAGE].abs_(), support.count, b.whole.n, b.layout)
    _exchange_(b, index, support.chosen(b.params[index], b.hyper))
    b.states[index][INDEX].copy_(found)


def _exchange_(b: Bucket, index: int, described: dict[str, Spec]) -> None:
    """Replace the residual's state, all but its counters, by that of the other phase: warm-up or S chosen."""
    made = zeros(described, b.layout)
    pieces = {name: local(value) for name, value in made.items()}
    for state, fresh in ((b.stored[index], made), (b.states[index], pieces)):
        for name in [name for name in state if name.startswith(PREFIX) and name not in (WARMUP, STEP)]:
            del state[name]
        state.update(fresh)


def _directions(b: Bucket, low: Tensor, chosen: list[int], support: Support) -> list[Entries]:
    """One step of Adam at S of some weights of the bucket: one launch for all."""
    states, mine = [b.states[index] for index in chosen], entries.share(support.count, b.layout)
    times = counts.advance(states, b.hyper, STEP)
    for held, count in zip(states, times, strict=True):
        if support.count == support.size and (isinstance(count, Tensor) or count == 1):
            at = held[INDEX]
            torch.arange(mine.start, mine.start + len(at), out=at, device=at.device)
    places = _places(b, states, support)
    seen = [_seen(b, index, low[index], place, support) for index, place in zip(chosen, places, strict=True)]
    grads = entries.deal(seen, b.layout)
    out = [torch.empty_like(grad) for grad in grads]
    keys: list[tuple[Count, ...]] = [(b.positions[index], t, 1) for index, t in zip(chosen, times, strict=True)]
    keys = [(*key, mine.start) for key in keys] if mine.start else keys
    moments = [_unprefixed(held) for held in states]
    run_rule(b, Work(grads, moments, times, [b.params[index] for index in chosen], out), keys)
    whole = entries.collect(out, support.count, b.layout)
    found = zip(chosen, places, whole, strict=True)
    return [_step(b, index, place, direction, support) for index, place, direction in found]


def _step(b: Bucket, index: int, place: Place, direction: Tensor, support: Support) -> Entries:
    """Turn a direction (k,) into what to write to the entries in this rank's piece of a weight."""
    lr, decay = rates(b, index)
    values = place.of(direction).mul_(-lr * b.hyper.scale)
    if support.mode == "exact":
        for target in b.only(index).targets():
            values.add_(target.take(place.flat).read()[0].mul_(decay))
    return Entries(index, place.flat, values)


def _places(b: Bucket, states: list[State], support: Support) -> list[Place]:
    """Where the entries S of some weights of the bucket lie."""
    found = entries.collect([held[INDEX] for held in states], support.count, b.layout)
    return [entries.locate(index, b.whole.n, b.layout) for index in found]


def _unprefixed(held: State) -> State:
    """The moments at S under Adam's names, with their scales where they are coded."""
    names = [name + suffix for name in MOMENTS for suffix in ("", codec.SCALE)]
    return {name: held[PREFIX + name] for name in names if PREFIX + name in held}


def _seen(b: Bucket, index: int, low: Tensor, place: Place, support: Support) -> Tensor:
    """G_S or E_S (k,) from this rank's piece, zero for entries of others; a bad gradient counts as zero."""
    values = torch.take(b.grads[index], place.flat).to(b.dtype)
    if b.hyper.maximize:
        values.neg_()
    if support.mode == "additive":
        values.sub_(_at(b, b.states[index], low, place))
    sound = _or_zero(values, b.usable[index] & torch.linalg.vector_norm(values).isfinite())
    return place.among(sound, support.count)


def _at(b: Bucket, held: State, thin: Tensor, place: Place) -> Tensor:
    """`(R P^T)_S` for R (a, r): entry (i, j) is row i of R times row j of P, gathered in pieces of bounded size."""
    view, basis = b.view, b.basis
    if not isinstance(basis, (Dense, Segments)):
        raise TypeError(f"the entries of a product with {type(basis).__name__} are not known")
    left = DENSE.left(held, b.dtype)
    if left is not None:
        thin = left @ thin  # (a, r)
    found, width = [], max(view.n, 1)
    for part in torch.split(place.flat, max(1, GATHER // view.rank)):
        row, col = part // width, part % width
        rows, cols = (col, row) if view.transposed else (row, col)
        found.append(thin[rows].mul_(basis.across(held, rows, cols)).sum(1))
    return torch.cat(found)


def _or_zero(tensor: Tensor, usable: Tensor) -> Tensor:
    if usable.device.type != "cpu":
        return torch.where(usable, tensor, 0.0)  # asking would synchronise
    return tensor if usable else torch.zeros_like(tensor)
