"""Render the reference of the public API: `python docs/api.py FOLDER`. A warning of the renderer is an error."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

BASES = ("groups", "lifecycle", "optimizer")  # what they document, every optimizer inherits
MODULES = ("lowmem.optim", "lowmem.optim.compat", "lowmem.kernels", *(f"lowmem.optim.core.{name}" for name in BASES))
TEMPLATES = Path(__file__).parent / "templates"


def build(folder: Path) -> None:
    """Write one page a module into a folder."""
    pdoc.render.configure(docformat="google", template_directory=TEMPLATES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
