"""Parameter groups of a model: which matrices are projected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

QUERY_NAMES = ("q_proj", "query", "q_lin")
KEY_NAMES = ("k_proj", "key", "k_lin")
"""Last parts of the names of query and key layers in Hugging Face's models."""

FUSED_NAMES = {"phi3": "qkv_proj", "modernbert": "Wqkv", "mpt": "Wqkv", "dbrx": "Wqkv"}
"""Fused layers whose rows are all queries, all keys, all values, by `config.model_type`; others interleave them."""

BY_HAND = 'write the groups yourself, as {"params": [...], "rank": 128, "projector": "cross_head", "num_heads": 32}'

HEAD_NAMES = ("lm_head", "embed_out", "output_projection", "score", "classifier")
"""Last parts of the names of output layers, which the papers leave full-rank."""


def param_groups(
    model: nn.Module,
    rank: int | str = 128,
    targets: str | Sequence[str] | None = None,
    *,
    named: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into plain ones and projected ones, as the papers do.

    Projected are the weights of linear layers (`nn.Linear`, and Hugging Face's `Conv1D`) but for the output head and
    weights tied to an embedding; embeddings, head, norms, biases and everything else are plain.

    Args:
        model: The model.
        rank: Rank of the projected group, "auto" to leave it to the gradients; a `density` among the options is taken
            in its place.
        targets: Which linear layers instead: regular expressions searched in the layers' names, as `["attn", "mlp"]`.
        named: Return (name, parameter) pairs, which `BAdam` and `LISA` find the layers by.
        options: Further options of the projected group, as `update_proj_gap=100`.

    Returns:
        Two groups (the plain one is left out if it is empty), for the constructor of any optimizer of the package.

    Raises:
        ValueError: Nothing is matched, or one of `targets` matches no linear layer.
    """
    layers = dict(_linear_layers(model))
    chosen = _matching(layers, targets) if targets is not None else _papers(model, layers)
    weights = {id(layers[name].weight) for name in chosen}
    # By layer, whose order is the model's, and once where layers share a weight.
    names = {id(param): (name, param) for name, param in model.named_parameters() if param.requires_grad}
    projected = [names[key] for key in dict.fromkeys(id(layers[name].weight) for name in chosen) if key in names]
    if not projected:
        raise ValueError(
            f"no trainable linear layer of {type(model).__name__} is projected; pass targets=[...] with parts of the "
            f"names of some: {', '.join(list(layers)[:8]) or 'it has no linear layers'}"
        )
    plain = [pair for key, pair in names.items() if key not in weights]
    size = {} if "density" in options else {"rank": rank}
    groups: list[dict[str, Any]] = [{"params": plain}] if plain else []
    groups.append({"params": projected, **size, **options})
    if not named:
        for group in groups:
            group["params"] = [param for _, param in group["params"]]
    return groups


def head_groups(
    model: nn.Module,
    rank: int | str = 128,
    targets: str | Sequence[str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split as `param_groups` does, with groups of their own for query and key layers, whose heads share a basis.

    Query and key layers are found by name, their heads in `model.config`, as Hugging Face's models have them; so are
    fused layers of rows in the order queries, keys, values. All go with `projector="cross_head"` and `num_heads`.

    Args:
        model: The model.
        rank: Rank of the projected groups.
        targets: Which linear layers are projected, as in `param_groups`.
        options: Further options of the projected groups, as `update_proj_gap=100`.

    Returns:
        The plain group, the ordinary projected one, and one for every `num_heads`; empty ones are left out.

    Raises:
        ValueError: Nothing is matched, no layer is a query or key layer, or the config does not tell their heads.
    """
    if options.pop("named", False):
        raise ValueError("named=True: head_groups returns parameters without names, which no method with heads needs")
    *plain, projected = param_groups(model, rank, targets, **options)
    chosen = {id(param) for param in projected["params"]}
    heads: dict[int, int | tuple[tuple[int, int | None], ...]] = {}
    for name, layer in _linear_layers(model):
        if id(layer.weight) in chosen and (found := _heads_of(model, name, layer)) is not None:
            heads[id(layer.weight)] = found
    if not heads:
        raise ValueError(
            f"no projected linear layer of {type(model).__name__} is a query or key layer by name ({QUERY_NAMES}, "
            f"{KEY_NAMES}, fused {FUSED_NAMES}): {BY_HAND}"
        )
    return [*plain, *_by_heads(projected, heads)]


def _by_heads(projected: dict[str, Any], heads: dict[int, Any]) -> Iterator[dict[str, Any]]:
    """Split a group by the heads of its parameters, those without any first."""
    groups: dict[Any, dict[str, Any]] = {None: {**projected, "params": []}}
    for param in projected["params"]:
        count = heads.get(id(param))
        shared = {**projected, "params": [], "projector": "cross_head", "num_heads": count}
        groups.setdefault(count, shared)["params"].append(param)
    return (group for group in groups.values() if group["params"])


def _heads_of(model: nn.Module, name: str, layer: Any) -> int | tuple[tuple[int, int | None], ...] | None:
    """The heads of a query, key or fused layer; None for any other."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    last, fused = name.split(".")[-1], FUSED_NAMES.get(getattr(config, "model_type", ""))
    if last not in (*QUERY_NAMES, *KEY_NAMES, fused) or type(layer).__name__ == "Conv1D":
        return None
    queries = getattr(config, "num_attention_heads", None)
    if queries is None:
        raise ValueError(
            f"{name!r} has heads, and {type(model).__name__}.config.num_attention_heads does not tell how many: "
            f"{BY_HAND}"
        )
    keys = getattr(config, "num_key_value_heads", None) or queries
    if last != fused:
        return int(queries if last in QUERY_NAMES else keys)
    size = len(layer.weight) // (queries + 2 * keys)
    return ((queries * size, queries), (keys * size, keys), (keys * size, None))


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
