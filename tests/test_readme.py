"""What the README says of tests and names is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_test_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"`(test_\w+)`", README))
    files = set(re.findall(r"`(test_\w+\.py)`", README))
    defined = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text())
    }
    assert len(names) > 20
    assert names <= defined
    assert files <= {file.name for file in (ROOT / "tests").glob("test_*.py")}


def test_every_file_of_results_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"bench/results/[\w.]+\w", README))
    assert named
    assert all((ROOT / name).exists() for name in named)
