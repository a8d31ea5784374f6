"""Pre-training on several processes (gloo): the run of one process, its resume elsewhere, ranks that die."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from lowmem.bench.config import RunConfig
from lowmem.bench.errors import UserError
from lowmem.bench.parallel import Ranks, started
from lowmem.bench.pretrain import check
from lowmem.bench.rundir import RunFolder
from lowmem.bench.stream import StreamSource
from safetensors.numpy import load_file

from tests import ranks

WORDS = ["if", "else", "return", "import", "class", "def", "self", "none", "true", "false", "zero", "one"]
GALORE = ["--optimizer=galore", "--lr=1e-2", "--rank=16", "--update-proj-gap=3"]
ADAMW = ["--optimizer=adamw", "--lr=1e-3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, and in `one` the run that all others are compared with: 4 micro-batches a step."""
    folder = tmp_path_factory.mktemp("parallel")
    random.seed(0)
    (folder / "text.txt").write_text("\n".join(" ".join(random.choices(WORDS, k=12)) for _ in range(800)))
    for name, options in (("one", GALORE), ("one-adamw", ADAMW)):
        pretrain(folder, f"--out={name}", "--accumulation=4", options=options)
    return folder


def arguments(*more, options=GALORE):
    budget = ["--steps=6", "--length=24", "--batch-size=2", "--eval-every=3", "--eval-batches=3"]
    return ["pretrain", "--model=tiny", "--data=text.txt", *budget, *options, *more]


def pretrain(folder, *more, size=0, options=GALORE):
    codes, errors = ranks.run(arguments(*more, options=options), folder, size)
    assert codes == [0] * max(1, size), errors


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder, expected, tolerance=1e-3):
    """Losses, norms and weights are those of another run, up to the order of sums."""
    found = records(folder)
    assert [(r["kind"], r["step"], r["tokens"]) for r in found] == [
        (r["kind"], r["step"], r["tokens"]) for r in records(expected)
    ]
    for one, other in zip(found, records(expected), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance / 10)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=tolerance)
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert abs(ours[name] - theirs[name]).max() < tolerance, name


@pytest.mark.parametrize(
    ("mode", "size", "options"),
    [
        ("ddp", 2, GALORE),
        ("fsdp2", 2, GALORE),
        ("tp", 2, GALORE),
        ("hsdp", 4, GALORE),
        ("tp", 2, ADAMW),
    ],
)
def test_ranks_follow_one_process(mode, size, options, place):
    out = place / f"{mode}-{options[0][12:]}"
    each = 4 if mode == "tp" else 4 // size
    pretrain(place, f"--parallel={mode}", f"--accumulation={each}", f"--out={out.name}", size=size, options=options)
    expected = place / ("one" if options is GALORE else "one-adamw")
    assert_same_run(out, expected)
    here, there = (json.loads((path / "summary.json").read_text()) for path in (out, expected))
    assert (here["ranks"], here["parallel"], here["tokens"]) == (size, mode, there["tokens"])
    assert (here["config"], here["data"]) == (there["config"], there["data"])
    share = here["optimizer_state_bytes"] / there["optimizer_state_bytes"]
    # Copies have all of the state; of shards bases are whole on every rank, of tp all that is not split.
    assert share == 1 if mode == "ddp" else 0.49 < share < 0.8
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-6"]


