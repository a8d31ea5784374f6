"""Memory-efficient replacements of torch.optim optimizers.

    from lowmem.optim import GaLore, param_groups

    optimizer = GaLore(param_groups(model, rank=128), lr=1e-2)  # was: torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(optimizer.summary())

- **Methods:** `GaLore` (whose arguments the others share), `GaLorePlus`, `Fira`, `Apollo`, `Frugal`, `BAdam`, `LISA`,
  `OnlineSubspaceDescent`, `Flora`, `Adafactor`, `AdamW8bit`, and `LowRank`, which combines their parts.
- **Constructors of other packages:** `GaLoreAdamW`, `GaLoreAdamW8bit`, `GaLoreAdafactor`, `FiraAdamW`, `APOLLOAdamW`;
  `lowmem.optim.compat` serves their import names and the strings of Hugging Face's Trainer.
- **Groups of a model:** `param_groups`, `head_groups`, and `matched`, which tells what they meant.
- **Gradients:** `enable_gradient_release` steps in the backward pass, `SubspaceAccumulator` sums micro-batches in the
  subspace, `SubspaceReduction` sends R in the place of gradients, `kept_shard` shards so that projections send nothing,
  `check_replicas` tells whether copies are still equal.
- **Speed:** `GraphedStep` launches the steps between refreshes as one CUDA graph.
- **Checkpoints:** `convert_state` (another rank, other bits), `from_bitsandbytes`, `to_bitsandbytes`,
  `full_precision_state_dict`.
- **Memory before training:** `plan`, `plan_training`.
"""

from .accumulate import SubspaceAccumulator
from .adafactor import Adafactor
from .adamw import AdamW8bit
from .apollo import Apollo, APOLLOAdamW
from .badam import LISA, BAdam
from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .convert import convert_state
from .ddp import SubspaceReduction, check_replicas
from .fira import Fira
from .flora import Flora
from .frugal import Frugal
from .galore import GaLore
from .galore_plus import GaLorePlus
from .graphs import GraphedStep
from .lowrank import LowRank
from .matched import Matched, matched
from .online_subspace import OnlineSubspaceDescent
from .params import head_groups, param_groups
from .plan import Plan, TrainingPlan, plan, plan_training
from .precision import full_precision_state_dict
from .presets import FiraAdamW, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .release import GradientRelease, enable_gradient_release
from .shard import kept_shard

__all__ = [
    "LISA",
    "APOLLOAdamW",
    "Adafactor",
    "AdamW8bit",
    "Apollo",
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
    "GradientRelease",
    "GraphedStep",
    "LowRank",
    "Matched",
    "OnlineSubspaceDescent",
    "Plan",
    "SubspaceAccumulator",
    "SubspaceReduction",
    "TrainingPlan",
    "check_replicas",
    "convert_state",
    "enable_gradient_release",
    "from_bitsandbytes",
    "full_precision_state_dict",
    "head_groups",
    "kept_shard",
    "matched",
    "param_groups",
    "plan",
    "plan_training",
    "to_bitsandbytes",
]
