"""What a comparison plans, decides and shows, without a training run."""

import json
import math
import sys

import pytest
from lowmem.bench import compare as comparison
from lowmem.bench import grids
from lowmem.bench.cli import main
from lowmem.bench.compare import Plan, compare
from lowmem.bench.config import RunConfig
from lowmem.bench.errors import UserError
from lowmem.bench.grids import GRIDS, published
from lowmem.bench.models import build_model
from lowmem.bench.optimizers import available, build_optimizer, run_options
from lowmem.bench.options import parse_options
from lowmem.bench.report import Curve, Row, cells, comparison_picture, mean_curve
from lowmem.bench.search import Entry, Outcome, Result, Run, best, expand, first_runs, parse_entry, repeat_runs

SHARED = RunConfig(model="tiny", seed=5)
HIDDEN = 128
SECONDS = {"median": 0.1, "p95": 0.1, "max": 0.1}
SUMMARY = {
    "optimizer_state_bytes": 8,
    "peak_memory_bytes": 8,
    "optimizer_step_s": SECONDS,
    "step_s": SECONDS,
    "tokens_per_s": 1,
}


def points(text):
    return [point.text for point in expand(parse_entry(text))]


def ended(lr, loss, seed=5):
    point = parse_entry(f"adamw lr={lr}")
    folder = point.folder if seed == SHARED.seed else f"{point.folder}_seed{seed}"
    if math.isfinite(loss):
        return Outcome(Run(point, seed, folder), {**SUMMARY, "val_loss": loss})
    return Outcome(Run(point, seed, folder), error="the loss is nan", diverged=True)


def test_a_grid_is_the_product_of_its_values():
    assert points("galore lr=1e-2|2e-2 rank=8|4") == [
        "galore lr=1e-2 rank=8",
        "galore lr=1e-2 rank=4",
        "galore lr=2e-2 rank=8",
        "galore lr=2e-2 rank=4",
    ]
    assert points("adamw") == ["adamw"]
    assert points("adamw lr=1e-3") == ["adamw lr=1e-3"]


@pytest.mark.parametrize("text", ["lr=1e-3|", "lr=|1e-3", "lr=1e-3||2e-3"])
def test_a_grid_with_a_gap_is_refused(text):
    with pytest.raises(UserError, match="a value on both sides"):
        expand(parse_entry(f"adamw {text}"))


def test_an_option_given_twice_is_refused():
    with pytest.raises(UserError, match=r"update_proj_gap is given twice, 5 and 6: write update_proj_gap=5\|6"):
        parse_entry("galore update_proj_gap=5 update-proj-gap=6")


def test_the_shared_seed_keeps_the_folder_and_others_are_named():
    (run,) = first_runs(expand(parse_entry("galore lr=1e-2 rank=4")), seed=5)
    assert (run.folder, run.seed) == ("galore_lr_1e-2_rank_4", 5)
    more = repeat_runs(Outcome(run, {"val_loss": 1.0}), seeds=3)
    assert [(other.folder, other.seed) for other in more] == [
        ("galore_lr_1e-2_rank_4_seed6", 6),
        ("galore_lr_1e-2_rank_4_seed7", 7),
    ]
    assert repeat_runs(Outcome(run, {"val_loss": 1.0}), seeds=1) == repeat_runs(None, seeds=3) == []


def test_the_best_point_is_the_lowest_finite_loss():
    outcomes = [ended(1, math.inf), ended(2, 3.0), ended(3, 2.0), ended(4, 2.0)]
    assert best(outcomes) is outcomes[2]
    assert best(outcomes[:1]) is None


def test_a_diverged_run_is_a_failure_only_where_no_point_is_left():
    lost, good, crash = ended(1, math.inf), ended(2, 3.0), Outcome(Run(Entry("adamw", {}), 5, "x"), error="no memory")
    entry = parse_entry("adamw lr=1|2")
    assert Result(entry, [lost, good], [ended(2, math.inf, 6)]).failures == []
    assert Result(entry, [lost], []).failures == [lost]
    assert Result(entry, [lost, good, crash], []).failures == [crash]


def test_json_holds_every_point_and_every_seed():
    result = Result(parse_entry("adamw lr=1|2"), [ended(1, math.inf), ended(2, 3.0)], [ended(2, 2.5, 6)])
    listed = json.loads(json.dumps(result.to_json()))
    assert [point["val_loss"] for point in listed["points"]] == [None, 3.0]
    assert listed["points"][0]["diverged"] is True
    assert listed["points"][0]["error"] == "the loss is nan"
    assert listed["points"][1]["options"] == {"lr": "2"}
    assert [(seed["seed"], seed["val_loss"]) for seed in listed["seeds"]] == [(5, 3.0), (6, 2.5)]