def test_resume_on_two_ranks_is_bit_exact_and_on_one_is_close(place):
    mode = "fsdp2"
    flags = [f"--parallel={mode}", "--accumulation=2"]
    if not (place / f"{mode}-galore").exists():  # the test above has left it
        pretrain(place, *flags, f"--out={mode}-galore", size=2)
    pretrain(place, *flags, f"--out={mode}-two", "--stop-after=4", size=2)
    shutil.copytree(place / f"{mode}-two", place / f"{mode}-one")
    # What a crash after the checkpoint leaves behind.
    with (place / f"{mode}-two/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 5, "loss": 0.0}) + '\n{"kind": "tra')
    pretrain(place, *flags, f"--out={mode}-two", "--resume", size=2)
    whole, two = (place / f"{mode}-{name}/model/model.safetensors" for name in ("galore", "two"))
    assert whole.read_bytes() == two.read_bytes()
    assert_same_run(place / f"{mode}-two", place / f"{mode}-galore", 1e-12)
    pretrain(place, "--accumulation=4", f"--out={mode}-one", "--resume")
    assert_same_run(place / f"{mode}-one", place / "one")
    assert [path.name for path in (place / f"{mode}-one").glob("checkpoint*")] == ["checkpoint.pt"]


@pytest.mark.parametrize(("mode", "options"), [("ddp", GALORE), ("fsdp2", ADAMW)])
def test_several_ranks_resume_a_run_of_one(mode, options, place):
    name = f"{mode}{options[0]}-joined"
    pretrain(place, "--accumulation=4", f"--out={name}", "--stop-after=4", options=options)
    flags = [f"--parallel={mode}", "--accumulation=2", f"--out={name}", "--resume"]
    pretrain(place, *flags, size=2, options=options)
    assert_same_run(place / name, place / ("one" if options is GALORE else "one-adamw"))
    assert [path.name for path in (place / name).glob("checkpoint*")] == ["checkpoint-6"]


@pytest.mark.parametrize("death", [ranks.die_in_the_second_checkpoint, ranks.die_before_the_second_rename])
def test_a_rank_killed_in_a_checkpoint_leaves_the_one_before(death, place):
    out = place / death.__name__
    flags = ["--parallel=fsdp2", "--accumulation=2", f"--out={out.name}"]
    codes, _ = ranks.run(arguments(*flags, "--save-every=2"), place, 2, death)
    assert -9 in codes
    assert {path.name for path in out.glob("checkpoint*")} == {"checkpoint-2", "checkpoint-new"}
    assert any(path.stat().st_size for path in (out / "checkpoint-new").glob("*.distcp"))
    assert [record["step"] for record in records(out) if record["kind"] == "train"][-1] == 4
    pretrain(place, "--accumulation=4", f"--out={out.name}", "--resume")
    assert_same_run(out, place / "one")


def test_every_rank_reads_other_batches(place, tmp_path):
    seen = {}
    for size, each in ((0, 4), (2, 2)):
        folder = tmp_path / str(size)
        folder.mkdir()
        shutil.copy(place / "text.txt", folder)
        flags = ["--out=run", f"--accumulation={each}", *(["--parallel=ddp"] if size else [])]
        codes, errors = ranks.run(arguments(*flags), folder, size, ranks.note_batches)
        assert not any(codes), errors
        seen[size] = [(folder / f"batches{rank}").read_text().split("\n")[:-1] for rank in range(max(1, size))]
    all_of_them, (first, second) = seen[0][0], seen[2]
    train = [{line for line in lines if line.startswith("train")} for lines in (first, second, all_of_them)]
    assert [len(part) for part in train] == [12, 12, 24]
    assert train[0] | train[1] == train[2]
    evals = [[line for line in lines if line.startswith("eval")] for lines in (first, second, all_of_them)]
    # Two of three, and one: the second rank reads the first batch once more, which does not count.
    assert evals[0][:2] == [evals[2][0], evals[2][2]]
    assert evals[1][:2] == [evals[2][1], evals[2][0]]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_shares_are_a_partition(count):
    shares = [Ranks("ddp", rank, 3).share(count) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert [Ranks("tp", rank, 3).share(count) for rank in range(3)] == [range(count)] * 3


def test_ranks_share_a_stream_without_repeats():
    class Tokenizer:
        eos_token_id = 0

        def __len__(self):
            return 1000

        def encode(self, text, add_special_tokens):
            return [int(word) for word in text.split()]

    rows = [{"text": " ".join(str(number) for number in range(start, start + 7))} for start in range(1, 900, 7)]
    config = RunConfig(batch_size=2, length=4, accumulation=4)
    sources = [StreamSource(lambda _: rows, Tokenizer(), config) for _ in range(3)]
    seen = [sources[0].train_batch(step, micro) for step in range(4) for micro in range(4)]
    for rank in range(2):
        share = Ranks("ddp", rank, 2).share(4)
        assert len(share) == 2
        for step in range(4):
            for micro in share:
                assert sources[1 + rank].train_batch(step, micro).equal(seen[4 * step + micro])
    assert len({tuple(row.tolist()) for batch in seen for row in batch}) == 32


REFUSED = {
    "unknown mode": ("dpp", 0, "--parallel is dpp: it must be none, ddp, fsdp2, hsdp or tp"),
    "no processes": ("ddp", 0, "torchrun --nproc-per-node N -m lowmem.bench pretrain --parallel ddp"),
    "processes that all do the same": ("none", 2, "2 processes were started, which would all do the same"),
    "hsdp of two": ("hsdp", 2, "4 or more ranks, got 2: write --parallel fsdp2"),
}


@pytest.mark.parametrize(("mode", "size", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_the_processes_is_refused(mode, size, message, monkeypatch):
    for name, value in {"WORLD_SIZE": size, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value)) if size else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=re.escape(message)), started(mode):
        pass


@pytest.mark.parametrize(
    ("readers", "each", "message"),
    [
        (2, 4, "holds a run of 4 micro-batches a step, and 2 x --accumulation 4 are 8: write --accumulation 2"),
        (1, 1, "1 x --accumulation 1 are 1: write --accumulation 4"),
        (3, 1, "resume on a number of ranks that divides 4"),
    ],
)
def test_a_resume_has_the_batches_of_its_run(readers, each, message, tmp_path):
    folder = RunFolder(tmp_path)
    folder.start({"config": {"accumulation": 4}})
    ranks_now = Ranks("ddp" if readers > 1 else "none", 0, readers)
    with pytest.raises(UserError, match=re.escape(message)):
        check(folder, {"config": {"accumulation": each * readers}}, True, ranks_now)
    check(folder, {"config": {"accumulation": 4}}, True, ranks_now)


BAD = {
    "heads that do not divide": (3, ["--parallel=tp"], "splits num_attention_heads, which is 4, into 3 equal parts"),
    "an option that is refused": (2, ["--parallel=fsdp2", "--rank=0"], "rank"),
    "codes of rows that are cut": (2, ["--parallel=tp", "--state-dtype=8bit", "--rank=128"], "shard rows"),
    "divergence": (2, ["--parallel=ddp", "--lr=1e38", "--grad-clip=0", "--warmup=0"], "lower --lr"),
}


@pytest.mark.parametrize(("size", "flags", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_of_the_first_rank(size, flags, message, place):
    codes, errors = ranks.run(arguments("--out=bad", *flags), place, size)
    shutil.rmtree(place / "bad", ignore_errors=True)  # of the run that diverged
    assert codes == [3 if "--lr=1e38" in flags else 1] * size, errors
    ours = [line for error in errors for line in error.splitlines() if line.startswith("lowmem: ")]
    assert len(ours) == 1, errors
    assert message in ours[0]


def test_torchrun_starts_it(place):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "lowmem.bench",
    ]
    flags = arguments("--parallel=fsdp2", "--accumulation=2", "--out=torchrun", "--steps=1")
    run = subprocess.run(
        [*command, *flags], cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode().count("validation loss") == 1
    assert (place / "torchrun/checkpoint-1/.metadata").exists()
