"""A LLaMA of two layers that a test can train in a second, and the comparison of two checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 128


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Its embeddings and, at rank 32, its feed-forward layers are large enough for moments in 8 bits."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=32,
        use_cache=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def rows(count: int, length: int = 8) -> list[dict[str, Tensor]]:
    """Random token rows that repeat, so that a loss can fall."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (4, length), generator=generator)
    return [{"input_ids": tokens[i % 4], "labels": tokens[i % 4]} for i in range(count)]


def batch(step: int, size: int = 2) -> dict[str, Tensor]:
    """The batch of a step, of rows that follow each other."""
    found = rows(4)
    picked = [found[(step * size + i) % 4] for i in range(size)]
    return {name: torch.stack([row[name] for row in picked]) for name in picked[0]}


def assert_equal(found: Any, expected: Any) -> None:
    """Two nested structures are equal to the last bit, dtypes too."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_equal(found[key], expected[key])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_equal(*pair)
    else:
        assert found == expected
