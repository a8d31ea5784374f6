"""Batches from text: a stable split by file, and batches that are a pure function of (seed, step, micro-batch)."""

import json

import pytest
import torch
from lowmem.bench.config import RunConfig
from lowmem.bench.data import BYTE_ENCODING, join, load_source, read_documents, split, stdlib_documents
from lowmem.bench.errors import UserError
from lowmem.bench.stream import StreamSource, pack


@pytest.fixture(scope="module")
def stdlib():
    return load_source(RunConfig(length=64, batch_size=4))


def test_stdlib_is_split_by_file():
    documents = stdlib_documents()
    names = [name for name, _ in documents]
    assert "json/decoder.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    train, held_out = split(documents)
    assert sorted(train + held_out) == sorted(text for _, text in documents)
    assert 0.02 < len(held_out) / len(documents) < 0.09
    # A file keeps its side when others come and go.
    half = documents[::2]
    assert set(split(half)[1]) == {text for _, text in half} & set(held_out)


def test_documents_are_joined_by_zero_bytes():
    assert join([b"ab", b"c"], BYTE_ENCODING).tolist() == [97, 98, 0, 99, 0]


def test_batches_are_a_pure_function_of_seed_step_and_micro_batch(stdlib):
    batch = stdlib.train_batch(3, 1)
    assert batch.shape == (4, 65)
    assert batch.dtype == torch.int64
    again = load_source(RunConfig(length=64, batch_size=4))
    again.train_batch(0, 0)
    torch.rand(3)
    assert torch.equal(again.train_batch(3, 1), batch)
    others = [stdlib.train_batch(3, 0), stdlib.train_batch(1, 3), stdlib.train_batch(2, 1)]
    others.append(load_source(RunConfig(length=64, batch_size=4, seed=1)).train_batch(3, 1))
    assert not any(torch.equal(other, batch) for other in others)
    assert again.identity == stdlib.identity


def test_validation_batches_are_the_same_for_every_seed(stdlib):
    other = load_source(RunConfig(length=64, batch_size=4, seed=7))
    for a, b in zip(stdlib.held_out_batches(3), other.held_out_batches(3), strict=True):
        assert a.shape == (4, 65)
        assert torch.equal(a, b)


def test_windows_reach_the_last_token(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(1, 101)) * 2)
    source = load_source(RunConfig(data=str(tmp_path / "text"), length=8, batch_size=64))
    seen = torch.cat([source.train_batch(step, 0) for step in range(40)])
    assert seen.max() <= 100
    assert len(seen[:, -1].unique()) > 95
    # The tail of a single file is held out: ten bytes and the closing zero.
    held_out = source.held_out_batches(1)[0]
    assert held_out[0].tolist() == list(range(91, 100))
    assert held_out[-1].tolist() == [*range(93, 101), 0]


def test_a_folder_leaves_out_hidden_binary_and_empty_files(tmp_path):
    for name, data in {"a.txt": b"a", "b/c.md": b"c", ".git/x": b"x", "d.bin": b"\0d", "e.txt": b" \n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    documents = read_documents(tmp_path)
    assert documents == [("a.txt", b"a"), ("b/c.md", b"c")]
    train, held_out = split(documents)
    assert len(train) == len(held_out) == 1


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", "zero", "one", "two", "three", "four"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_file_can_be_read_with_a_tokenizer(tmp_path, tokenizer_folder):
    (tmp_path / "text").write_text("one two three four " * 100)
    config = RunConfig(data=str(tmp_path / "text"), tokenizer=str(tokenizer_folder), length=4, batch_size=2)
    source = load_source(config)
    assert source.vocab_size == 7
    assert set(source.train_batch(0, 0).flatten().tolist()) <= {0, 3, 4, 5, 6}


def test_pack_keeps_every_token_and_drops_a_short_last_row():
    documents = [[1, 2, 3], [], [4, 5, 6, 7, 8, 9, 10]]
    assert list(pack(documents, 0, 4)) == [[1, 2, 3, 0], [0, 4, 5, 6], [7, 8, 9, 10]]


def test_a_stream_is_packed_and_resumes_by_skipping(tokenizer_folder, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    words = ["zero", "one", "two", "three", "four"]
    rows = [{"text": " ".join(words[: 1 + index % 5])} for index in range(300)]
    splits = {"train": Dataset.from_list(rows).to_iterable_dataset(), "validation": rows[:40]}
    config = RunConfig(data="hf:local", tokenizer=str(tokenizer_folder), length=4, batch_size=3, accumulation=2)

    def source():
        return StreamSource(splits.__getitem__, AutoTokenizer.from_pretrained(tokenizer_folder), config)

    running = source()
    batches = {(step, micro): running.train_batch(step, micro) for step in range(5) for micro in range(2)}
    expected = [token for row in rows for token in [2 + words.index(word) for word in row["text"].split()] + [0]]
    assert torch.cat(list(batches.values())).flatten().tolist() == expected[: 10 * 3 * 5]
    resumed = source()
    assert torch.equal(resumed.train_batch(3, 1), batches[3, 1])
    assert torch.equal(resumed.train_batch(1, 0), batches[1, 0])
    assert torch.equal(running.held_out_batches(2)[1], running.held_out_batches(3)[1])
    with pytest.raises(UserError, match="has ended"):
        running.held_out_batches(30)


def test_a_stream_without_text_names_its_columns(tokenizer_folder):
    from transformers import AutoTokenizer

    config = RunConfig(data="hf:local", tokenizer=str(tokenizer_folder), length=4, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    source = StreamSource(lambda split: [{"content": "one"}], tokenizer, config)
    with pytest.raises(UserError, match="no column `text`, it has: content"):
        source.train_batch(0, 0)


def test_hf_data_sets_are_opened_by_name(tmp_path, tokenizer_folder):
    for part in ("train", "validation"):
        rows = [json.dumps({"text": "one two three four"}) for _ in range(20)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    config = RunConfig(data=f"hf:{tmp_path}", tokenizer=str(tokenizer_folder), length=4, batch_size=3)
    batch = load_source(config).train_batch(0, 0)
    assert batch.tolist() == [[3, 4, 5, 6, 0]] * 3
    assert len(load_source(config).held_out_batches(2)) == 2
