"""Parameter groups of a model: which matrices are projected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

HEAD_NAMES = ("lm_head", "embed_out", "output_projection", "score", "classifier")
"""Last parts of the names of output layers, which the papers leave full-rank."""


def param_groups(
    model: nn.Module,
    rank: int = 128,
    targets: str | Sequence[str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into plain ones and projected ones, as the papers do.

    Projected are the weights of linear layers (`nn.Linear`, and Hugging Face's `Conv1D`) but for the output head and
    weights tied to an embedding; embeddings, head, norms, biases and everything else are plain.

    Args:
        model: The model.
        rank: Rank of the projected group.
        targets: Which linear layers instead: regular expressions searched in the layers' names, as `["attn", "mlp"]`.
        options: Further options of the projected group, as `update_proj_gap=100`.

    Returns:
        Two groups (the plain one is left out if it is empty), for the constructor of any optimizer of the package.

    Raises:
        ValueError: Nothing is matched, or one of `targets` matches no linear layer.
    """
    layers = dict(_linear_layers(model))
    chosen = _matching(layers, targets) if targets is not None else _papers(model, layers)
    weights = {id(layers[name].weight): layers[name].weight for name in chosen}
    projected = [w for w in weights.values() if w.requires_grad]
    if not projected:
        raise ValueError(
            f"no trainable linear layer of {type(model).__name__} is projected; pass targets=[...] with parts of the "
            f"names of some: {', '.join(list(layers)[:8]) or 'it has no linear layers'}"
        )
    plain = [p for p in model.parameters() if p.requires_grad and id(p) not in weights]
    groups: list[dict[str, Any]] = [{"params": plain}] if plain else []
    return [*groups, {"params": projected, "rank": rank, **options}]


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        # Hugging Face's GPT-2 layer is a linear layer with a transposed weight; by name, to not import transformers.
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def _papers(model: nn.Module, layers: dict[str, Any]) -> list[str]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = getattr(find_head(), "weight", None)
    return [
        name
        for name, layer in layers.items()
        if id(layer.weight) not in embeddings and layer.weight is not head and name.split(".")[-1] not in HEAD_NAMES
    ]


def _matching(layers: dict[str, Any], targets: str | Sequence[str]) -> list[str]:
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in layers):
            names = ", ".join(list(layers)[:8])
            raise ValueError(f"target {pattern!r} matches no linear layer; there are {names}, ...")
    return [name for name in layers if any(re.search(pattern, name) for pattern in patterns)]
