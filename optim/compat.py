"""The neighbours' module names, and the strings by which Hugging Face's Trainer asks for them, on request."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import presets, trainer
from .apollo import APOLLOAdamW
from .core.lifecycle import Lifecycle

BITSANDBYTES = {
    "amsgrad": False,
    "optim_bits": 8,
    "args": None,
    "min_8bit_size": 4096,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": False,
}
"""Arguments that frameworks pass on to an 8-bit optimizer of bitsandbytes, and the one value that ours takes."""


class GaLoreAdamW8bit(presets.GaLoreAdamW8bit):
    """`GaLoreAdamW8bit` with the arguments that the authors' class hands on to bitsandbytes.

    Args:
        params: Parameters or the official parameter groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, after the update.
        options: Any further option of `GaLore`, and `optim_bits=8` and the others of bitsandbytes at their defaults.

    Raises:
        ValueError: As `GaLore`, or an option of bitsandbytes asks for what is not offered, as `is_paged=True`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        for name, offered in BITSANDBYTES.items():
            given = options.pop(name, offered)
            if given != offered:
                raise ValueError(f"{name}={given!r} is not offered: pass {name}={offered!r}, or drop it")
        super().__init__(params, lr, betas, eps, weight_decay, **options)


MODULES: dict[str, dict[str, type[Lifecycle]]] = {
    "galore_torch": {
        "GaLoreAdafactor": presets.GaLoreAdafactor,
        "GaLoreAdamW": presets.GaLoreAdamW,
        "GaLoreAdamW8bit": GaLoreAdamW8bit,
    },
    "apollo_torch": {"APOLLOAdamW": APOLLOAdamW},
}
"""Import names that are served, and what is in them."""

VERSION = "1.0+lowmem"

_installed: Shims | None = None


def install() -> Shims:
    """Serve the import names `galore_torch` and `apollo_torch`, and the Trainer's strings for them, by this package.

        from lowmem.optim.compat import install

        install()  # before frameworks that ask for these modules when they are imported
        arguments = TrainingArguments(optim="galore_adamw", optim_args="rank=64", optim_target_modules=["attn", "mlp"])
        Trainer(model, arguments, train_dataset=data).train()

    Two things change, in this process only. `import galore_torch` finds a module of `GaLoreAdamW`, `GaLoreAdamW8bit`
    and `GaLoreAdafactor`, and `import apollo_torch` one of `APOLLOAdamW`, in the place of installed ones if there are
    any; their version is "1.0+lowmem". And where transformers is installed, two methods of `Trainer`,
    `get_optimizer_cls_and_kwargs` and `create_optimizer`, serve `optim="galore_adamw"`, `"galore_adamw_8bit"`,
    `"galore_adafactor"`, `"apollo_adamw"` and their twins in `"_layerwise"`; every other string goes on to the methods
    that were there. What differs from the Trainer with the authors' packages:

    - `weight_decay` is honoured, with the Trainer's own choice of what decays (no biases, no norms), and so are
      `adam_beta1`, `adam_beta2` and `adam_epsilon`, which Adafactor has not; the Trainer ignores all four.
    - `optim_args` takes every option of the class, as "rank=64, projector=sketch, state_dtype=8bit", and refuses
      unknown ones; a target that matches no linear layer is refused too.
    - a layer-wise string builds one optimizer of all parameters, stepped by `enable_gradient_release` while the Trainer
      trains: schedules, logged rates, checkpoints and resuming are those of any optimizer. What needs all gradients at
      once (clipping, accumulation, a scaler, averaging over processes) is refused: pass `max_grad_norm=0`, which is 1
      by default. The logged norm is 0.

    Returns:
        A handle with `remove()`, which is a context manager too; the same one while it is in place.
    """
    global _installed
    _installed = _installed or Shims()
    return _installed


def uninstall() -> None:
    """Take away what `install` put in place; nothing happens where there is nothing."""
    if _installed is not None:
        _installed.remove()


class Shims:
    """What `install` put in place; a context manager that takes it away at its end."""

    def __init__(self) -> None:
        self._finder = _Finder()
        self._shadowed = _drop_modules()
        sys.meta_path.insert(0, self._finder)
        self._undo = trainer.patch() if importlib.util.find_spec("transformers") else None

    def remove(self) -> None:
        """Restore the Trainer's methods and the modules that were there; optimizers that exist stay what they are."""
        global _installed
        if _installed is not self:
            return
        _installed = None
        sys.meta_path.remove(self._finder)
        _drop_modules()
        sys.modules.update(self._shadowed)
        if self._undo is not None:
            self._undo()

    def __enter__(self) -> Shims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module, and the metadata by which frameworks check that a package is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, origin=__name__) if name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        served = MODULES[module.__name__]
        vars(module).update(served, __version__=VERSION, __all__=list(served))

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        name = "" if context is None else str(context.name).replace("-", "_").lower()
        if name in MODULES:
            yield _Distribution(name)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, module: str) -> None:
        self._module = module

    def read_text(self, filename: str) -> str | None:
        found = filename == "METADATA"
        name = self._module.replace("_", "-")
        return f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n" if found else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: {self._module} is served by {__name__} and has no files")


def _drop_modules() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in MODULES}
