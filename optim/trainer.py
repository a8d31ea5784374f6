"""Hugging Face Trainer's strings for GaLore and APOLLO, built by this package; `compat.install` puts this in place."""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from . import presets
from .apollo import APOLLOAdamW
from .core.lifecycle import Lifecycle
from .core.optimizer import SubspaceOptimizer
from .release import enable_gradient_release

logger = logging.getLogger(__name__)

STRINGS: dict[str, type[Lifecycle]] = {
    "galore_adamw": presets.GaLoreAdamW,
    "galore_adamw_8bit": presets.GaLoreAdamW8bit,
    "galore_adafactor": presets.GaLoreAdafactor,
    "apollo_adamw": APOLLOAdamW,
}
"""Values of `TrainingArguments(optim=...)`; each has a twin that ends in "_layerwise"."""

LAYERWISE = "_layerwise"

GROUP = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
"""Options of the projected group with the Trainer's defaults; APOLLO's `scale` is 1."""


def patch() -> Callable[[], None]:
    """Let the Trainer build our optimizers for their strings; return what restores it."""
    from transformers import Trainer, utils

    choose, create = vars(Trainer)["get_optimizer_cls_and_kwargs"], Trainer.create_optimizer

    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> Any:
        chosen = _chosen(args, model)
        return choose.__func__(args, model) if chosen is None else chosen

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.optimizer is not None or getattr(self, "optimizer_cls_and_kwargs", None) is not None
        optimizer = create(self, *args, **kwargs)
        name = _name(self.args)
        if not given and name.endswith(LAYERWISE) and name.removesuffix(LAYERWISE) in STRINGS:
            self.remove_callback(_release_callback())
            self.add_callback(_release_callback()(optimizer))
        return optimizer

    def restore() -> None:
        Trainer.get_optimizer_cls_and_kwargs, Trainer.create_optimizer = choose, create
        forget()

    def forget() -> None:  # transformers asks once whether a package is installed and remembers the answer
        for package in ("galore", "apollo"):
            asked = getattr(utils, f"is_{package}_torch_available", None)
            getattr(asked, "cache_clear", lambda: None)()

    forget()
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    Trainer.create_optimizer = create_optimizer
    return restore


def _name(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _chosen(args: Any, model: nn.Module | None) -> tuple[type[Lifecycle], dict[str, Any]] | None:
    """The class that `args.optim` names and its keywords, groups as "params"; None where it is none of ours."""
    name = _name(args)
    cls = STRINGS.get(name.removesuffix(LAYERWISE))
    if cls is None:
        return None
    if model is None:
        raise ValueError(f"optim={name!r} chooses among a model's layers: pass the model")
    if name.endswith(LAYERWISE):
        _check_layerwise(args, name)
    given = _options(args.optim_args, cls)
    defaults = {**GROUP, "scale": 1.0} if cls is APOLLOAdamW else GROUP
    projected = {key: given.pop(key, default) for key, default in defaults.items()}
    if cls is presets.GaLoreAdafactor:
        given = {"scale_parameter": False, "relative_step": False, **given}
    else:
        given |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    groups = _groups(args, model, {**projected, "weight_decay": args.weight_decay})
    logger.info("%s: %d matrices are projected, %s", name, len(groups[-1]["params"]), projected)
    return cls, {"params": groups, "lr": args.learning_rate, "weight_decay": args.weight_decay, **given}


def _groups(args: Any, model: nn.Module, projected: dict[str, Any]) -> list[dict[str, Any]]:
    """Plain parameters without and with decay, and the weights that `optim_target_modules` names, last."""
    from transformers import Trainer

    targets = _targets(args, model)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    chosen = {name: param for name, param in params.items() if name in targets}
    if not chosen:
        raise ValueError(f"optim_target_modules={args.optim_target_modules!r}: all that it names is frozen")
    decays = set(Trainer.get_decay_parameter_names(None, model))  # a method that reads nothing of a trainer
    plain = [param for name, param in params.items() if name not in chosen and name not in decays]
    decayed = [param for name, param in params.items() if name not in chosen and name in decays]
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": projected["weight_decay"]},
        {"params": list(chosen.values()), **projected},
    ]
    return [group for group in groups if group["params"]]


def _targets(args: Any, model: nn.Module) -> set[str]:
    """Names of the weights of the linear layers that the Trainer's rules match: a regex, a list or "all-linear"."""
    from transformers.trainer_utils import check_target_module_exists

    asked = args.optim_target_modules
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if asked is None or not isinstance(asked, (str, list)):
        raise ValueError(
            f"optim_target_modules={asked!r}: name the linear layers that are projected, as "
            'TrainingArguments(optim_target_modules=["attn", "mlp"]), or "all-linear"'
        )
    if isinstance(asked, str) and asked.replace("_", "-") == "all-linear":
        return {f"{name}.weight" for name in linear}
    matched: set[str] = set()
    for pattern in [asked] if isinstance(asked, str) else asked:
        found = {name for name in linear if check_target_module_exists(asked if pattern is asked else [pattern], name)}
        if not found:
            raise ValueError(
                f"optim_target_modules: {pattern!r} matches no linear layer of {', '.join(linear[:8])}, ..."
            )
        matched |= {f"{name}.weight" for name in found}
    return matched


def _options(text: str | None, cls: type[Lifecycle]) -> dict[str, Any]:
    """Read `optim_args`, "rank=64, projector=sketch", as options of a class."""
    bases = [base for base in cls.__mro__ if issubclass(base, SubspaceOptimizer)]
    accepted = {name for base in bases for name in inspect.signature(base).parameters}
    accepted -= {"params", "options", "lr", "betas", "eps", "weight_decay"}  # TrainingArguments has them
    found = {}
    for item in filter(None, (text or "").replace(" ", "").split(",")):
        key, _, value = item.partition("=")
        if key not in accepted or not value:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(sorted(accepted))}"
            raise ValueError(f"optim_args={text!r}: {item!r} is no option of {cls.__name__}; {hint}")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):  # a name, as std or 8bit
        return text


def _check_layerwise(args: Any, name: str) -> None:
    """Refuse what needs the gradients of all parameters at once."""
    plain = name.removesuffix(LAYERWISE)
    needed = {
        "max_grad_norm": (args.max_grad_norm, 0),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, 1),
        "fp16": (args.fp16, False),
        "world_size": (args.world_size, 1),
    }
    for option, (given, offered) in needed.items():
        if (given or 0) != offered:
            raise ValueError(
                f"{option}={given}: optim={name!r} uses every gradient as soon as it is there and frees it, and needs "
                f"{option}={offered}; pass that, or optim={plain!r}"
            )


@cache
def _release_callback() -> Any:
    """The class of the callback that releases gradients while the Trainer trains."""
    from transformers import TrainerCallback

    class ReleaseGradients(TrainerCallback):  # type: ignore[misc]
        """Hooks exist from the beginning to the end of training, or to the next beginning after an exception."""

        def __init__(self, optimizer: Lifecycle) -> None:
            self.optimizer = optimizer
            self.handle: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_train_end(args, state, control)
            self.handle = enable_gradient_release(kwargs["model"], self.optimizer)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.handle is not None:
                self.handle.remove()

    return ReleaseGradients
