"""From an ablation as it was written to the runs that it means, all of them checked before the first one starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import get_type_hints

from torch import nn

from ..config import RunConfig
from ..errors import UserError, did_you_mean
from ..optimizers import build_optimizer, run_options
from ..options import EMPTY, Option, parse_options
from ..planner import MODEL_DTYPES, skeleton
from ..search import Entry, Run, expand, refuse_repeats
from .spec import RUN_OPTIONS, Case, Lab

HINTS = get_type_hints(RunConfig)
RUN_FLAGS = {f.name: Option(f.name, f.default, (HINTS[f.name],)) for f in fields(RunConfig) if f.name in RUN_OPTIONS}


@dataclass(frozen=True)
class Point:
    """One point of the grid: the options that name it, and what they and all others make of a run.

    Args:
        entry: The optimizer and the options that its entry and the axes of the grid say; they name the run folder.
        config: The run with the shared seed.
        texts: All options of the optimizer as they were written.
        facts: Everything that a condition may ask for, as it was written, or else its default.
    """

    entry: Entry
    config: RunConfig
    texts: Mapping[str, str]
    facts: Mapping[str, str]

    @property
    def flags(self) -> list[str]:
        """The optimizer's options as flags of `lowmem pretrain`."""
        return Entry(self.entry.optimizer, self.texts).flags

    @property
    def state_bytes(self) -> int | None:
        """Bytes of optimizer state, counted without allocating it; None where the first gradients decide."""
        decisive = tuple((name, text) for name, text in self.texts.items() if name != "lr")
        return _state_bytes(self.config.model, self.config.dtype, self.entry.optimizer, decisive)

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """Return a run for every seed; the one of the shared seed keeps the point's own folder."""
        own, name = self.config.seed, self.entry.folder
        return [Run(self.entry, seed, name if seed == own else f"{name}_seed{seed}") for seed in seeds]


def points_of(lab: Lab) -> list[Point]:
    """Expand the grid and check every point: names, values, and that the optimizer takes them.

    Raises:
        UserError: If something is wrong with the grid or with one of its points.
    """
    entries, shared = _expand(lab)
    return [_point(entry, shared, lab.cases) for entry in entries]


def refuse_idle(lab: Lab) -> None:
    """Refuse conditions that no point of a file meets, before flags narrow its grid; a misspelt one would be ignored.

    Raises:
        UserError: If one of `cases` or of the paper's figures asks for what no point has, or something else is wrong.
    """
    entries, shared = _expand(lab)
    asked = [("cases", case.when) for case in lab.cases] + [("figures", when) for when, _ in lab.paper.figures]
    # Of a case, what the cases in front of it make of a point decides.
    stages = [lab.cases[:index] for index in range(len(lab.cases))] + [lab.cases] * len(lab.paper.figures)
    for (where, when), cases in zip(asked, stages, strict=True):
        facts = [_facts(entry.optimizer, _texts(entry, shared, cases)) for entry in entries]
        for name, values in when.items():
            for value in values:
                if not any(matches({name: [value]}, own) for own in facts):
                    there = list(dict.fromkeys(own[name] for own in facts if name in own))
                    near = did_you_mean(value, there)
                    has = f"it is {', '.join(there[:6])}" if there else "none has it"
                    raise UserError(f"{where}: no point of the grid has {name}: {value}; {has}.{near}")
        if not any(matches(when, own) for own in facts):
            asks = ", ".join(f"{name}: {'|'.join(values)}" for name, values in when.items())
            raise UserError(f"{where}: no point of the grid has all of {asks}")


def _expand(lab: Lab) -> tuple[list[Entry], dict[str, str]]:
    """Return the points of the grid as entries, and the options that all of them share."""
    if not lab.grid:
        raise UserError('no grid: give an ENTRY, such as "galore lr=1e-2|2e-2 rank=32", a --file or a --preset')
    _check_names(lab)
    axes = {name: text for name, text in lab.shared.items() if "|" in text or name in lab.axes}
    if "seed" in axes or any("seed" in entry.texts for entry in lab.grid):
        raise UserError(f"seed is no axis of its own: write seeds: [{axes.get('seed', '0|1').replace('|', ', ')}]")
    shared = {name: text for name, text in lab.shared.items() if name not in axes}
    entries = [Entry(entry.optimizer, {**entry.texts, **_missing(axes, entry.texts)}) for entry in lab.grid]
    expanded = [point for entry in entries for point in expand(entry)]
    refuse_repeats(expanded)
    return expanded, shared


def seeds_of(lab: Lab, point: Point) -> list[int]:
    """Return the seeds of every point."""
    first = point.config.seed
    seeds = list(range(first, first + lab.seeds)) if isinstance(lab.seeds, int) else list(lab.seeds)
    for seed in seeds:
        replace(point.config, seed=seed)  # refuses one that is too large
    return seeds


