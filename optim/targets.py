"""Finding the layers of a model that names and patterns mean, by Hugging Face's rules, and those to be left plain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

ALL_LINEAR = "all-linear"
Names = str | Sequence[str]

HEAD_NAMES = ("lm_head", "embed_out", "output_projection", "score", "classifier")
"""Last parts of the names of output layers, which the papers leave full-rank."""

EXPERTS = ("expert", "moe")
"""Parts of the names of fused mixtures of experts, or of their classes."""

QUANTISED = ("Params4bit", "Int8Params")
"""Classes of bitsandbytes' weights, whose dtype is floating until they are moved to a GPU and coded."""


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Layers whose weight is a matrix that can be trained, or could if it were not frozen, by name."""
    # Hugging Face's GPT-2 layer is a linear layer with a transposed weight; by name, to not import transformers.
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and not is_quantised(module)
    }


def without_head(model: nn.Module, layers: Mapping[str, Any]) -> list[str]:
    """Names of the layers that the papers project: all but the output head and weights tied to an embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = getattr(find_head(), "weight", None)
    return [
        name
        for name, layer in layers.items()
        if id(layer.weight) not in embeddings and layer.weight is not head and name.split(".")[-1] not in HEAD_NAMES
    ]


def named_weights(model: nn.Module, layers: Mapping[str, Any], targets: Names) -> dict[str, nn.Parameter]:
    """Weights of the linear and convolutional layers, and stacks of experts, that `targets` mean.

    A layer has its own name, a stack that of the parameter; that of its module means all stacks of it.

    Raises:
        ValueError: One of `targets` means none of them; the error tells what it does mean, if anything.
    """
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    found = {name: layer.weight for name, layer in {**layers, **convolutions}.items()}
    held = stacks(model)
    for target in _each(targets):
        if not (matching(found, target) or _of_stacks(held, target)):
            raise ValueError(_nothing(model, layers, target))
    chosen = {name: found[name] for name in matching(found, targets)}
    return chosen | {name: held[name] for name in _of_stacks(held, targets)}


def _of_stacks(names: Iterable[str], targets: Names) -> list[str]:
    return [name for name in names if _matches(name, targets) or _matches(name.rpartition(".")[0], targets)]


def matching(names: Iterable[str], targets: Names) -> list[str]:
    """The names that `targets` match: one regular expression for whole names, or a list of what `_matches` says."""
    return [name for name in names if _matches(name, targets)]


def _matches(name: str, targets: Names) -> bool:
    """As in transformers, entries of a list are whole names, parts of names, or regular expressions for whole names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(part in name or re.fullmatch(part, name) for part in targets)


def without(names: Iterable[str], exclude: Names) -> list[str]:
    """The names that none of `exclude` matches.

    Raises:
        ValueError: One of them matches none.
    """
    every = list(names)
    for pattern in _each(exclude):
        if not matching(every, pattern):
            raise ValueError(f"exclude {_shown(pattern)} matches none of {listed(every)}{_hint('exclude', pattern)}")
    return [name for name in every if not _matches(name, exclude)]


def ranks_of(names: Sequence[str], ranks: Mapping[str, int | str]) -> dict[str, int | str]:
    """The rank of every name, that of the first pattern (a name, a part of one or an expression) which matches it.

    Raises:
        ValueError: A pattern decides no name, or a name has no pattern.
    """
    found: dict[str, int | str] = {}
    for pattern, rank in ranks.items():
        fresh = [name for name in matching(names, [pattern]) if name not in found]
        if not fresh:
            raise ValueError(f"rank pattern {pattern!r} matches none of the layers left to it, of {listed(names)}")
        found |= dict.fromkeys(fresh, rank)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f'no rank for {listed(missing)}: add ".*": 128 as the last pattern, or exclude=[...] them')
    return found


def undecayed(
    model: nn.Module, names: Sequence[str], exclude: bool | Names | Callable[[str, Tensor], bool] | None
) -> set[str]:
    """Names of the parameters that do not decay.

    Raises:
        ValueError: A pattern matches no parameter.
    """
    if exclude is None or exclude is False:
        return set()
    if callable(exclude):
        return {name for name in names if exclude(name, model.get_parameter(name))}
    if exclude is True:
        norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
        return {name for name in names if name.rpartition(".")[2] == "bias" or name.rpartition(".")[0] in norms}
    for pattern in _each(exclude):
        if not matching(names, pattern):
            raise ValueError(
                f"weight_decay_exclude {_shown(pattern)} matches none of {listed(names)}"
                f"{_hint('weight_decay_exclude', pattern)}"
            )
    return set(matching(names, exclude))


def is_quantised(layer: Any) -> bool:
    """Tell whether a layer holds codes instead of numbers (bitsandbytes, GPTQ, torchao)."""
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "qweight"):
        return True
    if not isinstance(weight, Tensor):
        return False
    coded = type(weight).__name__ in QUANTISED or type(weight).__module__.startswith("torchao")
    return not weight.is_floating_point() or (coded and not weight.requires_grad)


def quantised_layers(model: nn.Module) -> list[str]:
    """Names of layers that hold codes."""
    return [name for name, module in model.named_modules() if is_quantised(module)]


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of three dimensions that may be stacks of matrices, by name: all but kernels of convolutions."""
    owners = {name: module for name, module in model.named_modules() if not isinstance(module, _ConvNd)}
    return {
        name: param
        for name, param in model.named_parameters()
        if param.ndim == 3 and param.is_floating_point() and name.rpartition(".")[0] in owners
    }


def experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those `stacks` that are fused experts (E, m, n), told by name or class; a table of positions, say, is not."""
    found = {}
    for name, param in stacks(model).items():
        told = f"{name} {type(model.get_submodule(name.rpartition('.')[0])).__name__}".lower()
        if any(part in told for part in EXPERTS):
            found[name] = param
    return found


def listed(names: Sequence[str]) -> str:
    """A few names for an error."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "") or "nothing"


def _nothing(model: nn.Module, layers: Mapping[str, Any], target: Names) -> str:
    shown = _shown(target)
    if found := matching(quantised_layers(model), target):
        return (
            f"target {shown} matches no linear layer but quantised ones, {listed(found)}, whose codes no optimizer can "
            'train: load the model without quantization_config, or name its adapters: targets=["lora_A", "lora_B"]'
        )
    return f"target {shown} matches no linear layer; there are {listed(list(layers))}{_hint('targets', target)}"


def _each(patterns: Names) -> Iterator[Names]:
    if isinstance(patterns, str):
        yield patterns
    else:
        yield from ([pattern] for pattern in patterns)


def _shown(pattern: Names) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern[0])


def _hint(argument: str, pattern: Names) -> str:
    return (
        f". A string must match a whole name: {argument}=[{pattern!r}] finds parts" if isinstance(pattern, str) else ""
    )
