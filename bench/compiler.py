"""A stand-in for torch's compiler, which takes a second to import and is only asked not to compile."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


def postpone_compiler() -> None:
    """Keep torch from importing its compiler until something is compiled.

    torch imports it only to mark functions, such as those of optimizers, as not to be compiled. A process that compiles
    nothing does not need the marks; call this in no other.
    """
    if NAME not in sys.modules:
        sys.modules[NAME] = _Compiler(NAME)


class _Settings:
    """Its configuration, as far as `torch.utils.checkpoint` sets it."""

    error_on_nested_fx_trace = True

    def __getattr__(self, name: str) -> Any:
        return getattr(_compiler().config, name)


class _Compiler(ModuleType):
    config = _Settings()

    @staticmethod
    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """Leave a function as it is."""
        return function

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Interrupt a graph that is not recorded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_compiler(), name)


def _compiler() -> Any:
    """The true one, which takes the place of the stand-in."""
    if isinstance(sys.modules.get(NAME), _Compiler):
        del sys.modules[NAME]
    return importlib.import_module(NAME)
