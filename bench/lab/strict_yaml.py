"""YAML as ablations are written in it: scalars stay texts, dashes in names are underscores, no name comes twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ..errors import UserError, one_line


def load(text: str, where: str) -> Any:
    """Return the values of a YAML text; errors begin with `where`.

    Raises:
        UserError: If it is no YAML, or a mapping has one name twice, of which YAML would silently keep the last.
    """
    import yaml

    # Not the safe loader: it would turn 1e-3 into a text, 1.0e-3 into a number and `no` into false.
    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            values: dict[Hashable, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                name = key.replace("-", "_") if isinstance(key, str) else str(key)
                if name in values:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"{where}: {key} is there twice in one mapping, again in line {line}")
                values[name] = self.construct_object(value_node, deep=True)
            return values

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no YAML: {one_line(error)}") from error
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
