"""Packaging of lowmem: the top-level folders are mapped into the `lowmem` namespace."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

PACKAGES = {
    "lowmem.optim": "optim",
    "lowmem.optim.core": "optim/core",
    "lowmem.optim.planning": "optim/planning",
    "lowmem.kernels": "kernels",
    "lowmem.bench": "bench",
    "lowmem.bench.lab": "bench/lab",
}

LAB = ["report.html", "report.css", "charts.js", "plots.js", "report.js", "presets/*.yaml"]
BENCH = ["transformers>=4.45", "datasets>=2.20", "safetensors", "typer>=0.12", "rich", "matplotlib", "pyyaml"]
TRITON = ["triton>=3.1; platform_system == 'Linux'"]
TEST = ["pytest>=8", "pytest-xdist", "hypothesis>=6", "expecttest", "accelerate", "lightning"]
TEST += ["sybil>=10", "pdoc>=16", "selenium>=4"]

setup(
    name="lowmem",
    version="0.1.0",
    description="Memory-efficient torch.optim replacements: GaLore, Adafactor and their relatives on one core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir=PACKAGES,
    packages=list(PACKAGES),
    package_data={name: ["py.typed"] for name in PACKAGES} | {"lowmem.bench.lab": ["py.typed", *LAB]},
    install_requires=["torch>=2.8", "numpy"],
    extras_require={
        "bench": BENCH,
        "test": TEST + BENCH + TRITON,
        "triton": TRITON,
        "docs": ["pdoc>=16"],
        "lint": ["ruff", "mypy"],
        "ray": ["ray>=2.9"],
        "peers": ["galore-torch", "bitsandbytes>=0.44", "torchao"],
        "bitsandbytes": ["bitsandbytes>=0.44"],
    },
    entry_points={"console_scripts": ["lowmem = lowmem.bench.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
