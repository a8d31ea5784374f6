"""Memory-efficient replacements of torch.optim optimizers."""

from .adafactor import Adafactor
from .galore import GaLore
from .params import param_groups
from .presets import GaLoreAdafactor, GaLoreAdamW

__all__ = ["Adafactor", "GaLore", "GaLoreAdafactor", "GaLoreAdamW", "param_groups"]
