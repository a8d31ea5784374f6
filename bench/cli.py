"""Entry point of the console script `lowmem`."""

from __future__ import annotations

import sys
from typing import Any

from .errors import UserError, one_line

EXTRA = ("typer", "rich", "matplotlib", "transformers", "datasets", "safetensors", "yaml")


def main() -> None:
    """Run the command line; bad input becomes one line on stderr and a non-zero exit."""
    try:
        sys.exit(_run())
    except UserError as error:
        _fail(one_line(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; a run with a checkpoint goes on with --resume", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA:
            raise
        _fail(f'the command needs {package}, which is not installed: pip install "lowmem[bench]"', 1)


def _run() -> int:
    import typer

    from .commands import app
    from .finetune import finetune
    from .lab.command import ablate

    app.command()(finetune)
    app.command()(ablate)
    # Newer releases of typer carry a private copy of click, so its base error is reached through the public subclass.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        return app(prog_name="lowmem", standalone_mode=False) or 0
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        raise UserError(error.format_message()) from None


def _fail(message: str, code: int) -> None:
    print(f"lowmem: {message}", file=sys.stderr)
    sys.exit(code)
