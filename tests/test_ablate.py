"""The ablation lab without a browser: what a grid means, where runs happen, what is kept, reported and resumed."""

import io
import json
import re
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from lowmem.bench.cli import main
from lowmem.bench.commands import app
from lowmem.bench.errors import Diverged, UserError
from lowmem.bench.lab import ablate as laboratory
from lowmem.bench.lab import spec
from lowmem.bench.lab.ablate import Settings, ablate
from lowmem.bench.lab.command import HELP
from lowmem.bench.lab.execute import Ended, Processes, RayCluster, Task, executor_of, own_threads, run_all
from lowmem.bench.lab.figures import published
from lowmem.bench.lab.lock import locked
from lowmem.bench.lab.points import all_runs, matches, override, points_of, refuse_idle, seeds_of
from lowmem.bench.lab.progress import LabProgress
from lowmem.bench.lab.spec import Lab, parse, parse_seeds, preset_names, read_preset
from lowmem.bench.search import Outcome, Run, parse_entry
from rich.console import Console

SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BUDGET = {"steps": "4", "length": "8", "batch_size": "2", "eval_every": "2", "eval_batches": "1", "warmup": "0"}


def lab(*entries, **shared):
    return Lab("a title", [parse_entry(text) for text in entries], shared)


def folders(ablation):
    return [run.folder for _, run in all_runs(ablation, points_of(ablation))]


# What a grid means


def test_the_file_of_the_documentation_is_complete_and_means_what_it_says():
    text = spec.__doc__.partition("A complete file:\n")[2].partition("\nScalars are")[0]
    ablation = parse(textwrap.dedent(text), "the docstring", "name")
    points = points_of(ablation)
    assert len(points) == 2 * 2 + 2 * 2 * 2 * 2
    assert {point.config.dtype for point in points} == {"fp32", "bf16"}
    rounded = [p for p in points if p.config.options.get("rounding") == "stochastic"]
    assert {(p.config.optimizer, p.config.dtype) for p in rounded} == {("galore", "bf16")}
    assert len(rounded) == 8
    assert [published(p, ablation.paper) for p in points[:4]] == [None, 34.06, None, 34.06]
    assert seeds_of(ablation, points[0]) == [0, 1, 2]


def test_a_grid_is_a_list_or_a_mapping_from_optimizers():
    listed = parse("grid: [adamw lr=1|2, {optimizer: lisa, update-proj-gap: [3, 4]}]", "", "name")
    mapped = parse("grid: {adamw: {lr: [1, 2]}, lisa: {update_proj_gap: 3|4}}", "", "name")
    assert listed == mapped
    assert [entry.text for entry in listed.grid] == ["adamw lr=1|2", "lisa update_proj_gap=3|4"]


def test_runs_are_named_as_compare_names_them_and_every_point_has_every_seed():
    assert folders(Lab("", [parse_entry("galore lr=1e-2|2e-2 rank=4")], {"seed": "5"}, 2)) == [
        "galore_lr_1e-2_rank_4",
        "galore_lr_2e-2_rank_4",
        "galore_lr_1e-2_rank_4_seed6",
        "galore_lr_2e-2_rank_4_seed6",
    ]
    assert folders(Lab("", [parse_entry("adamw")], {}, (3, 0))) == ["adamw_seed3", "adamw"]


def test_options_of_pretrain_are_axes_in_entries_and_in_shared():
    points = points_of(lab("adamw lr=1e-3 steps=5|10", model="tiny", dtype="fp32|bf16"))
    assert [(p.config.steps, p.config.dtype) for p in points] == [(5, "fp32"), (5, "bf16"), (10, "fp32"), (10, "bf16")]
    assert points[1].entry.folder == "adamw_lr_1e-3_steps_5_dtype_bf16"
    assert points[1].flags == ["--lr=1e-3"]


def test_what_an_entry_says_itself_is_no_case():
    cases = [spec.Case({"model": ["9m"]}, {"rank": "32", "steps": "7"})]
    ablation = Lab("", [parse_entry("galore rank=4"), parse_entry("galore")], {"model": "tiny|9m"}, cases=cases)
    found = [(p.config.model, p.config.options.get("rank"), p.config.steps) for p in points_of(ablation)]
    assert found == [("tiny", 4, 1000), ("9m", 4, 7), ("tiny", None, 1000), ("9m", 32, 7)]


