# make demo   .venv, install, and the whole pipeline on this machine's own Python library
# make test   everything that must pass; CI runs it after make lint
# make prove  long proofs that `make test` leaves out: other victims of kills, other families end to end, clusters
# make lint   format, rules, types
# make check  lint, room rules, fast tests: under three minutes
VENV   := .venv
PYTHON ?= python3
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check
export PYTHONUNBUFFERED := 1
# Two workers of one thread each, in the order of tests/conftest.py; `make test PYTEST_ARGS="-n 0 -k name"` runs in one process.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test prove lint check format clean

demo: $(VENV)/.installed
	$(VENV)/bin/athanor run experiment=demo

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not prove" $(PYTEST_ARGS)

prove: $(VENV)/.installed-dev
	$(PYTEST) -m prove $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check: lint
	$(PYTEST) -m "not slow and not prove" $(PYTEST_ARGS)

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# torch first and alone: a later range must find the pinned build in place instead of resolving the newest one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} found, Athanor needs 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Athanor into $(VENV) (a few minutes the first time)"
	@$(PIP) install -q "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -q -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install -q -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
