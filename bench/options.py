"""Constructor options of an optimizer as text: found by `inspect.signature`, parsed by annotation or default."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UserError, did_you_mean

YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")
EMPTY = inspect.Parameter.empty
INHERITED = "the preset's"


@dataclass(frozen=True)
class Option:
    """One constructor option: its name, default and the types that it takes."""

    name: str
    default: Any
    kinds: tuple[Any, ...]

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def takes(self) -> list[str]:
        """Names of its types, as one writes about them."""
        return [_NAMES.get(kind, kind.__name__) for kind in self.kinds]

    def parse(self, text: str) -> Any:
        """Return the value that `text` says, by the first type that accepts it.

        Raises:
            UserError: If no type of the option accepts the text.
        """
        for kind in self.kinds:
            try:
                return _READERS[kind](text)
            except ValueError:
                continue
        takes = " or ".join(self.takes) or "no value that a command line can give"
        raise UserError(f"{self.flag} {text}: it takes {takes}")


def options_of(cls: type) -> dict[str, Option]:
    """Return the options of a constructor by name: every parameter but `params`.

    A constructor with `**options` passes them on, so those of the next class are options too.
    """
    found: dict[str, Option] = {}
    for owner in cls.__mro__:
        hints = _hints(owner)
        parameters = inspect.signature(owner).parameters.values()
        for p in parameters:
            if p.name not in {"params", *found} and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                default = p.default if owner is cls else INHERITED
                kinds = _kinds(hints.get(p.name), p.default)
                if kinds != (types.NoneType,):  # an object that no text can name, as a process group
                    found[p.name] = Option(p.name, default, kinds)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def parse_options(owner: str, options: Mapping[str, Option], texts: Mapping[str, str]) -> dict[str, Any]:
    """Parse texts by option name (dashes are underscores).

    Raises:
        UserError: If a name is no option of `owner`, a value has the wrong type, or a needed option is missing.
    """
    values = {}
    for key, text in texts.items():
        name = key.replace("-", "_")
        if name not in options:
            valid = ", ".join(options)
            raise UserError(f"{owner} has no option {name!r}.{did_you_mean(name, options)} Its options: {valid}")
        values[name] = options[name].parse(text)
    for option in options.values():
        if option.default is EMPTY and option.name not in values:
            raise UserError(f"{owner} needs {option.flag} VALUE")
    return values


def flags_to_texts(arguments: Sequence[str], options: Mapping[str, Option]) -> dict[str, str]:
    """Read `--name value`, `--name=value`, `--switch` and `--no-switch` into texts by name.

    Args:
        arguments: What the command line holds beside the fixed flags.
        options: Those that there are; the boolean ones may stand without a value. A name that is none of them may too,
            for what is wrong with it is not its value.

    Raises:
        UserError: A word is no flag, or an option has no value.
    """
    switches = [name for name, option in options.items() if bool in option.kinds]
    texts: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: options are written --name value")
        key, equals, text = word[2:].partition("=")
        name = key.replace("-", "_")
        if equals:
            texts[name] = text
        elif name.removeprefix("no_") in switches and name not in switches:
            texts[name.removeprefix("no_")] = "false"
        elif name in switches and (not rest or rest[0].lower() not in YES + NO):
            texts[name] = "true"
        elif name not in options and (not rest or rest[0].startswith("-")):
            texts[name] = ""
        elif not rest or rest[0].startswith("--"):
            raise UserError(f"{word} needs a value: {word} VALUE")
        else:
            texts[name] = rest.pop(0)
    return texts


def pairs_to_texts(words: Sequence[str]) -> dict[str, str]:
    """Read `name=value` words into texts by name.

    Raises:
        UserError: If a word is not written so, or a name is given twice.
    """
    texts: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r}: options are written name=value, for example lr=1e-3")
        name = name.replace("-", "_")
        if name in texts:
            raise UserError(
                f"{name} is given twice, {texts[name]} and {text}: write {name}={texts[name]}|{text} for both"
            )
        texts[name] = text
    return texts


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:
        # An annotation that only a type checker can resolve: the defaults tell the types.
        return {}


def _kinds(hint: Any, default: Any) -> tuple[Any, ...]:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is(hint, typing.Union) else (hint,)
    found = {_kind(member) for member in members}
    if default is not EMPTY:
        found.add(type(default))
    return tuple(kind for kind in _READERS if kind in found)


def _kind(hint: Any) -> Any:
    if _is(hint, typing.Literal):
        return str
    return typing.get_origin(hint) or hint


def _is(hint: Any, form: Any) -> bool:
    return typing.get_origin(hint) is form


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _bool(text: str) -> bool:
    if text.lower() not in YES + NO:
        raise ValueError(text)
    return text.lower() in YES


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.strip("()").split(","))


def _dtype(text: str) -> torch.dtype:
    value = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(value, torch.dtype):
        raise ValueError(text)
    return value


_NAMES: dict[Any, str] = {type(None): "none", bool: "true/false"}

# Strictest first: the first reader that accepts a text decides.
_READERS: dict[Any, Any] = {
    type(None): _none,
    bool: _bool,
    int: int,
    float: float,
    tuple: _numbers,
    torch.dtype: _dtype,
    str: str,
}
