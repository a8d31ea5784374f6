"""What an ablation runs, as a YAML file says it; nothing is expanded or checked against optimizers here.

A complete file:

    title: Rank and interval of GaLore      # of the report; the file's name without it
    shared:                                 # options of `lowmem pretrain`; a list is an axis of the grid
      model: 9m
      steps: 100
      dtype: [fp32, bf16]
    seeds: 3                                # shared seed and the two after it; or a list of seeds
    grid:                                   # every entry with all of its values, all axes and all seeds
      - adamw lr=1e-3|2e-3                  # an ENTRY of `lowmem compare`,
      - optimizer: galore                   # or a mapping, whose lists are the values of a grid
        lr: [1e-2, 2e-2]
        rank: [32, 64]
        carry: [rotate, keep]               # (the grid may also be one mapping from optimizers to their options)
    cases:                                  # what depends on the point: where all of `when` holds, `set` is filled in,
      - when:                               # but for what the entry says itself
          {dtype: bf16, optimizer: galore}
        set: {rounding: stochastic}
    paper:                                  # published perplexities, shown beside the measured ones
      source: Some paper, Table 2
      loss: val                             # or train: which of our perplexities they stand beside
      figures:
        - {optimizer: adamw, dtype: bf16, perplexity: 34.06}
    notes:                                  # shown under the report
      - What differs from the paper.

Scalars are taken as they are written, as folders are named after them: `1e-3` and `0.001` are two names of one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError, did_you_mean, one_line
from ..search import Entry, parse_entry
from .strict_yaml import load

RUN_OPTIONS = tuple(item.name for item in fields(RunConfig) if "help" in item.metadata)
PRESETS = files(__package__) / "presets"
LOSSES = ("val", "train")


@dataclass(frozen=True)
class Case:
    """Options that points get where all of `when` holds; one name may have several values there."""

    when: Mapping[str, Sequence[str]]
    put: Mapping[str, str]


@dataclass(frozen=True)
class Paper:
    """Published perplexities: each with the options that a point must have, and its optimizer."""

    source: str = ""
    loss: str = "val"
    figures: Sequence[tuple[Mapping[str, Sequence[str]], float]] = ()


@dataclass(frozen=True)
class Lab:
    """An ablation as it was written; a value of `shared` and of entries may hold several, with `|` between.

    Those of `shared` that do are axes of the grid, as are those that `axes` names though they have one value.
    """

    title: str
    grid: Sequence[Entry]
    shared: Mapping[str, str] = field(default_factory=dict)
    seeds: int | tuple[int, ...] = 1
    cases: Sequence[Case] = ()
    paper: Paper = Paper()
    notes: Sequence[str] = ()
    axes: Sequence[str] = ()


def preset_names() -> list[str]:
    """Return the names of the packaged files."""
    return sorted(item.name.removesuffix(".yaml") for item in PRESETS.iterdir() if item.name.endswith(".yaml"))


def read_preset(name: str) -> Lab:
    """Return a packaged ablation.

    Raises:
        UserError: If there is none of that name.
    """
    names = preset_names()
    if name not in names:
        raise UserError(f"--preset {name}: there is none.{did_you_mean(name, names)} Choose from: {', '.join(names)}")
    return parse((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), f"--preset {name}", name)


def read_file(path: Path) -> Lab:
    """Return the ablation of a YAML file.

    Raises:
        UserError: If there is no such file, or it is no ablation.
    """
    if not path.is_file():
        raise UserError(f"--file {path}: there is no such file; presets are named by --preset")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path} cannot be read as UTF-8: {one_line(error)}") from error
    return parse(text, f"--file {path}", path.stem)


def parse(text: str, where: str, title: str) -> Lab:
    """Read the YAML of an ablation; errors begin with `where`.

    Raises:
        UserError: If it is no YAML, or has keys or values that mean nothing.
    """
    values = load(text, where)
    try:
        return _lab(_mapping(values, "the file"), title)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_seeds(value: Any) -> int | tuple[int, ...]:
    """Read a number of seeds, or the seeds themselves, from a list or a text with commas or `|` between."""
    words = value if isinstance(value, list) else str(value).replace("|", ",").split(",")
    try:
        numbers = tuple(int(word) for word in words)
    except (TypeError, ValueError):
        numbers = ()
    alone = len(numbers) == 1 and not isinstance(value, list)
    if not numbers or min(numbers) < (1 if alone else 0) or len({*numbers}) < len(numbers):
        raise UserError(f"seeds is {value}: write how many, as 3, or different ones, as 0,1,5")
    return numbers[0] if alone else numbers


def _lab(values: dict[str, Any], title: str) -> Lab:
    known = ("title", "shared", "seeds", "grid", "cases", "paper", "notes")
    _only(values, known, "the file")
    return Lab(
        title=_word("title", values.get("title") or title),
        grid=_grid(values.get("grid", [])),
        shared={name: _text(name, value) for name, value in _mapping(values.get("shared") or {}, "shared").items()},
        seeds=parse_seeds(values.get("seeds", "1")),
        cases=[_case(_mapping(item, "cases")) for item in _list(values.get("cases") or [], "cases")],
        paper=_paper(_mapping(values.get("paper") or {}, "paper")),
        notes=[_word("notes", note) for note in _list(values.get("notes") or [], "notes")],
    )


def _grid(value: Any) -> list[Entry]:
    if isinstance(value, dict):
        twice = [name for name, options in value.items() if "optimizer" in _mapping(options or {}, name)]
        if twice:
            raise UserError(f"grid: {twice[0]} is the optimizer already; leave its option optimizer out")
        value = [{"optimizer": name, **(options or {})} for name, options in value.items()]
    entries = []
    for item in _list(value, "grid"):
        if isinstance(item, str):
            entries.append(parse_entry(item))
            continue
        options = dict(_mapping(item, "grid"))
        if not isinstance(name := options.pop("optimizer", None), str):
            raise UserError(f"grid: {item} names no optimizer; write optimizer: galore")
        entries.append(Entry(name, {key: _text(key, text) for key, text in options.items()}))
    return entries


def _case(values: dict[str, Any]) -> Case:
    _only(values, ("when", "set"), "cases")
    put = {name: _text(name, text) for name, text in _mapping(values.get("set"), "set").items()}
    if "seed" in put:
        raise UserError("cases: a seed is of all points; write seeds: [0, 1] beside grid")
    several = [name for name, text in put.items() if "|" in text]
    if several:
        raise UserError(f"cases: {several[0]} has several values; a grid of it belongs into shared or grid")
    return Case(_condition(_mapping(values.get("when"), "when")), put)


def _paper(values: dict[str, Any]) -> Paper:
    _only(values, ("source", "loss", "figures"), "paper")
    loss = str(values.get("loss", "val"))
    if loss not in LOSSES:
        raise UserError(f"paper: loss is {loss}: it must be {' or '.join(LOSSES)}")
    figures = []
    for item in _list(values.get("figures") or [], "figures"):
        condition = dict(_mapping(item, "figures"))
        try:
            number = float(condition.pop("perplexity"))
        except (KeyError, TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise UserError(f"figures: {item} needs perplexity: a number above 0")
        figures.append((condition, number))
    source = _word("source", values.get("source", ""))
    if values and not source:
        raise UserError("paper needs source: which paper and table its figures are from")
    return Paper(source, loss, [(_condition(when), number) for when, number in figures])


def _condition(values: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: _text(name, value).split("|") for name, value in values.items()}


def _text(name: str, value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str) for item in items):
        raise UserError(f"{name}: {value} is neither a value nor a list of values")
    return "|".join(items)


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is {value}: it must be a text; put it in quotes")
    return value


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}: it must be a mapping, name: value")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{name} is {value!r}: it must be a list")
    return value


def _only(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(f"{where} has {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
