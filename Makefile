# Everything a checkout needs: `make quickstart`, `make test`, `make test-system`, `make check`, `make bench`.
# Each creates .venv and installs the tested versions from constraints.txt; the second run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-slow test-system check format bench clean

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Basestone needs Python 3.11 or later, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/basestone quickstart

# Files go to two processes, each in the usual order: some tests have to come before others.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# A test whose package is not there is skipped, and says which.
test-system: $(STAMP)
	@sh tests/cluster/install.sh
	$(BIN)/python -m pytest -m system -rsP

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	rm -rf build && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typing .
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p basestone
	cd build/typing && ../../$(BIN)/lint-imports --config ../../.importlinter

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/train_vs_peers.py
	$(BIN)/python bench/encoders_vs_transformers.py
	$(BIN)/python bench/checkpoint_index.py
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/export.py
	$(BIN)/python bench/pipeline_bubble.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/stream.py
	$(BIN)/python bench/prepare.py
	$(BIN)/python bench/report.py
	$(BIN)/python bench/meters.py
	$(BIN)/python bench/launch.py

clean:
	rm -rf $(VENV) build *.egg-info
