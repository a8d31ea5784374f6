"""Real processes (gloo): sharded and replicated training against one process, checkpoints, other routes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import layouts, routes, saving, work
from tests.distributed.measure import Arrays, distance, share
from tests.distributed.world import Worlds

SIZES: dict[str, dict[str, int] | None] = {"uneven": None, "even": layouts.EVEN, "large": layouts.LARGE}
world = Worlds()
closing = world.closing()


@lru_cache
def dense(name: str, sizes: str = "uneven", dtype: torch.dtype = torch.float64, steps: int = work.STEPS) -> Arrays:
    return work.trained(name, "dense", SIZES[sizes], dtype, steps)


def numbers(name: str) -> tuple[str, torch.dtype]:
    """Sizes at which a method codes its moments, and the dtype in which it is compared."""
    return ("large", torch.float32) if "8bit" in name else ("uneven", torch.float64)


class TestTraining:
    """Three refreshes in ten steps; `test_distributed_methods.py` has every method in every layout."""

    @pytest.mark.parametrize("name", ["fira", "online", "adafactor", "apollo"])
    def test_the_kept_side_sharded(self, name: str) -> None:
        found = world(4).run(work.trained, name, "kept", layouts.EVEN, torch.float64)[0]
        assert distance(found, dense(name, "even")) < 1e-8

    @pytest.mark.parametrize("name", ["galore", "fira", "adamw"])
    def test_in_fp32(self, name: str) -> None:
        expected, start = (dense(name, dtype=torch.float32, steps=steps) for steps in (work.STEPS, 0))
        found = world(2).run(work.trained, name, "fsdp", None, torch.float32)[0]
        assert share(found, expected, start) < 1e-4

    @pytest.mark.parametrize("name", ["galore", "fira", "adafactor"])
    def test_offloaded_to_the_cpu(self, name: str) -> None:
        """CPUOffloadPolicy, where the mesh is of the CPU too: what a GPU adds is pinned memory and copies."""
        found, devices = world(2).run(routes.offloaded, name, work.STEPS)[0]
        assert devices == {"cpu"}
        assert distance(found, dense(name)) < 1e-8

    @pytest.mark.parametrize("name", ["galore", "fira", "adafactor"])
    def test_offloaded_from_the_device_of_the_mesh(self, name: str) -> None:
        """Offloaded shards of a GPU's mesh: steps, their sums and all state stay on the CPU."""
        found, devices = world(2).run(routes.elsewhere, name, work.STEPS)[0]
        assert devices == {"cpu"}
        assert distance(found, dense(name)) < 1e-8

    def test_the_llama_of_transformers(self) -> None:
        found = world(2).run(work.llama, "fsdp", work.STEPS)[0]
        assert distance(found, work.llama("dense", work.STEPS)) < 1e-4  # parts of it are in fp32 whatever the dtype


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "layout", "flatten"),
        [
            ("galore", "fsdp tp", True),
            ("fira", "hsdp", False),
            ("online", "fsdp", True),
            ("flora", "fsdp", False),
            ("adamw 8bit", "fsdp", True),
            ("galore 8bit", "fsdp", False),
        ],
    )
    def test_resuming_is_the_uninterrupted_run_to_the_bit(self, name: str, layout: str, flatten: bool) -> None:
        sizes, dtype = numbers(name)
        assert world(4).run(saving.resumes, name, layout, SIZES[sizes], dtype, flatten) == [[]] * 4

    @pytest.mark.parametrize("name", ["galore", "flora", "galore 8bit"])
    def test_a_distributed_checkpoint_of_four_ranks_is_read_by_any_number(self, name: str, tmp_path: Path) -> None:
        """Eight ranks have empty pieces of norms and of the bottleneck; one without a mesh reads plain tensors."""
        sizes, dtype = numbers(name)
        saved = world(4).run(saving.save, name, SIZES[sizes], dtype, str(tmp_path))[0]
        for size, layout in ((1, "dense"), (2, "fsdp"), (3, "fsdp"), (8, "fsdp")):
            state, found = world(size).run(saving.load, name, layout, SIZES[sizes], dtype, str(tmp_path))[0]
            assert state.keys() == saved.keys()
            assert [key for key in saved if not saving.same(state[key], saved[key])] == []
            assert dtype == torch.float32 or distance(found, dense(name)) < 1e-8

    @pytest.mark.parametrize("name", ["galore", "fira", "flora", "galore 8bit"])
    def test_a_gathered_state_dict_is_read_sharded_and_plain(self, name: str) -> None:
        sizes, dtype = numbers(name)
        assert world(2).run(saving.full, name, SIZES[sizes], dtype) == [[], []]

    @pytest.mark.parametrize("name", ["galore", "frugal columns", "adafactor", "adamw", "galore 8bit"])
    def test_a_file_of_plain_tensors_is_cut_to_pieces(self, name: str, tmp_path: Path) -> None:
        sizes, dtype = numbers(name)
        made, optimizer = saving.fresh(name, "dense", SIZES[sizes], dtype)
        layouts.train(made, optimizer, range(saving.MIDDLE))
        torch.save({"model": made.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "plain.pt")
        differs, found = world(4).run(saving.plain_file, name, SIZES[sizes], dtype, str(tmp_path / "plain.pt"))[0]
        assert differs == []
        assert dtype == torch.float32 or distance(found, dense(name)) < 1e-8

    def test_sharded_state_is_refused_by_plain_parameters(self) -> None:
        said = world(2).run(saving.sharded_into_plain, "galore")
        assert all("is sharded (DTensor), the parameter is not: gather it, get_optimizer_state_dict" in s for s in said)


class TestRelease:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("galore", {}),
            ("fira", {"max_norm": 0.5}),
            ("adafactor", {"max_norm": 0.5, "clip_by": "matrix"}),
            ("galore", {"max_norm": 0.5, "accumulation_steps": 2}),
        ],
    )
    @pytest.mark.parametrize("layout", ["fsdp", "fsdp tp"])
    def test_gradients_are_released_as_in_one_process(self, name: str, options: Any, layout: str) -> None:
        found, norms = world(4).run(routes.released, name, layout, options, 8)[0]
        expected, known = routes.released(name, "dense", options, 8)
        assert distance(found, expected) < 1e-8
        assert norms == pytest.approx(known, rel=1e-9)


