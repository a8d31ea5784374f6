PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/compare

.PHONY: setup test lint docs memory pretrain clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint,docs]"
	touch $@

# Everything is tested, the slow tests too, on all cores.
test: setup
	$(BIN)/python -m pytest --numprocesses=auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck $(BIN)/mypy

# The reference of the public API, out of its docstrings, in build/docs.
docs: setup
	$(BIN)/python docs/api.py build/docs

# What every method takes at 7B: bench/results/memory_7b.png and .json.
memory: setup
	$(BIN)/python -m lowmem.bench.plan_picture

# AdamW beside GaLore on a small LLaMA and real text: a table, and a picture in $(OUT). The learning rates are the best
# of 5e-4, 1e-3, 2e-3 for AdamW and of 5e-3, 1e-2, 2e-2, 4e-2 for GaLore in runs of this length.
pretrain: setup
	$(BIN)/lowmem compare --model tiny --batch-size 16 --length 128 --steps 500 --eval-every 50 --eval-batches 16 \
		--out $(OUT) "adamw lr=1e-3" "galore lr=2e-2 rank=32 update_proj_gap=50"

clean:
	rm -rf $(VENV) build runs *.egg-info