def test_setting_an_option_keeps_the_folders_of_the_grid():
    ablation = lab("adamw lr=1e-3|2e-3", "galore lr=1e-2 rank=4|8", model="tiny|9m", steps="10")
    some = override(override(ablation, "model", "tiny"), "steps", "5")
    assert set(folders(some)) < set(folders(ablation))
    assert {point.config.steps for point in points_of(some)} == {5}
    ranks = points_of(override(some, "rank", "2"))
    assert [point.config.options.get("rank") for point in ranks] == [None, None, 2]
    with pytest.raises(UserError, match=r"of the grid has it\. Did you mean gamma"):
        override(lab("fira"), "gama", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [", "is no YAML"),
        ("grit: [adamw]", "'grit'. Did you mean grid"),
        ("grid: adamw", "grid is 'adamw': it must be a list"),
        ("grid: [{lr: 1}]", "names no optimizer"),
        ("grid: [{optimizer: adamw, lr: {a: 1}}]", "neither a value nor a list"),
        ("seeds: 0", "seeds is 0"),
        ("cases: [{when: {model: 9m}, put: {}}]", "'put'"),
        ("cases: [{when: {}, set: {steps: [1, 2]}}]", "several values"),
        ("paper: {figures: [{model: 9m}]}", "needs perplexity"),
        ("paper: {loss: test}", "val or train"),
        ("paper: {source: a, figures: [{perplexity: nan}]}", "a number above 0"),
        ("paper: {source: a, figures: [{perplexity: -3}]}", "a number above 0"),
        ("paper: {figures: [{perplexity: 3}]}", "paper needs source"),
        ("seeds: 2\nseeds: 3", "seeds is there twice in one mapping, again in line 2"),
        ("grid: [{optimizer: adamw, lr: 1, lr: 2}]", "lr is there twice"),
        ("grid: [{optimizer: galore, update-proj-gap: 1, update_proj_gap: 2}]", "update_proj_gap is there twice"),
        ("grid: {adamw: {optimizer: galore}}", "adamw is the optimizer already"),
        ("grid: " + "[" * 3000, "nested too deeply"),
        ("cases: [{when: {}, set: {seed: 1}}]", "write seeds: [0, 1]"),
        ("title: [a, b]", "title is ['a', 'b']: it must be a text"),
        ("notes: [a: b]", "it must be a text; put it in quotes"),
    ],
)
def test_a_file_that_means_nothing_is_refused(text, message):
    with pytest.raises(UserError) as error:
        parse(text, "--file x.yaml", "x")
    assert str(error.value).startswith("--file x.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        (lab(), "no grid: give an ENTRY"),
        (lab("adamw lr=1|1"), "is there 2 times"),
        (lab("adamw", rank="4"), "shared has 'rank', no option of pretrain"),
        (lab("adamw seed=1|2"), "write seeds: [0, 1]"),
        (lab("adamw", seed="3|4"), "write seeds: [3, 4]"),
        (lab("adam"), "unknown optimizer 'adam'. Did you mean badam or adamw"),
        (lab("galore rang=4"), "no option 'rang' of galore or of pretrain. Did you mean rank"),
        (lab("galore rank=0"), "galore rank=0: galore: "),
        (lab("galore lr=inf"), "lr is inf: it must be finite"),
        (lab("galore lr=fast"), "--lr fast: it takes float"),
        (lab("adamw steps=0"), "--steps is 0: it must be 1 or more"),
        (lab("adamw model=12m"), "unknown model '12m'"),
        (Lab("", [parse_entry("adamw")], cases=[spec.Case({"modle": ["9m"]}, {})]), "Did you mean model"),
    ],
)
def test_every_point_is_checked_before_anything_runs(ablation, message, tmp_path):
    with pytest.raises(UserError) as error:
        ablate(ablation, Settings(tmp_path / "out"))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_last_seed_that_is_too_large_is_refused():
    ablation = Lab("", [parse_entry("adamw")], {"seed": str(2**32 - 1)}, 2)
    with pytest.raises(UserError, match="--seed is"):
        seeds_of(ablation, points_of(ablation)[0])


