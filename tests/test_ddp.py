"""Replicas: R is reduced instead of gradients, gradients are released, and those that differ are found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lowmem.optim import Fira, GaLore, SubspaceReduction, enable_gradient_release
from torch import nn

from tests.distributed import replicas
from tests.distributed.measure import distance
from tests.distributed.replicas import batch, loss_of, net
from tests.distributed.world import World

WHOLE = 24 * 40 + 40 + 40 * 12 + 12
LOW = 4 * 40 + 40 + 4 * 40 + 12
"""Elements of all gradients, and with R in the place of those of matrices."""


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    started = World(2)
    yield started
    started.close()


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    started = World(4)
    yield started
    started.close()


def test_replicas_that_send_r_follow_the_run_of_whole_gradients(two: World) -> None:
    (found, sent), (other, _) = two.run(replicas.reduced, 8)
    model = net()
    optimizer = GaLore(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3)
    for step in range(8):
        for rank in range(2):
            (loss_of(model, batch(step, rank)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in replicas.arrays(model).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-10)
        assert found[name].tobytes() == other[name].tobytes()
    assert sent == [WHOLE if step % 3 == 0 else LOW for step in range(8)]


@pytest.mark.parametrize("unused", [[True, True], [False, True]], ids=["by all", "by one"])
def test_weights_that_replicas_did_not_use_are_those_of_whole_gradients(two: World, unused: list[bool]) -> None:
    (whole, _), (found, other) = (two.run(replicas.branches, reduces, unused) for reduces in (False, True))
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-10)
        assert found[name].tobytes() == other[name].tobytes()


def test_methods_that_need_whole_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="Fira uses whole gradients in every step"):
        SubspaceReduction(Fira(net().parameters(), rank=4))


class TestRelease:
    @pytest.mark.parametrize("name", replicas.METHODS)
    @pytest.mark.parametrize("max_norm", [None, 0.01])
    def test_replicas_are_those_of_ddp_to_the_bit(self, two: World, name: str, max_norm: float | None) -> None:
        expected = two.run(replicas.data_parallel, name, max_norm)
        for (found, kept), known in zip(two.run(replicas.released, name, max_norm), expected, strict=True):
            assert kept == 0
            assert [key for key in known if found[key].tobytes() != known[key].tobytes()] == []

    def test_micro_batches_are_averaged_in_the_subspace(self, two: World) -> None:
        (found, sent), (other, _) = two.run(replicas.accumulated, True)
        expected, _ = two.run(replicas.accumulated, False)[0]
        assert distance(found, expected) < 1e-9
        assert distance(found, other) == 0.0
        assert sent == [WHOLE if step % 6 == 0 else LOW for step in range(replicas.STEPS)]

    def test_replicas_that_start_apart_are_refused(self, two: World) -> None:
        assert all("replicas differ in weight of parameter 0 (40, 24)" in s for s in two.run(replicas.starting_apart))

    def test_a_model_in_ddp_is_told_what_to_write(self, tmp_path: str) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(net())
            with pytest.raises(
                ValueError, match=r"release the bare model, .*replicas=torch\.distributed\.group\.WORLD"
            ):
                enable_gradient_release(model, GaLore(model.parameters(), rank=4))
        finally:
            torch.distributed.destroy_process_group()


class TestCheck:
    @pytest.mark.parametrize("name", replicas.METHODS)
    def test_replicas_of_one_run_are_equal(self, two: World, name: str) -> None:
        assert two.run(replicas.checked, name, None) == ["equal"] * 2

    @pytest.mark.parametrize("name", ["weight", "basis", "exp_avg", "exp_avg_sq", "step", "missing", "order"])
    def test_a_change_on_a_rank_is_named(self, two: World, name: str) -> None:
        part = {"missing": "exp_avg", "order": "basis"}.get(name, name)
        for said in two.run(replicas.checked, "galore", (2, name, 1)):
            assert f"RuntimeError: replicas differ in {part} of module.2.weight (12, 40): ranks [1] of 2" in said
            assert "1 of 4 parameters differ" in said
            assert ("GaLore(..., replicas=group) shares the bases" in said) == (part == "basis")

    def test_vectors_count_and_the_first_rank_is_the_measure(self, four: World) -> None:
        for said in four.run(replicas.checked, "fira", (1, "exp_avg_sq", 0)):
            assert "differ in exp_avg_sq of module.0.bias (40,): ranks [1, 2, 3] of 4 are not as rank 0" in said

    def test_bases_that_are_shared_already_are_no_remedy(self, two: World) -> None:
        assert two.run(replicas.checked, "galore", None, True) == ["equal"] * 2
        for said in two.run(replicas.checked, "galore", (0, "basis", 1), True):
            assert "differ in basis" in said
            assert "replicas=group" not in said

    def test_hybrid_shards_are_compared_among_copies(self, four: World) -> None:
        equal = four.run(replicas.hybrid, False)
        assert all("ValueError: got sharded parameters" in without for without, _ in equal)
        assert [within for _, within in equal] == ["equal"] * 4
        found = [within for _, within in four.run(replicas.hybrid, True)]
        assert found[0] == found[2] == "equal"
        assert all("differ in exp_avg of parameter " in found[rank] for rank in (1, 3))
        assert all("ranks [1] of 2 are not as rank 0" in found[rank] for rank in (1, 3))
