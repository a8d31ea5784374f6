"""How an inner rule is run on state as it is stored, and the rates of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...kernels import random
from ...kernels.random import Seed
from ...kernels.reference import Count
from ...kernels.rounding import Target
from . import codec, counts
from .bucket import Bucket
from .rules import Work, learning_rates

EXACT = ("float32", "float64")
"""Values of `state_dtype` that are at least as wide as the working dtype: nothing of them is rounded."""


def count_step(b: Bucket) -> list[Count]:
    """Advance the step count of every parameter and return the new counts."""
    return counts.advance(b.states, b.hyper)


def run_rule(b: Bucket, stored: Work, keys: Sequence[tuple[Seed, ...]]) -> None:
    """Run the rule on states in their storage dtype: load them, let the rule work, store them.

    Args:
        b: The bucket, for its rule and hyper-parameters.
        stored: The work, with states as they are stored.
        keys: What distinguishes each tensor in this step: the seed of the stochastic rounding of second moments.
    """
    place = b.place  # in the seeds: pieces of one moment must round independently, replicas alike
    drawn = b.hyper.state_dtype not in EXACT
    seeds = [random.mix(b.hyper.seed, *key, *place) if drawn else 0 for key in keys]
    if b.rule.coded_direction(stored, b.hyper, seeds):
        return
    names, storage = b.rule.buffers(tuple(stored.grads[0].shape), b.hyper), b.hyper.state_dtype
    loaded = [{name: codec.load(held, name, storage, b.dtype) for name in names} for held in stored.states]
    b.rule.direction(replace(stored, states=loaded), b.hyper)
    for held, values, key, seed in zip(stored.states, loaded, keys, seeds, strict=True):
        common = random.mix(b.hyper.seed, *key) if drawn else 0
        for name, value in values.items():
            # Ranks whose pieces share rows hold the same row statistics, and must round them alike; columns likewise.
            own = common if name.endswith(("_row", "_col")) else seed
            if value is not held[name]:
                codec.store(held, name, value, storage, own if b.dithers(name) else None)


def rates(b: Bucket, index: int) -> tuple[float | Tensor, float | Tensor]:
    """The factor of the direction and the factor of the weight, `(lr, 1 - lr wd)`.

    The authors' AdamW (`compat="official"`) decays the weight after the update, which multiplies the direction by the
    decay as well. A rate that is a tensor on the host becomes a number, unless a graph is to read it (`capturable`, and
    on the parameters' device); a tensor on a device stays one, for reading it would synchronise.
    """
    hyper = b.hyper
    lr = hyper.lr
    stays = hyper.capturable and isinstance(lr, Tensor) and lr.device == b.params[0].device
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and not stays:
        lr = float(lr)
    if b.rule.absolute:
        if not hyper.weight_decay:
            return 1.0, 1.0
        if not b.rates:  # those of the whole bucket, before any weight moves: they depend on the sizes of the weights
            steps = [int(held["step"]) for held in b.states]
            b.rates.extend(learning_rates(hyper, steps, b.params, b.dtype, b.layout))
        return 1.0, 1 - b.rates[index] * hyper.weight_decay
    decay = 1 - lr * hyper.weight_decay
    return (lr * decay if hyper.official else lr), decay


def move_(target: Target, update: Tensor, decay: float | Tensor = 1.0) -> None:
    """`W <- decay W - U` (m, n), U in the working dtype, rounded once."""
    target.write(target.edit(decay).sub_(update))
