PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/compare

.PHONY: setup test lint pretrain clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@

# Everything is tested, the slow tests too.
test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck $(BIN)/mypy

# AdamW beside GaLore on a small LLaMA and real text: a table, and a picture in $(OUT).
pretrain: setup
	$(BIN)/lowmem compare --out $(OUT) \
		"adamw lr=3e-3" "galore lr=1e-2 rank=32 update_proj_gap=50"

clean:
	rm -rf $(VENV) build runs *.egg-info
