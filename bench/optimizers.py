"""The optimizers that a run can use: those of `lowmem.optim`, found by name, and torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .. import optim
from .errors import UserError, did_you_mean, one_line
from .options import Option, options_of


def available() -> dict[str, type[Optimizer]]:
    """Return the optimizers by lower-cased class name."""
    public = [getattr(optim, name) for name in optim.__all__]
    classes = [AdamW] + [item for item in public if isinstance(item, type) and issubclass(item, Optimizer)]
    return {cls.__name__.lower(): cls for cls in classes}


def resolve(name: str) -> type[Optimizer]:
    """Return the class of an optimizer.

    Raises:
        UserError: If there is no optimizer of that name.
    """
    found = available()
    if name not in found:
        raise UserError(f"unknown optimizer {name!r}.{did_you_mean(name, found)} Choose from: {', '.join(found)}")
    return found[name]


def run_options(name: str) -> dict[str, Option]:
    """Return the options that a run can set; `seed` is not among them, since the run's seed is used."""
    options = options_of(resolve(name))
    options.pop("seed", None)
    return options


def build_optimizer(name: str, options: Mapping[str, Any], model: nn.Module, seed: int) -> Optimizer:
    """Return the optimizer over `model`'s parameters.

    An optimizer with a `rank` gets the groups of `param_groups`: linear layers projected, the rest plain; GaLore+ gets
    those of `head_groups`.

    Raises:
        UserError: If the constructor refuses an option.
    """
    cls = resolve(name)
    known = options_of(cls)
    given = dict(options)
    if "seed" in known:
        given["seed"] = seed
    if cls is AdamW and not {"fused", "foreach", "differentiable"} & set(given):
        given["fused"] = True
    try:
        params = _groups(cls, given, model) if "rank" in known else list(model.parameters())
        return cls(params, **given)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def _groups(cls: type[Optimizer], given: dict[str, Any], model: nn.Module) -> Any:
    """Return the groups of an optimizer, taking what decides their size out of the given options."""
    size = {name: given.pop(name) for name in ("rank", "density") if name in given}
    if issubclass(cls, optim.BAdam):
        *plain, projected = optim.param_groups(model, **{"rank": given.pop("layers", 1), **size}, named=True)
        return [*({**group, "rank": None} for group in plain), projected]
    if issubclass(cls, optim.GaLorePlus):
        return optim.head_groups(model, **size)
    return optim.param_groups(model, **size)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state; storage that is shared counts once."""
    sizes: dict[tuple[str, int], int] = {}

    def visit(value: Any) -> None:
        if hasattr(value, "__tensor_flatten__"):  # torchao keeps codes and scales in a tensor subclass
            for name in value.__tensor_flatten__()[0]:
                visit(getattr(value, name))
        elif hasattr(value, "untyped_storage"):
            storage = value.untyped_storage()
            sizes[str(value.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__"):  # galore-torch keeps its bases in an object
            visit(vars(value))

    visit(optimizer.state)
    return sum(sizes.values())