def test_shared_options_may_have_dashes():
    assert parse("shared: {batch-size: 4}\ngrid: [adamw]", "", "name").shared == {"batch_size": "4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cases: [{when: {optimizer: galroe}, set: {rank: 4}}]", "cases: no point of the grid has optimizer: galroe"),
        ("cases: [{when: {optimizer: galroe}, set: {rank: 4}}]", "it is adamw, galore. Did you mean galore?"),
        ("cases: [{when: {optimizer: [galore, fira]}, set: {rank: 4}}]", "has optimizer: fira"),
        ("cases: [{when: {optimizer: adamw, rank: 4}, set: {lr: 1}}]", "has all of optimizer: adamw, rank: 4"),
        ("paper: {source: a, figures: [{model: 9m, perplexity: 3}]}", "figures: no point of the grid has model: 9m"),
    ],
)
def test_conditions_that_no_point_meets_are_refused(text, message):
    with pytest.raises(UserError) as error:
        refuse_idle(parse(f"grid: [adamw, galore rank=4]\n{text}", "", "name"))
    assert message in str(error.value)


def test_defaults_of_optimizers_can_be_asked_for():
    cases = [spec.Case({"update_proj_gap": ["200"]}, {"rank": "4"})]
    ablation = Lab("", [parse_entry("galore"), parse_entry("galore update_proj_gap=50")], cases=cases)
    refuse_idle(ablation)
    assert [point.config.options.get("rank") for point in points_of(ablation)] == [4, None]


def test_the_file_of_the_help_means_something():
    text = HELP.partition("\b\n")[2].partition("\nValues are")[0]
    ablation = parse(textwrap.dedent(text), "the help", "name")
    refuse_idle(ablation)
    assert len(points_of(ablation)) == 2 * 2 + 2 * 2 * 2 * 2


def test_seeds_are_a_number_or_a_list():
    assert [parse_seeds("3"), parse_seeds("0,1,5"), parse_seeds(["7"])] == [3, (0, 1, 5), (7,)]
    with pytest.raises(UserError, match="different ones"):
        parse_seeds("1,1")


@pytest.mark.parametrize("name", preset_names())
def test_presets_build_and_their_figures_belong_to_points(name):
    ablation = read_preset(name)
    points = points_of(ablation)
    assert all(point.state_bytes for point in points if point.config.model in ("9m", "60m"))
    for when, perplexity in ablation.paper.figures:
        assert perplexity > 1
        assert any(matches(when, point.facts) for point in points)
    if ablation.paper.source:
        assert all(published(point, ablation.paper) for point in points)


