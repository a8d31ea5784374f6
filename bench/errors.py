"""Errors that a command shows as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input; the message says what was passed, what is needed and what to write."""

    exit_code = 1


class Diverged(UserError):
    """The loss is no longer finite; by its own exit code a comparison tells it from other failures."""

    exit_code = 3


class Interrupted(UserError):
    """The user or the machine's scheduler ended the command before it was through."""

    exit_code = 130


def one_line(error: BaseException) -> str:
    """Return the message of `error` on a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean ...?` for near misses of `word`, or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=2)
    return f" Did you mean {' or '.join(near)}?" if near else ""
