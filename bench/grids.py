"""The published grids: what `lowmem compare --optimizers` runs, so that nobody must type it."""

from __future__ import annotations

from collections.abc import Mapping

from .config import RunConfig
from .errors import UserError, did_you_mean
from .models import model_config
from .optimizers import available, resolve
from .options import options_of, pairs_to_texts
from .search import Entry

GRIDS = {
    "adamw": "lr=1e-3|2e-3|4e-3",
    "galore": "lr=1e-2|2e-2|4e-2",
    "galoreplus": "lr=1e-2|2e-2|4e-2",
    "fira": "lr=1e-2|2e-2|4e-2",
    "apollo": "lr=5e-3|1e-2|2e-2",
    "frugal": "lr=1e-3|2e-3|4e-3 density=0.25",
    "onlinesubspacedescent": "lr=3e-3|1e-2|3e-2",
    "flora": "lr=1e-2|3e-2|1e-1",
    "adafactor": "lr=1e-2|3e-2|1e-1",
}
"""Options by optimizer name; rank and refresh interval are filled in where the optimizer has them."""

# It inherits the interval as an option of its signature, but refuses it: its basis is never refreshed.
NEVER_REFRESHED = ("onlinesubspacedescent",)
RANK_SHARE = 4
GAP = 50


def published(names: str, shared: RunConfig, rank: int | None = None, gap: int | None = None) -> list[Entry]:
    """Return the entries of the published grids.

    Args:
        names: Names with commas between, `all` for all that there are, or nothing for none.
        shared: The configuration of the runs, whose model decides the usual rank.
        rank: Rank of the projections; None takes a quarter of the model's hidden size.
        gap: Steps between two refreshes; None takes 50.

    Raises:
        UserError: If a name is unknown or has no grid, or if no chosen optimizer has a rank or interval that was given.
    """
    chosen = _choose(names)
    size = model_config(shared.model, max_length=shared.length).hidden_size if chosen else 0
    fills = {"rank": (rank, max(1, size // RANK_SHARE)), "update_proj_gap": (gap, GAP)}
    entries = []
    for name in chosen:
        texts = pairs_to_texts(GRIDS[name].split())
        for option in _fillable(name, texts):
            given, usual = fills[option]
            # What the grid itself says is only changed by a flag.
            texts[option] = texts.get(option, str(usual)) if given is None else str(given)
        entries.append(Entry(name, texts))
    for flag, option, given in (("--rank", "rank", rank), ("--gap", "update_proj_gap", gap)):
        if given is not None and not any(option in entry.texts for entry in entries):
            where = f"none of {', '.join(chosen)} has {option}" if chosen else "it fills in the grids of --optimizers"
            raise UserError(f"{flag} {given}: {where}; in an ENTRY write {option}={given}")
    return entries


def _choose(names: str) -> list[str]:
    if not names:
        return []
    if names == "all":
        return [name for name in GRIDS if name in available()]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        resolve(name)
        if name not in GRIDS:
            near = did_you_mean(name, GRIDS)
            raise UserError(f'{name} has no published grid.{near} Write an ENTRY, for example "{name} lr=1e-3|2e-3"')
    return chosen


def _fillable(name: str, texts: Mapping[str, str]) -> list[str]:
    known = options_of(resolve(name))
    refused = ["update_proj_gap"] if name in NEVER_REFRESHED else []
    # A density is a rank already.
    refused += ["rank"] if "density" in texts else []
    return [option for option in ("rank", "update_proj_gap") if option in known and option not in refused]
