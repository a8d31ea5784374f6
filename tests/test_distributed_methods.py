"""Every method in every layout: real processes (gloo) that share a LLaMA follow one process that has all of it.

Twenty steps with three refreshes. All methods train side by side in a world of processes that is started once; their
models are sharded as one, so that a step of all of them costs few collectives more than a step of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed import layouts, work
from tests.distributed.measure import Arrays, distance, share
from tests.distributed.world import Worlds


class Layout(NamedTuple):
    """How many ranks share the weights, and how."""

    ranks: int
    kind: str


LAYOUTS = {
    "FSDP2 of 2": Layout(2, "fsdp"),
    "FSDP2 of 4": Layout(4, "fsdp"),
    "HSDP 2 x 2": Layout(4, "hsdp"),
    "TP of 2": Layout(2, "tp"),
    "FSDP2 x TP 2 x 2": Layout(4, "fsdp tp"),
}
CODED = [name for name in work.METHODS if "8bit" in name]
EXACT = [name for name in work.METHODS if name not in CODED]
world = Worlds()
closing = world.closing()


def train(names: list[str], kind: str, run: Callable[..., Any]) -> Any:
    """Moments in 8 bits need weights that are large enough, and round."""
    coded = names[0] in CODED
    sizes, dtype = (layouts.LARGE, torch.float32) if coded else (None, torch.float64)
    return run(work.together, names, kind, sizes, dtype, work.LONG)


@lru_cache
def dense(coded: bool) -> dict[str, Arrays]:
    found = train(CODED if coded else EXACT, "dense", lambda function, *args: function(*args))
    assert [name for name in found if isinstance(found[name], str)] == []
    return found


@lru_cache
def sharded(layout: str, coded: bool) -> dict[str, Arrays | str]:
    """Weights by method, or what became of it."""
    names = CODED if coded else EXACT
    try:
        return together(layout, names)
    except AssertionError:  # the ranks have ended, and each method by itself tells by which of them
        return {name: alone(layout, name) for name in names}


def together(layout: str, names: list[str]) -> dict[str, Arrays | str]:
    """Weights of the first rank, or what was raised on any."""
    ranks = train(names, LAYOUTS[layout].kind, world(LAYOUTS[layout].ranks).run)
    return {name: next((rank[name] for rank in ranks if isinstance(rank[name], str)), ranks[0][name]) for name in names}


def alone(layout: str, name: str) -> Arrays | str:
    try:
        return together(layout, [name])[name]
    except AssertionError as error:
        return str(error)


def of(name: str, layout: str) -> Arrays:
    found = sharded(layout, name in CODED)[name]
    assert not isinstance(found, str), f"{name}, {layout}: {found}"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXACT)
def test_ranks_follow_one_process(name: str, layout: str) -> None:
    far = distance(of(name, layout), dense(coded=False)[name])
    assert far < 1e-8, f"{name}, {layout}: {far:.1e} from the run in one process"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CODED)
def test_moments_in_8_bits_are_rounded_otherwise_and_no_more(name: str, layout: str) -> None:
    if name == "adamw 8bit" and layout.count("TP of") + layout.count("x TP"):
        message = sharded(layout, coded=True)[name]
        assert "has blocks along its rows, which are cut" in message
        return
    start = layouts.weights(layouts.model(layouts.LARGE, torch.float32))
    far = share(of(name, layout), dense(coded=True)[name], start)
    assert far < 0.02, f"{name}, {layout}: {far:.1e} of its way from the run in one process"


@lru_cache
def replicas(coded: bool) -> list[dict[str, tuple[int, int]]]:
    return world(2).run(work.replicas, CODED if coded else EXACT, layouts.LARGE if coded else None, 100)


@pytest.mark.parametrize("name", [*EXACT, *CODED])
def test_replicas_stay_equal_to_the_bit(name: str) -> None:
    """A hundred steps of DistributedDataParallel, weights and state, without an option."""
    differing, total = zip(*(rank[name] for rank in replicas(name in CODED)), strict=True)
    assert differing == (0, 0)
    assert total[0] > 5000
