"""The package installs from a wheel, and the repository root as current folder disturbs nobody's imports."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("optim", "kernels", "bench")


def run(code: str, cwd: Path, path: str = "") -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: builds leave files in the source, where those of another process or version disturb them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "./source"]
    subprocess.run(command, check=True, cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_namespace_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lowmem", f"lowmem-{wheel.name.split('-')[1]}.dist-info"}
    assert "lowmem/optim/py.typed" in names
    sources = {f"lowmem/{path.relative_to(ROOT).as_posix()}" for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_wheel_imports_from_its_own_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import lowmem.optim as o, lowmem.kernels, lowmem.bench.cli; print(o.__file__)"
    assert str(tmp_path) in run(code, tmp_path, str(tmp_path / "site"))


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("transformers", "from transformers import LlamaForCausalLM"),
        ("bitsandbytes", "import bitsandbytes"),
    ],
)
def test_neighbours_import_from_the_repository_root(package: str, code: str) -> None:
    pytest.importorskip(package)
    run(code, ROOT)


def test_bare_kernels_passes_for_a_folder() -> None:
    code = "import kernels\nassert not hasattr(kernels, '__file__') and not hasattr(kernels, 'pick')"
    run(code, ROOT)


@pytest.mark.parametrize("folder", ["optim/core", "optim/planning", "kernels"])
def test_the_map_of_a_package_names_its_modules_and_no_others(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    listed = "\n".join(line for line in docstring.splitlines() if line.startswith(("- ", "  ")))
    assert modules <= set(re.findall(r"`(\w+)`", listed))
    assert set(re.findall(r"^- `(\w+)`", docstring, flags=re.MULTILINE)) <= modules
