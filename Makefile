# Works on a machine with Python 3.11 or later, make and pip: every target creates the environment it needs.
# The stamps make a second call cheap: an install runs again only when pyproject.toml or constraints.txt changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
CORPUS := corpus
DEMO_TABLE := build/demo.lance
DEMO_QUERY ?= how do I sort a list

.PHONY: setup demo test test-faults check bench lock clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

# Debian's Python may lack ensurepip; pip can then put itself into the environment from outside.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard model/kernels*.cpp model/kernels*.h) | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/nightloom embed $(CORPUS) $(DEMO_TABLE)
	$(BIN)/nightloom search $(DEMO_TABLE) "$(DEMO_QUERY)"

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# Runs that are killed at seeded moments; the counts go to benchmarks/results/.
test-faults: $(VENV)/.installed
	$(BIN)/python -m benchmarks.faults

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --no-header --durations=0 tests/test_layout.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.embed_cpu

# Freeze what is installed now. Local build tags (+cpu, +cu130) are dropped, so that the lock holds on every machine.
lock: $(VENV)/.installed
	{ sed -n 1p constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
