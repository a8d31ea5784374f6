"""Memory-efficient replacements of torch.optim optimizers."""

from .accumulate import SubspaceAccumulator
from .adafactor import Adafactor
from .adamw import AdamW8bit
from .badam import LISA, BAdam
from .fira import Fira
from .flora import Flora
from .frugal import Frugal
from .galore import GaLore
from .galore_plus import GaLorePlus
from .lowrank import LowRank
from .online_subspace import OnlineSubspaceDescent
from .params import head_groups, param_groups
from .presets import FiraAdamW, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

__all__ = [
    "LISA",
    "Adafactor",
    "AdamW8bit",
    "BAdam",
    "Fira",
    "FiraAdamW",
    "Flora",
    "Frugal",
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLorePlus",
    "LowRank",
    "OnlineSubspaceDescent",
    "SubspaceAccumulator",
    "head_groups",
    "param_groups",
]