@pytest.mark.parametrize("name", ["galore", "adafactor", "adamw"])
def test_parameters_exchanged_after_the_optimizer_was_made(name: str) -> None:
    """Accelerate puts placeholders, then the sharded parameters, into the groups of an optimizer."""
    pytest.importorskip("accelerate")
    assert distance(world(2).run(routes.exchanged, name, work.STEPS)[0], dense(name)) < 1e-8


class TestZero:
    @pytest.mark.parametrize("cls", ["GaLore", "Fira", "Adafactor", "AdamW8bit"])  # no basis by position
    def test_zero_redundancy_optimizer(self, cls: str) -> None:
        """Whole parameters are dealt to ranks; the consolidated state is that of one optimizer."""
        (found, state, kept), (other, _, rest) = world(2).run(routes.zero, cls, work.STEPS)
        expected, known = routes.zero_dense(cls, work.STEPS)
        assert distance(found, expected) < 1e-8
        assert distance(other, expected) < 1e-8
        assert distance(state, known) < 1e-8
        assert kept + rest == len(expected)
        assert kept < len(expected) > rest

    @pytest.mark.parametrize("cls", ["GaLore", "Flora"])
    def test_resuming(self, cls: str) -> None:
        assert world(2).run(routes.zero_resumes, cls, saving.MIDDLE, saving.END) == [True, True]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ((routes.fsdp1, False), r"parameter of FullyShardedDataParallel, .*fully_shard\(model\)"),
        ((routes.fsdp1, True), r"parameter of FullyShardedDataParallel, .*fully_shard\(model\)"),
        ((routes.partial,), r"Partial.* need Shard\(0\), Shard\(1\) or Replicate\(\)"),
        ((routes.columns, "8bit"), r"state_dtype='8bit' has blocks along its rows, .*'state_dtype': 'bfloat16'"),
        ((routes.columns, "bnb8"), r"state_dtype='bnb8' has blocks along its rows, .*Shard\(0\)"),
    ],
)
def test_what_cannot_be_stepped_is_refused_with_the_remedy(case: tuple[Any, ...], said: str) -> None:
    with pytest.raises(AssertionError, match=f"NotImplementedError: got a .*{said}"):
        world(2).run(*case)


@pytest.mark.parametrize("state_dtype", ["8bit", "bnb8"])
def test_long_vectors_are_sharded_and_stay_in_fp32(state_dtype: str) -> None:
    assert world(4).run(routes.long_vector, state_dtype) == [(True, "torch.float32")] * 4
