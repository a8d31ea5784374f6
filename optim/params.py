"""Parameter groups of a model: which matrices are projected, and at which rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .targets import (
    ALL_LINEAR,
    Names,
    experts,
    linear_layers,
    listed,
    named_weights,
    quantised_layers,
    ranks_of,
    stacks,
    undecayed,
    without,
    without_head,
)

QUERY_NAMES = ("q_proj", "query", "q_lin")
KEY_NAMES = ("k_proj", "key", "k_lin")
"""Last parts of the names of query and key layers in Hugging Face's models."""

FUSED_NAMES = {"phi3": "qkv_proj", "modernbert": "Wqkv", "mpt": "Wqkv", "dbrx": "Wqkv"}
"""Fused layers whose rows are all queries, all keys, all values, by `config.model_type`; others interleave them."""

BY_HAND = 'write the groups yourself, as {"params": [...], "rank": 128, "projector": "cross_head", "num_heads": 32}'

Pairs = list[tuple[str, nn.Parameter]]


def param_groups(
    model: nn.Module,
    rank: int | str | Mapping[str, int | str] = 128,
    targets: Names | None = None,
    *,
    exclude: Names = (),
    weight_decay_exclude: bool | Names | Callable[[str, Tensor], bool] | None = None,
    named: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into plain ones and projected ones, as the papers do.

        param_groups(model, rank=128)                                    # linear layers but the output head
        param_groups(model, rank={"attn": 64, "mlp": 128})
        param_groups(model, rank=128, targets=["attn", "mlp"], exclude=["k_proj"], weight_decay_exclude=True)

    Projected are the weights of linear layers (`nn.Linear`, and Hugging Face's `Conv1D`) but for the output head and
    weights tied to an embedding, and the stacks (experts, m, n) of fused mixtures of experts, told by their name or
    class, in groups with `stacked=True`: every expert is a matrix of its own. Embeddings, head, norms, biases and
    everything else are plain. A shared weight is in one group, once. Frozen parameters and quantised layers are in
    none: what is unfrozen later is added by `optimizer.add_param_group`. `matched(model, groups)` tells all of it by
    name.

    Args:
        model: The model.
        rank: Rank of the projected group, "auto" to leave it to the gradients; a `density` among the options is taken
            in its place. A mapping gives layers the rank of the first of its patterns that matches their name, a group
            for every rank; patterns are those of a list of `targets`.
        targets: Which layers instead, as in transformers: a string is a regular expression for a layer's whole name;
            a list has names, parts of names (`"q_proj"`, `"attn"`) and expressions for whole names. Convolutions can
            be named, and are projected as (out, rest) matrices; so can any parameter of three dimensions, which is a
            stack. "all-linear" is the default.
        exclude: Which of these layers are plain after all, in the same notation. Default: none.
        weight_decay_exclude: Which parameters do not decay, in groups of their own: the same notation for names of
            parameters, a function of name and parameter, or True for biases and weights of norms, as in
            transformers. Default: all decay alike, as in torch.
        named: Return (name, parameter) pairs, which `BAdam` and `LISA` find the layers by.
        options: Further options of the projected groups, as `update_proj_gap=100`.

    Returns:
        Plain groups (left out if empty), then projected ones, for the constructor of any optimizer of the package.

    Raises:
        ValueError: Nothing is matched, or a pattern matches no layer or parameter.
    """
    chosen = _chosen(model, targets, exclude)
    names = {id(param): (name, param) for name, param in model.named_parameters() if param.requires_grad}
    # In the order of layers, which is the model's; a weight that layers share is taken once.
    owners = {id(weight): name for name, weight in reversed(chosen.items()) if id(weight) in names}
    projected = [key for key in dict.fromkeys(id(weight) for weight in chosen.values()) if key in owners]
    if not projected:
        raise ValueError(_nothing(model))
    plain = [pair for key, pair in names.items() if key not in owners]
    still = undecayed(model, [name for name, _ in names.values()], weight_decay_exclude)
    groups = list(_by_decay({}, plain, still))
    held = {id(param) for param in stacks(model).values()}
    for size, keys in _by_rank(projected, owners, rank, "density" in options):
        for extra, part in (({}, set(keys) - held), ({"stacked": True}, held)):
            groups += _by_decay({**size, **options, **extra}, [names[key] for key in keys if key in part], still)
    if not named:
        for group in groups:
            group["params"] = [param for _, param in group["params"]]
    return groups


def _chosen(model: nn.Module, targets: Names | None, exclude: Names) -> dict[str, nn.Parameter]:
    layers = linear_layers(model)
    if targets is None or targets == ALL_LINEAR:
        chosen = {name: layers[name].weight for name in without_head(model, layers)} | experts(model)
    else:
        chosen = named_weights(model, layers, targets)
    return {name: chosen[name] for name in without(chosen, exclude)} if exclude else chosen


def _nothing(model: nn.Module) -> str:
    found = f"no trainable linear layer of {type(model).__name__} is projected"
    if quantised := quantised_layers(model):
        return (
            f"{found}: {listed(quantised)} are quantised, and no optimizer can train codes; load the model without "
            'quantization_config, or name its adapters: targets=["lora_A", "lora_B"]'
        )
    every = listed(list(linear_layers(model)))
    return f"{found}; pass targets=[...] with parts of the names of some that are not frozen, of: {every}"


def _by_rank(
    keys: list[int], owners: Mapping[int, str], rank: int | str | Mapping[str, int | str], density: bool
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield the option that sets the rank of a projected group, and its weights."""
    if not isinstance(rank, Mapping):
        yield {} if density else {"rank": rank}, keys
        return
    if density:
        raise ValueError(f"got density and rank={dict(rank)!r}: pass one of the two")
    found = ranks_of([owners[key] for key in keys], rank)
    for value in dict.fromkeys(rank.values()):
        yield {"rank": value}, [key for key in keys if found[owners[key]] == value]


def _by_decay(options: dict[str, Any], pairs: Pairs, still: set[str]) -> Iterator[dict[str, Any]]:
    """Yield a group, and one more for those of its parameters (named in `still`) that do not decay."""
    for part, extra in (
        ([pair for pair in pairs if pair[0] not in still], {}),
        ([pair for pair in pairs if pair[0] in still], {"weight_decay": 0.0}),
    ):
        if part:
            yield {"params": part, **options, **extra}


def head_groups(
    model: nn.Module,
    rank: int | str | Mapping[str, int | str] = 128,
    targets: Names | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split as `param_groups` does, with groups of their own for query and key layers, whose heads share a basis.

    Query and key layers are found by name, their heads in `model.config`, as Hugging Face's models have them; so are
    fused layers of rows in the order queries, keys, values. All go with `projector="cross_head"` and `num_heads`.

    Args:
        model: The model.
        rank: Rank of the projected groups, as in `param_groups`.
        targets: Which layers are projected, as in `param_groups`.
        options: Its other arguments, and further options of the projected groups, as `update_proj_gap=100`.

    Returns:
        The plain group, the ordinary projected one, and one for every `num_heads`; empty ones are left out.

    Raises:
        ValueError: Nothing is matched, no layer is a query or key layer, or the config does not tell their heads.
    """
    if options.pop("named", False):
        raise ValueError("named=True: head_groups returns parameters without names, which no method with heads needs")
    groups = param_groups(model, rank, targets, **options)
    chosen = {id(param) for group in groups if _is_projected(group) for param in group["params"]}
    heads: dict[int, int | tuple[tuple[int, int | None], ...]] = {}
    for name, layer in linear_layers(model).items():
        if id(layer.weight) in chosen and (found := _heads_of(model, name, layer)) is not None:
            heads[id(layer.weight)] = found
    if not heads:
        raise ValueError(
            f"no projected linear layer of {type(model).__name__} is a query or key layer by name ({QUERY_NAMES}, "
            f"{KEY_NAMES}, fused {FUSED_NAMES}): {BY_HAND}"
        )
    return [part for group in groups for part in (_by_heads(group, heads) if _is_projected(group) else [group])]


def _is_projected(group: Mapping[str, Any]) -> bool:
    return "rank" in group or "density" in group


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