def test_presets_take_the_papers_recipe():
    points = {(p.config.model, p.entry.optimizer): p for p in points_of(read_preset("galore-table2"))}
    ranks = {model: points[model, "galore"].config.options["rank"] for model in ("60m", "130m", "350m", "1b")}
    assert ranks == {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
    assert {p.config.tokens_per_step for p in points.values()} == {512 * 256}
    # min r + 2 max r of every matrix and two moments of all else, in bf16.
    assert points["60m", "galore"].state_bytes == pytest.approx(0.164e9, rel=3e-3)
    assert published(points["1b", "galore"], read_preset("galore-table2").paper) == 15.64


def test_a_dry_run_lists_runs_tokens_state_and_the_papers_perplexity(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["ablate", "--preset=galore-table2", "--set", "model=60m", "--set=lr=1e-2", "--steps=100", "--seeds=2"]
    assert lowmem(monkeypatch, *words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "3 points x 2 seeds = 6 runs, 78.64 M tokens" in shown
    assert "34.88" in shown
    assert "163.7 MB" in shown
    assert not list(tmp_path.iterdir())


# Where runs happen


class Pretend:
    """An executor whose tasks end when the test says so, or at once."""

    def __init__(self, slots, result=None):
        self.slots, self.result = slots, result
        self.under_way, self.slots_used, self.most, self.stopped = {}, [], 0, False

    def submit(self, task, slot):
        future = Future()
        self.slots_used.append(slot)
        self.under_way[task] = future
        self.most = max(self.most, sum(not other.done() for other in self.under_way.values()))
        if self.result:
            threading.Timer(0.01, lambda: self.result(future, task)).start()
        return future

    def stop(self):
        self.stopped = True


def test_tasks_start_in_order_in_free_slots_and_one_that_breaks_stops_no_other():
    def result(future, task):
        if task.log == "2":
            future.set_exception(RuntimeError("the node is gone"))
        else:
            future.set_result(Ended(0, task.log))

    executor, started = Pretend(2, result), []
    ends = dict(run_all([Task((), ".", str(number)) for number in range(5)], executor, started.append))
    assert started == [0, 1, 2, 3, 4]
    assert ends == {n: Ended(1, "the node is gone") if n == 2 else Ended(0, str(n)) for n in range(5)}
    assert executor.most == 2
    assert set(executor.slots_used) == {0, 1}
    assert executor.stopped


def test_an_interrupt_stops_what_is_under_way():
    def interrupt(number):
        if number == 1:
            raise KeyboardInterrupt

    executor = Pretend(2)
    with pytest.raises(KeyboardInterrupt):
        list(run_all([Task((), ".", "a"), Task((), ".", "b")], executor, interrupt))
    assert executor.stopped


SAY = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES']); sys.exit('sorry')"


def test_processes_share_threads_and_devices_and_keep_logs(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    tasks = [Task(("-c", SAY), str(tmp_path), str(tmp_path / f"{number}.log")) for number in range(2)]
    executor = Processes(2)
    assert dict(run_all(tasks, executor, lambda number: None)) == dict.fromkeys(range(2), Ended(1, "sorry\n"))
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert logs == ["3 4\nsorry\n", "3 7\nsorry\n"]
    assert [share // 6 for share in (Processes(1).threads, Processes(20).threads)] == [1, 0]


def test_processes_end_when_they_are_stopped(tmp_path):
    executor = Processes(1)
    future = executor.submit(Task(("-c", "import time; time.sleep(60)"), str(tmp_path), str(tmp_path / "log")), 0)
    while not executor._children:
        time.sleep(0.01)
    start = time.monotonic()
    executor.stop()
    assert future.result().code != 0
    assert time.monotonic() - start < 30


def test_threads_are_those_of_the_environment_or_of_the_processors(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert own_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert own_threads() >= 1


def pretend_ray(calls):
    """Return a stand-in for the module: tasks run at once, in this process."""

    def remote(**resources):
        calls.append(resources)

        def wrap(function):
            def start(*arguments):
                future = Future()
                future.set_result(function(*arguments))
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=start)

        return wrap

    return SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **options: calls.append("init"),
        cluster_resources=lambda: {"CPU": 8.0, "GPU": 1.0},
        remote=remote,
        cancel=lambda reference: calls.append("cancel"),
        shutdown=lambda: calls.append("shutdown"),
    )


def test_tasks_of_ray_get_their_share_of_the_cluster(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setitem(sys.modules, "ray", pretend_ray(calls))
    task = Task(("-c", "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])"), str(tmp_path), str(tmp_path / "log"))
    assert dict(run_all([task], executor_of("ray", 2), lambda number: None)) == {0: Ended(1, "4\n")}
    assert calls == ["init", {"num_cpus": 4, "num_gpus": 0.5, "max_retries": 0}, "cancel", "shutdown"]


def test_ray_that_is_not_installed_and_unknown_executors_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'which is not installed: pip install "lowmem\[ray\]"'):
        executor_of("ray", 1)
    with pytest.raises(UserError, match="--executor slurm: it must be processes or ray"):
        executor_of("slurm", 1)


def test_a_real_cluster_runs_a_task(tmp_path):
    pytest.importorskip("ray", reason='Ray is not installed: pip install "lowmem[ray]"')
    task = Task(("-c", "raise SystemExit('from the cluster')"), str(tmp_path), str(tmp_path / "log"))
    assert dict(run_all([task], RayCluster(1), lambda number: None)) == {0: Ended(1, "from the cluster\n")}
    assert (tmp_path / "log").read_text() == "from the cluster\n"


def test_a_terminal_shows_what_is_finished_what_runs_and_when_all_is_through():
    now = [0.0]
    console = Console(force_terminal=True, width=140, file=io.StringIO(), highlight=False, get_time=lambda: now[0])
    outcome = Outcome(Run(parse_entry("adamw"), 0, "adamw"), {"val_loss": 2.0})
    with LabProgress(console, 4, 1) as progress:
        for label in ("a run", "another", "the last"):
            progress.start(label)
            now[0] += 600
            if label != "the last":
                progress.end(label, outcome)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue())
    assert "1 of 4 runs are there already" in shown
    assert "[3/4] another: validation loss 2.0000" in shown
    assert "3/4 0:30:00 eta 0:10:00 running the last" in shown


# What is kept, reported and resumed


class Inline:
    """An executor that runs the very command in this process, which is faster; and can fail or be interrupted."""

    slots = 1

    def __init__(self, break_at=None, error=None):
        self.seen, self.break_at, self.error = [], break_at, error

    def submit(self, task, slot):
        self.seen.append(task.words)
        future = Future()
        if len(self.seen) == self.break_at and isinstance(self.error, KeyboardInterrupt):
            app([*task.words[2:], "--stop-after=2"], standalone_mode=False)
            raise self.error
        try:
            if len(self.seen) == self.break_at:
                raise self.error
            app(list(task.words[2:]), standalone_mode=False)
            future.set_result(Ended(0))
        except UserError as error:
            future.set_result(Ended(Diverged.exit_code if isinstance(error, Diverged) else 1, f"lowmem: {error}"))
        return future

    def stop(self):
        pass


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps(SMALL))
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return {"model": "small.json", "data": "text.txt", **BUDGET}


def run(monkeypatch, ablation, executor, **settings):
    monkeypatch.setattr(laboratory, "executor_of", lambda name, jobs: executor)
    ablate(ablation, Settings(Path("out"), save_every=1, **settings))
    return json.loads(Path("out/ablate.json").read_text())


def test_finished_and_diverged_runs_are_kept_and_never_run_again(small, monkeypatch, capsys):
    ablation = Lab("", [parse_entry("adamw lr=1e-2|1e38"), parse_entry("galore lr=1e-2 rank=2")], small, 2)
    figures = run(monkeypatch, ablation, first := Inline())
    assert len(first.seen) == 6
    assert "[6/6]" in capsys.readouterr().out
    good, lost, galore = figures["rows"]
    assert [row["best"] for row in figures["rows"]] == [True, False, True]
    assert (lost["val_loss"], lost["diverged"], good["diverged"]) == (None, 2, 0)
    losses = [item["val_loss"] for item in good["runs"]]
    assert good["val_loss"] == pytest.approx(sum(losses) / 2)
    assert good["val_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert galore["state_bytes"] < good["state_bytes"]
    assert good["curve"]["low"][-1] == pytest.approx(min(losses), rel=1e-4)
    assert [(item["kind"], item["seed"]) for item in figures["failures"]] == [("diverged", 0), ("diverged", 1)]
    assert figures["shared"]["model"] == "small.json"
    assert figures["versions"][0]["lowmem"]
    assert run(monkeypatch, ablation, second := Inline()) == figures
    assert second.seen == []
    for name in ("ablate.html", "ablate.png", "ablate.md"):
        assert (Path("out") / name).stat().st_size > 100


def test_a_run_that_fails_stops_no_other_and_is_tried_again(small, monkeypatch):
    ablation = Lab("", [parse_entry("adamw lr=1e-2|1e-3")], small)
    with pytest.raises(UserError, match="1 of 2 runs failed: adamw_lr_1e-2: no memory"):
        run(monkeypatch, ablation, Inline(1, UserError("no memory")))
    figures = json.loads(Path("out/ablate.json").read_text())
    assert [row["val_loss"] is None for row in figures["rows"]] == [True, False]
    assert figures["failures"] == [{"run": "adamw lr=1e-2", "seed": 0, "kind": "failed", "error": "no memory"}]
    assert run(monkeypatch, ablation, again := Inline())["failures"] == []
    assert len(again.seen) == 1


def test_an_interrupted_ablation_reports_what_is_there_and_goes_on_from_the_checkpoint(small, monkeypatch):
    ablation = Lab("", [parse_entry("adamw lr=1e-2|1e-3")], small)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, ablation, Inline(2, KeyboardInterrupt()))
    figures = json.loads(Path("out/ablate.json").read_text())
    assert [item["kind"] for item in figures["failures"]] == ["missing"]
    resumed = run(monkeypatch, ablation, again := Inline())
    assert ["--resume" in words for words in again.seen] == [True]
    straight = Settings(Path("straight"))
    ablate(ablation, straight)
    losses = [row["val_loss"] for row in json.loads(Path("straight/ablate.json").read_text())["rows"]]
    assert [row["val_loss"] for row in resumed["rows"]] == losses


def test_a_pruned_run_keeps_its_figures_alone(small, monkeypatch):
    ablation = Lab("", [parse_entry("adamw lr=1e-2|1e38")], small)
    figures = run(monkeypatch, ablation, Inline(), prune=True)
    left = {path.name for path in Path("out/adamw_lr_1e-2").iterdir()}
    assert left == {"config.json", "metrics.jsonl", "summary.json", "loss.png"}
    assert not list(Path("out/adamw_lr_1e38").glob("checkpoint*"))
    assert (Path("out/adamw_lr_1e38") / "diverged.json").exists()
    assert run(monkeypatch, ablation, Inline()) == figures


def test_runs_that_were_finished_before_are_pruned_too(small, monkeypatch):
    ablation = Lab("", [parse_entry("adamw lr=1e-2")], small)
    run(monkeypatch, ablation, Inline())
    assert Path("out/adamw_lr_1e-2/model").exists()
    run(monkeypatch, ablation, again := Inline(), prune=True)
    assert again.seen == []
    assert not Path("out/adamw_lr_1e-2/model").exists()


def test_a_folder_holds_one_ablation_at_a_time(small, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no flock")
    ablation = Lab("", [parse_entry("adamw lr=1e-2")], small)
    with locked(Path("out")), pytest.raises(UserError, match="another lowmem ablate works in out: wait for it"):
        run(monkeypatch, ablation, Inline())
    assert len(run(monkeypatch, ablation, Inline())["rows"]) == 1


def test_a_report_of_nothing_says_what_is_missing_and_creates_nothing(small):
    with pytest.raises(UserError, match="out holds none of the 1 runs, such as adamw_lr_1e-2"):
        ablate(lab("adamw lr=1e-2", **small), Settings(Path("out"), run=False))
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_in_between_costs_no_report(small, monkeypatch):
    ablation = Lab("", [parse_entry("adamw lr=1e-2")], small)
    run(monkeypatch, ablation, Inline())
    metrics = Path("out/adamw_lr_1e-2/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    next(line for line in lines if line["kind"] == "eval")["loss"] = float("nan")
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = run(monkeypatch, ablation, Inline())["rows"]
    assert row["curve"]["loss"][0] is None
    assert row["curve"]["loss"][-1] == pytest.approx(row["val_loss"], rel=1e-4)


def test_a_folder_of_another_configuration_is_refused_before_anything_runs(small, monkeypatch):
    run(monkeypatch, Lab("", [parse_entry("adamw lr=1e-2")], small), Inline())
    with pytest.raises(UserError, match=r"config\.steps is 4 there, 5 here"):
        run(monkeypatch, Lab("", [parse_entry("adamw lr=1e-2|1e-3")], {**small, "steps": "5"}), Inline())


def lowmem(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lowmem", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.slow
def test_the_command_runs_processes_side_by_side_and_reports_what_is_there(small, monkeypatch, capsys):
    Path("lab.yaml").write_text("title: Two\nshared: {steps: 3}\ngrid: [{optimizer: adamw, lr: [1e-2, 1e38]}]\n")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    assert lowmem(monkeypatch, "ablate", "--file=lab.yaml", *flags, "--jobs=2", "--out=lab") == 0
    shown = capsys.readouterr().out
    assert "diverged: the loss is" in shown
    figures = json.loads(Path("lab/ablate.json").read_text())
    assert figures["title"] == "Two"
    assert figures["shared"]["steps"] == 4  # a flag that is written goes before the file
    assert figures["command"].startswith("lowmem ablate --file=lab.yaml")
    assert "validation loss" in Path("lab/adamw_lr_1e-2.log").read_text()
    assert lowmem(monkeypatch, "ablate", "--file=lab.yaml", *flags, "--seeds=2", "--report-only", "--out=lab") == 0
    kinds = [item["kind"] for item in json.loads(Path("lab/ablate.json").read_text())["failures"]]
    assert sorted(kinds) == ["diverged", "missing", "missing"]


def test_an_interrupted_command_says_how_to_go_on(small, monkeypatch, capsys):
    monkeypatch.setattr(laboratory, "executor_of", lambda name, jobs: Inline(1, KeyboardInterrupt()))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    assert lowmem(monkeypatch, "ablate", "adamw lr=1e-2", *flags, "--out=lab") == 130
    assert capsys.readouterr().err.startswith("lowmem: interrupted; the same command goes on")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset=galor-table2"], "Did you mean galore-table2"),
        (["--file=none.yaml"], "there is no such file"),
        (["--file=a", "--preset=b"], "give one of them"),
        (["adamw", "--set=steps"], "write NAME=VALUE"),
        (["adamw", "--seeds=x"], "seeds is x"),
        (["--file=latin.yaml"], "cannot be read as UTF-8"),
        (["adamw", "--out=latin.yaml"], "--out latin.yaml: latin.yaml is no folder"),
    ],
)
def test_bad_input_is_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes(b"title: \xe9")
    assert lowmem(monkeypatch, "ablate", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
