"""Entry point of the console script `lowmem`."""

from __future__ import annotations

import os
import sys
from typing import Any

from .errors import Interrupted, UserError, one_line

EXTRA = ("typer", "rich", "matplotlib", "transformers", "datasets", "safetensors", "yaml")


def main() -> None:
    """Run the command line; bad input becomes one line on stderr and a non-zero exit."""
    try:
        sys.exit(_run())
    except UserError as error:
        _fail(one_line(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; a run with a checkpoint goes on with --resume", 130)
    except BrokenPipeError:
        # Whoever read the output, as `head`, has enough; at exit Python would flush what is left to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(one_line(error), 1)  # a full disk, a file of somebody else: nothing that a traceback explains
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
        code: int = app(sys.argv[1:] or ["--help"], prog_name="lowmem", standalone_mode=False) or 0
        if code == Interrupted.exit_code:  # some releases of typer return what others raise
            raise KeyboardInterrupt
        return code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else "lowmem"
        raise UserError(f"{error.format_message()} See {command} --help") from None


def _fail(message: str, code: int) -> None:
    print(f"lowmem: {message}", file=sys.stderr)
    sys.exit(code)
