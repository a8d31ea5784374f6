"""The commands as a user runs them: processes of their own, on a very small LLaMA and text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowmem.bench import cli, neighbours
from lowmem.bench.errors import Diverged, UserError
from lowmem.bench.peers import Contender
from lowmem.bench.runs import failure
from lowmem.bench.turns import peak_bytes

SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BUDGET = ["--steps=6", "--length=16", "--batch-size=2", "--eval-every=3", "--eval-batches=2"]
RUN_FILES = {"config.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoint.pt", "model"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.json").write_text(json.dumps(SMALL))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return [f"--model={folder / 'small.json'}", f"--data={folder / 'text.txt'}", *BUDGET]


def lowmem(*arguments, cwd, env=None):
    """Run a command; one thread, since processes that share cores would wait for each other."""
    command = [sys.executable, "-m", "lowmem.bench", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_pretrain_fills_a_run_folder_that_transformers_loads(small, tmp_path):
    run = lowmem("pretrain", *small, "--lr", "1e-2", "--betas=0.9,0.95", "--out=run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "tokens/s" in run.stdout
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["options"] == {"lr": 1e-2, "betas": [0.9, 0.95]}
    assert set(summary["versions"]) == {"python", "torch", "transformers", "lowmem"}
    assert summary["tokens"] == 6 * 16 * 2
    # Two moments of fp32 and one step counter for each tensor.
    tensors = 2 + 1 + 9
    assert summary["optimizer_state_bytes"] == 8 * summary["parameters"] + 4 * tensors
    assert summary["peak_memory_bytes"] > summary["start_memory_bytes"] > 0
    for name in ("train_loss", "val_loss", "train_perplexity", "val_perplexity", "tokens_per_s"):
        assert summary[name] > 0
    assert set(summary["optimizer_step_s"]) == set(summary["step_s"]) == {"median", "p95", "max"}

    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == summary["parameters"]


def test_compare_writes_table_and_picture_and_reuses_finished_runs(small, tmp_path):
    entries = ["adamw lr=1e-2", "adamw lr=1e-3", "galore lr=1e-2 rank=4"]
    first = lowmem("compare", *entries, *small, "--out=all", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "all"
    listed = json.loads((folder / "compare.json").read_text())
    assert [row["label"] for row in listed] == ["adamw lr=1e-2", "adamw lr=1e-3", "galore"]
    assert listed[2]["optimizer_state_bytes"] < listed[0]["optimizer_state_bytes"]
    assert len((folder / "compare.md").read_text().splitlines()) == 2 + len(entries)
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "vs first" in first.stdout

    second = lowmem("compare", *entries, "galor lr=1", *small, "--out=all", cwd=tmp_path)
    assert second.stdout.count("holds this run already") == 3
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "unknown optimizer 'galor'" in second.stderr
    labels = [row["label"] for row in json.loads((folder / "compare.json").read_text())]
    assert labels == [*(row["label"] for row in listed), "galor lr=1"]


def test_compare_searches_a_grid_and_repeats_the_best_point(small, tmp_path):
    # So large a rate diverges at once, for clipping does not bound the size of AdamW's steps.
    command = ["compare", "adamw lr=1e-2|1e38", *small, "--warmup=0", "--seed=3", "--seeds=2", "--out=all"]
    first = lowmem(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("diverged: the loss is") == 1
    folder = tmp_path / "all"
    (row,) = json.loads((folder / "compare.json").read_text())
    assert (row["label"], row["folder"], row["config"]["seed"]) == ("adamw", "adamw_lr_1e-2", 3)
    good, lost = row["points"]
    assert good["val_loss"] == row["val_loss"]
    assert (lost["val_loss"], lost["diverged"]) == (None, True)
    assert [(seed["folder"], seed["seed"]) for seed in row["seeds"]] == [
        ("adamw_lr_1e-2", 3),
        ("adamw_lr_1e-2_seed4", 4),
    ]
    losses = [seed["val_loss"] for seed in row["seeds"]]
    assert row["val_loss_mean"] == pytest.approx(sum(losses) / 2)
    assert row["val_loss_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert losses[0] != losses[1]
    (line,) = (folder / "compare.md").read_text().splitlines()[2:]
    assert "| lr=1e-2 | " in line
    assert f"{row['val_loss_mean']:.3f} ± {row['val_loss_std']:.3f}" in line

    second = lowmem(*command, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("holds this run already") == 2
    assert json.loads((folder / "compare.json").read_text()) == [row]


def test_help_names_the_commands_and_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    run = lowmem("--help", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert {"pretrain", "compare", "optimizers"} <= set(run.stdout.split())


def test_no_command_is_a_call_for_help_and_a_wrong_one_says_where_it_is(tmp_path):
    assert lowmem(cwd=tmp_path).stdout == lowmem("--help", cwd=tmp_path).stdout != ""
    run = lowmem("pretran", cwd=tmp_path)
    assert run.stderr == "lowmem: No such command 'pretran'. Did you mean 'pretrain'? See lowmem --help\n"
    assert run.returncode == 1


def test_a_full_disk_and_a_reader_that_has_enough_are_no_tracebacks(tmp_path, monkeypatch, capfd):
    def fails(error):
        raise error

    monkeypatch.setattr(sys, "argv", ["lowmem", "optimizers"])
    monkeypatch.setattr(cli, "_run", lambda: fails(OSError(28, "No space left on device", "model.safetensors")))
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capfd.readouterr().err == "lowmem: [Errno 28] No space left on device: 'model.safetensors'\n"
    command = f"{sys.executable} -m lowmem.bench step-time --model tiny --rounds 3 --rank 4 --gap 1 | head -n 1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.startswith("tiny, rank 4")
    assert run.stderr == ""


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["lowmem", "optimizers"])
    monkeypatch.setattr("lowmem.bench.optimizers.available", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert capfd.readouterr().err.strip() == "lowmem: interrupted; a run with a checkpoint goes on with --resume"


@pytest.mark.parametrize("package", ["typer", "matplotlib"])
def test_a_missing_extra_is_one_line(package, small, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    run = lowmem("pretrain", *small, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert run.returncode == 1
    assert run.stderr == f'lowmem: the command needs {package}, which is not installed: pip install "lowmem[bench]"\n'
    assert run.stdout == ""


def test_bad_input_in_a_process_is_one_line(small, tmp_path):
    run = lowmem("pretrain", *small, "--optimizer=adamww", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("lowmem: unknown optimizer 'adamww'. Did you mean adamw")
    assert run.stderr.count("\n") == 1
    assert not list(Path(tmp_path).iterdir())


def test_step_time_prints_both_tables_and_writes_the_figures(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({**SMALL, "max_position_embeddings": 256}))
    flags = ["--model=small.json", "--rank=4", "--rounds=3", "--gap=4", "--methods", "--out=figures.json"]
    run = lowmem("step-time", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for text in (
        "floors, milliseconds",
        "vs own floor",
        "GaLore",
        "Frugal",
        "Flora",
        "torch AdamW fused",
        "projected matrices",
        "plain parameters",
        "staggered",
    ):
        assert text in run.stdout
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert set(figures["floors"]) == {"pass", "columns", "product", "products", "descent"}
    ours = figures["projected"][0]
    assert ours["name"] == "GaLore"
    assert ours["floor"] == figures["floors"]["products"]
    assert ours["amortised_50"] == pytest.approx(ours["plain"] + (ours["refresh"] - ours["plain"]) / 50)
    assert 0.9 <= figures["energy"]["cold_min"] <= 1.0 + 1e-5
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_the_peak_of_a_step_is_what_it_allocates():
    class Doubling:
        def step(self):
            whole = torch.empty(1 << 20)
            del whole
            return torch.empty(3 << 18) + torch.empty(1)

    assert 6 << 20 <= peak_bytes(Doubling()) < (6 << 20) + 4096


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=nowhere"], "unknown model"),
        (["--dtype=fp8"], "fp32 or bf16"),
        (["--rank=0"], "rank"),
        (["--model=tiny", "--rank=200"], "rank"),
        (["--model=9m,tiny", "--rank=200"], "rank"),
        (["--model=tiny,nowhere", "--rank=4"], "unknown model 'nowhere'"),
        (["--model=tiny", "--rank=4", "--out=file/figures.json"], "--out file/figures.json: file is no folder"),
        (["--model=tiny", "--rank=4", "--out=."], "--out . is a folder: name a file"),
    ],
)
def test_bad_step_time_input_is_one_line(flags, message, tmp_path):
    (tmp_path / "file").touch()
    run = lowmem("step-time", *flags, cwd=tmp_path)
    assert run.returncode != 0
    assert len(run.stderr.strip().splitlines()) == 1
    assert message in run.stderr
    assert not run.stdout  # nothing was measured before it was refused


def test_a_neighbour_that_breaks_in_any_way_is_left_out_with_its_reason():
    def broken(params, rank):
        raise KeyError("no such state")

    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    builds = {"broken": broken, "sound": lambda params, rank: Contender("sound", torch.optim.SGD(params, lr=0.1))}
    found, missing = neighbours._those_that_run(builds, [param], 0)
    assert [contender.name for contender in found] == ["sound"]
    assert missing == {"broken": "'no such state'"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (-9, UserError("killed by signal 9 (out of memory?): see a.log")),
        (-11, UserError("killed by signal 11: see a.log")),
        (1, UserError("the last word")),
        (3, Diverged("the last word")),
    ],
)
def test_a_process_that_was_killed_gives_no_reason_itself(code, error):
    found = failure(code, "a warning\nlowmem: the last word\n", "a.log")
    assert (type(found), str(found)) == (type(error), str(error))


def test_optimizers_lists_names_and_the_options_of_one(tmp_path):
    names = lowmem("optimizers", cwd=tmp_path)
    assert {"adamw", "galore", "fira", "onlinesubspacedescent", "adafactor"} <= set(names.stdout.split())
    options = lowmem("optimizers", "fira", cwd=tmp_path)
    assert "--gamma" in options.stdout
    assert "--update-proj-gap" in options.stdout


def test_galore_trains_beside_adamw_with_less_state(small, tmp_path):
    run = lowmem("compare", *small, "--out=both", "adamw lr=1e-3", "galore lr=1e-2 rank=4", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "both").glob("*/summary.json"))]
    adamw, galore = (summary["optimizer_state_bytes"] for summary in summaries)
    assert galore < adamw