def override(lab: Lab, name: str, text: str) -> Lab:
    """Set an option in all runs: one of pretrain, or, in the entries of optimizers that have it, one of those.

    An axis of the grid stays one, so that its runs keep their folders.

    Raises:
        UserError: If neither pretrain nor an optimizer of the grid has the option.
    """
    name = name.replace("-", "_")
    cases = [Case(case.when, _without(case.put, name)) for case in lab.cases]
    if name in RUN_OPTIONS:
        axes = [*lab.axes, name] if "|" in lab.shared.get(name, "") else lab.axes
        grid = [Entry(e.optimizer, {**e.texts, name: text}) if name in e.texts else e for e in lab.grid]
        return replace(lab, grid=grid, cases=cases, shared={**lab.shared, name: text}, axes=axes)
    having = [name in run_options(entry.optimizer) for entry in lab.grid]
    if not any(having):
        known = [*RUN_OPTIONS, *(option for entry in lab.grid for option in run_options(entry.optimizer))]
        near = did_you_mean(name, dict.fromkeys(known))
        raise UserError(f"--set {name}={text}: neither pretrain nor an optimizer of the grid has it.{near}")
    pairs = zip(lab.grid, having, strict=True)
    grid = [Entry(e.optimizer, {**e.texts, name: text}) if has else e for e, has in pairs]
    return replace(lab, grid=grid, cases=cases)


def matches(when: Mapping[str, Sequence[str]], facts: Mapping[str, str]) -> bool:
    """Tell whether all conditions hold."""
    return all(facts.get(name, "").lower() in map(str.lower, values) for name, values in when.items())


def _check_names(lab: Lab) -> None:
    """Names that mean nothing would be left out without a word."""
    own = {name for entry in lab.grid for name in run_options(entry.optimizer)}
    known = [*RUN_OPTIONS, *own]
    for name in lab.shared:
        if name not in RUN_OPTIONS:
            near = did_you_mean(name, RUN_OPTIONS)
            raise UserError(f"shared has {name!r}, no option of pretrain.{near} Those of optimizers belong into grid")
    asked = [name for case in lab.cases for name in (*case.when, *case.put)]
    asked += [name for when, _ in lab.paper.figures for name in when]
    for name in asked:
        if name not in ("optimizer", *known):
            raise UserError(f"cases or figures ask for {name!r}, which nothing has.{did_you_mean(name, known)}")


def _point(entry: Entry, shared: Mapping[str, str], cases: Sequence[Case]) -> Point:
    try:
        known = run_options(entry.optimizer)
        texts = _texts(entry, shared, cases)
        run = {name: RUN_FLAGS[name].parse(text) for name, text in texts.items() if name in RUN_OPTIONS}
        own = {name: text for name, text in texts.items() if name not in RUN_OPTIONS}
        for name in own:
            if name not in known:
                near = did_you_mean(name, [*known, *RUN_OPTIONS])
                raise UserError(f"no option {name!r} of {entry.optimizer} or of pretrain.{near}")
        options = parse_options(entry.optimizer, known, own)
        if isinstance(rate := options.get("lr"), float) and not math.isfinite(rate):
            raise UserError(f"lr is {rate}: it must be finite")
        config = RunConfig(**run, optimizer=entry.optimizer, options=options)
        build_optimizer(entry.optimizer, options, _skeleton(config.model, config.dtype), config.seed)
    except UserError as error:
        raise UserError(f"{entry.text}: {error}") from None
    return Point(entry, config, own, _facts(entry.optimizer, texts))


def _texts(entry: Entry, shared: Mapping[str, str], cases: Sequence[Case]) -> dict[str, str]:
    """Return what is said of a point: shared options, its own, and those of the cases that it is one of."""
    texts = {**shared, **entry.texts}
    for case in cases:
        if matches(case.when, _facts(entry.optimizer, texts)):
            texts = {**texts, **_missing(case.put, entry.texts)}
    return texts


def _facts(optimizer: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Return everything that a condition may ask for."""
    return {**_defaults(optimizer), **texts, "optimizer": optimizer}


@lru_cache
def _defaults(optimizer: str) -> dict[str, str]:
    known = {**RUN_FLAGS, **run_options(optimizer)}
    return {name: str(option.default) for name, option in known.items() if option.default is not EMPTY}


@lru_cache
def _state_bytes(model: str, dtype: str, optimizer: str, texts: tuple[tuple[str, str], ...]) -> int | None:
    from ...optim.plan import needs

    options = parse_options(optimizer, run_options(optimizer), dict(texts))
    try:
        return needs(build_optimizer(optimizer, options, _skeleton(model, dtype), seed=0), "cpu").plan.state
    except (RuntimeError, NotImplementedError, ValueError):
        return None


@lru_cache(maxsize=8)
def _skeleton(model: str, dtype: str) -> nn.Module:
    return skeleton(model, MODEL_DTYPES[dtype])


def _missing(texts: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name not in there}


def _without(texts: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: text for key, text in texts.items() if key != name}


def all_runs(lab: Lab, points: Sequence[Point]) -> Iterator[tuple[Point, Run]]:
    """Yield every run: the first seed of all points, then the next one, so that an early report shows all points."""
    each = [(point, point.runs(seeds_of(lab, point))) for point in points]
    for turn in zip(*(runs for _, runs in each), strict=True):
        yield from zip((point for point, _ in each), turn, strict=True)
