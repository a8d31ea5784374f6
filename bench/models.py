"""LLaMA configurations: two for a CPU, those of the GaLore paper, or any Hugging Face LLaMA config JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import UserError, one_line


class Shape(NamedTuple):
    """Sizes of a LLaMA."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(128, 344, 4, 4, 256),
    "9m": Shape(384, 1024, 6, 5, 256),
    "60m": Shape(512, 1376, 8, 8, 32000),
    "130m": Shape(768, 2048, 12, 12, 32000),
    "350m": Shape(1024, 2736, 16, 24, 32000),
    "1b": Shape(2048, 5461, 32, 24, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32000),
}


def model_config(name_or_path: str, vocab_size: int | None = None, max_length: int = 1024) -> Any:
    """Return the `LlamaConfig` of a named shape or of a config JSON.

    Args:
        name_or_path: A name of `SHAPES`, a config JSON or a folder that holds `config.json`.
        vocab_size: Size of the data's vocabulary. A named shape grows its own vocabulary to it; a JSON must hold it.
        max_length: Longest sequence that will be fed.

    Raises:
        UserError: If the name is unknown, the file is no LLaMA configuration, or it is too small for the data.
    """
    if name_or_path not in SHAPES:
        return _config_from_json(name_or_path, vocab_size or 0, max_length)
    from transformers import LlamaConfig

    shape = SHAPES[name_or_path]
    return LlamaConfig(
        vocab_size=max(shape.vocabulary, vocab_size or 0),
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        max_position_embeddings=max(1024, max_length),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def build_model(
    name_or_path: str,
    vocab_size: int | None = None,
    *,
    max_length: int = 1024,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    checkpointing: bool = False,
) -> nn.Module:
    """Return a freshly initialised `LlamaForCausalLM` in training mode.

    Args:
        name_or_path: See `model_config`.
        vocab_size: See `model_config`.
        max_length: See `model_config`.
        dtype: Type of the weights.
        seed: Seed of the initialisation; torch's global generator is set to it.
        checkpointing: Recompute activations in the backward pass.
    """
    config = model_config(name_or_path, vocab_size, max_length)
    from transformers import LlamaForCausalLM

    config.use_cache = False
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    try:
        # A default type, not a cast afterwards: the rotary frequencies must stay in fp32.
        with default_dtype(dtype):
            model: nn.Module = LlamaForCausalLM(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model {name_or_path!r} cannot be built: {one_line(error)}") from error
    if checkpointing:
        # The method's name since transformers 5; both take the same first argument.
        name = "activation_checkpointing_enable"
        enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})
    return model.train()


def _config_from_json(name_or_path: str, vocab_size: int, max_length: int) -> Any:
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"unknown model {name_or_path!r}: choose {', '.join(SHAPES)}, or give a config JSON")
    from transformers import LlamaConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("model_type") != "llama":
            raise UserError(f'{path}: model_type is {values.get("model_type")!r}, it must be "llama"')
        config = LlamaConfig(**values)
    except UserError:
        raise
    except Exception as error:
        # transformers and its validators raise many kinds of error for a bad configuration.
        raise UserError(f"{path} is no LLaMA configuration: {one_line(error)}") from error
    if config.vocab_size < vocab_size:
        raise UserError(f'{path}: vocab_size is {config.vocab_size}, the data needs "vocab_size": {vocab_size}')
    if config.max_position_embeddings < max_length:
        limit = config.max_position_embeddings
        raise UserError(f"{path}: max_position_embeddings is {limit}, so write --length {limit} or less")
    return config


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it new tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