@pytest.mark.parametrize("entries", [["adamw lr=1|1"], ["adamw lr=1|2", "galore", "adamw lr=2"]])
def test_a_point_that_is_there_twice_is_refused(entries, tmp_path):
    with pytest.raises(UserError, match="is there 2 times"):
        compare([parse_entry(text) for text in entries], Plan(SHARED, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare_and_a_seed_too_large_are_refused(tmp_path):
    with pytest.raises(UserError, match="give an ENTRY"):
        compare([], Plan(SHARED, tmp_path / "out"))
    with pytest.raises(UserError, match="--seed is"):
        compare([parse_entry("adamw")], Plan(RunConfig(seed=2**32 - 1), tmp_path / "out", seeds=2))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder that can be written to"):
        compare([parse_entry("adamw")], Plan(SHARED, tmp_path / "file"))


def test_all_are_the_published_optimizers_that_exist_in_the_order_of_the_table(monkeypatch):
    entries = published("all", SHARED)
    assert [entry.optimizer for entry in entries] == [name for name in GRIDS if name in available()]
    assert {"adamw", "galore", "fira", "onlinesubspacedescent", "adafactor"} <= {e.optimizer for e in entries}
    assert published("", SHARED) == []
    monkeypatch.setitem(grids.GRIDS, "not_there_yet", "lr=1")
    assert [entry.optimizer for entry in published("all", SHARED)] == [entry.optimizer for entry in entries]


def test_published_entries_get_rank_and_interval_where_they_exist(monkeypatch):
    adamw, galore, osd = published("adamw, galore,onlinesubspacedescent", SHARED)
    assert adamw.text == f"adamw {GRIDS['adamw']}"
    assert galore.text == f"galore {GRIDS['galore']} rank={HIDDEN // 4} update_proj_gap=50"
    assert osd.text == f"onlinesubspacedescent {GRIDS['onlinesubspacedescent']} rank={HIDDEN // 4}"
    assert published("galore", SHARED, rank=7, gap=9)[0].text.endswith("rank=7 update_proj_gap=9")
    monkeypatch.setitem(grids.GRIDS, "galore", "lr=1 update_proj_gap=200")
    assert published("galore", SHARED)[0].texts["update_proj_gap"] == "200"
    assert published("galore", SHARED, gap=9)[0].texts["update_proj_gap"] == "9"


def test_every_published_point_is_accepted_by_its_optimizer():
    model = build_model("tiny")
    for point in (point for entry in published("all", SHARED) for point in expand(entry)):
        options = parse_options(point.optimizer, run_options(point.optimizer), point.texts)
        build_optimizer(point.optimizer, options, model, seed=0)


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        ("adamw,galor", {}, "unknown optimizer 'galor'. Did you mean galore"),
        ("galoreadamw", {}, "galoreadamw has no published grid"),
        ("", {"rank": 4}, "--rank 4: it fills in the grids of --optimizers; in an ENTRY write rank=4"),
        ("adamw", {"gap": 4}, "--gap 4: none of adamw has update_proj_gap"),
    ],
)
def test_bad_names_and_flags_without_effect_are_refused(names, flags, message):
    with pytest.raises(UserError) as error:
        published(names, SHARED, **flags)
    assert message in str(error.value)


def test_the_command_hands_all_its_flags_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(comparison, "compare", lambda *arguments: calls.append(arguments))
    words = ["adamw lr=1|2", "--optimizers=galore", "--rank=3", "--gap=7", "--seeds=2", "--save-every=4", "--seed=5"]
    monkeypatch.setattr(sys, "argv", ["lowmem", "compare", *words, f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 0
    ((entries, plan),) = calls
    assert [entry.text for entry in entries] == ["adamw lr=1|2", f"galore {GRIDS['galore']} rank=3 update_proj_gap=7"]
    assert plan == Plan(SHARED, tmp_path, seeds=2, save_every=4)


def test_rows_show_mean_and_deviation_over_the_seeds():
    rows = [
        Row("one", "", SUMMARY, [2.0], 1),
        Row("three", "", SUMMARY, [1.0, 2.0, 3.0], 3),
        Row("two", "", SUMMARY, [3.0, 5.0], 3),
    ]
    assert [row[5:7] for row in cells(rows)] == [
        ("2.0000", "+0.00 %"),
        ("2.000 ± 1.000", "+0.00 %"),
        ("4.000 ± 1.414 (2 of 3 seeds)", "+100.00 %"),
    ]


def test_the_curve_of_several_seeds_is_their_mean_with_a_band(tmp_path):
    one, two = (Curve("a", ([1, 2], [4.0, 2.0 + d]), ([2], [1.0 + d])) for d in (0.0, 1.0))
    mean = mean_curve([one, two])
    assert mean == Curve("a", ([1, 2], [4.0, 2.5]), ([2], [1.5]), ([1.0], [2.0]))
    assert mean_curve([one]) == one
    comparison_picture(tmp_path / "picture.png", [mean], [Row("a", "", SUMMARY, [1.0, 2.0], 2)])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
