"""The training run: exact resume, and bad input as exactly one line on stderr with a non-zero exit."""

import json
import math
import sys

import pytest
import torch
from lowmem.bench.cli import main
from lowmem.bench.config import RunConfig
from lowmem.bench.errors import Diverged
from lowmem.bench.pretrain import lr_factor

BUDGET = ["--steps=8", "--length=16", "--batch-size=2", "--eval-every=3", "--eval-batches=2"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 64, **sizes}
    (tmp_path / "small.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    monkeypatch.chdir(tmp_path)
    # Two threads that share cores with another process wait for each other in every small operation.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ["pretrain", "--model=small.json", "--data=text.txt", *BUDGET]
    torch.set_num_threads(threads)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lowmem", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer=adamw", "--lr=1e-2"],
        ["--optimizer=adamw", "--lr=1e-2", "--accumulation=2", "--dtype=bf16", "--checkpointing"],
        ["--optimizer=galore", "--lr=1e-2", "--rank=4", "--update-proj-gap=3"],
        ["--optimizer=fira", "--lr=1e-2", "--rank=4", "--update-proj-gap=3"],
        ["--optimizer=onlinesubspacedescent", "--lr=1e-3", "--rank=4"],
        ["--optimizer=galore", "--lr=1e-2", "--rank=4", "--update-proj-gap=3", "--stagger", "--state-dtype=bfloat16"],
        ["--optimizer=adafactor", "--lr=1e-2", "--beta1=0.9"],
    ],
    ids=lambda options: " ".join(options),
)
def test_resume_is_bit_exact(options, small, tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, *small, *options, "--out=whole") == 0, capfd.readouterr().err
    assert run(monkeypatch, *small, *options, "--out=parts", "--stop-after=4") == 0
    assert not (tmp_path / "parts/summary.json").exists()
    # What a crash after the checkpoint leaves behind: a later line and a torn one.
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 5, "loss": 0.0}) + '\n{"kind": "tra')
    assert run(monkeypatch, *small, *options, "--out=parts", "--resume") == 0, capfd.readouterr().err
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    state = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
    assert state[0]["step"] == state[1]["step"] == 8
    assert capfd.readouterr().err == ""


BAD = {
    "unknown optimizer": (["--optimizer=galor"], "Did you mean galore"),
    "unknown option": (["--optimizer=galore", "--rnak=4"], "unknown flag --rnak. Did you mean --rank"),
    "misspelt switch": (["--resum"], "unknown flag --resum. Did you mean --resume"),
    "misspelt fixed flag": (["--step=4"], "Did you mean --steps"),
    "stray argument": (["adamw"], "unexpected argument 'adamw'"),
    "option of the wrong type": (["--lr=fast"], "--lr fast: it takes float"),
    "flag of the wrong type": (["--steps=many"], "See lowmem pretrain --help"),
    "flag without a value": (["--lr"], "--lr needs a value"),
    "rank 0": (["--optimizer=galore", "--rank=0"], "rank"),
    "bad option value": (["--optimizer=galore", "--proj-type=middle"], "middle"),
    "negative learning rate": (["--lr=-1"], "learning rate"),
    "no steps": (["--steps=0"], "--steps is 0: it must be 1 or more"),
    "unknown type": (["--dtype=fp8"], "fp32 or bf16"),
    "missing file": (["--data=nothing.txt"], "no such file or folder"),
    "empty text": (["--data=empty.txt"], "no text found"),
    "short text": (["--data=short.txt"], "it needs more than --length 16"),
    "stream without tokenizer": (["--data=hf:allenai/c4:en"], "needs --tokenizer NAME"),
    "missing tokenizer": (["--tokenizer=./nothing"], "--tokenizer ./nothing cannot be loaded"),
    "unknown model": (["--model=60b"], "choose tiny, 9m, 60m"),
    "longer than the model": (["--length=65"], "write --length 64 or less"),
    "resume of nothing": (["--resume"], "holds no run to resume"),
    "a file as folder": (["--out=text.txt"], "choose a folder"),
    "a folder within a file": (["--out=text.txt/run"], "text.txt/run is no folder that can be written to"),
    "a folder of a model": (["--out=model"], "model/config.json is not that of a run"),
    "resume of a model": (["--out=model", "--resume"], "model/config.json is not that of a run"),
    "a folder of something else": (["--out=other"], "no run folder"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, message, small, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("mine")
    code = run(monkeypatch, *small, "--out=out", *arguments)
    error = capfd.readouterr().err
    assert code != 0
    assert error.startswith("lowmem: ")
    assert error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "out/config.json").exists()


def test_a_run_folder_is_never_overwritten(small, tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, *small, "--out=out", "--stop-after=2") == 0
    capfd.readouterr()
    cases = [
        ([], "holds an unfinished run: add --resume"),
        (["--resume", "--lr=2e-2"], "another configuration (config.options.lr is null there, 0.02 here)"),
        (["--resume", "--steps=9"], "config.steps is 8 there, 9 here"),
    ]
    for arguments, message in cases:
        assert run(monkeypatch, *small, "--out=out", *arguments) == 1
        assert message in capfd.readouterr().err
    text = tmp_path / "text.txt"
    before = text.read_text()
    text.write_text(before + "and one more line\n")
    assert run(monkeypatch, *small, "--out=out", "--resume") == 1
    assert "data.digest" in capfd.readouterr().err
    text.write_text(before)
    assert run(monkeypatch, *small, "--out=out", "--resume") == 0
    summary = (tmp_path / "out/summary.json").read_bytes()
    for arguments in ([], ["--resume"]):
        assert run(monkeypatch, *small, "--out=out", *arguments) == 1
        assert "holds a finished run: choose another --out" in capfd.readouterr().err
    assert (tmp_path / "out/summary.json").read_bytes() == summary


def test_a_torn_checkpoint_is_one_line(small, tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, *small, "--out=out", "--stop-after=2") == 0
    file = tmp_path / "out/checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    capfd.readouterr()
    assert run(monkeypatch, *small, "--out=out", "--resume") == 1
    assert "checkpoint.pt cannot be read" in capfd.readouterr().err


def test_divergence_is_one_line(small, monkeypatch, capfd):
    assert run(monkeypatch, *small, "--lr=1e38", "--grad-clip=0", "--warmup=0") == Diverged.exit_code
    error = capfd.readouterr().err
    assert "lower --lr" in error
    assert error.count("\n") == 1


def test_schedule_warms_up_then_falls_to_its_floor():
    config = RunConfig(steps=100, warmup=0.1, min_lr_ratio=0.1)
    factors = [lr_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[99] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(0, RunConfig(steps=1)) == 1
    assert math.isclose(lr_factor(0, RunConfig(steps=4, warmup=0)), 1)
