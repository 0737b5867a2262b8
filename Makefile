# `make train`, `make test`, `make bench`: each makes .venv first if it is missing or older than pyproject.toml.
# Pass arguments on with ARGS: make train ARGS="--time-budget 10"
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=

ifeq ($(origin PYTHON)$(wildcard $(PY)),command line$(PY))
$(info note: $(VENV) is there and keeps its Python; for one with $(PYTHON): make clean, then this again)
endif

.PHONY: train test bench lint clean
.DEFAULT_GOAL := train

train: $(VENV)/.runtime
	$(PY) -m train $(ARGS)

# A process a core, at most four: each holds a GB. What takes a GPU runs after it, where there is one.
test: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m pytest tests -n logical --maxprocesses 4 --dist worksteal $(ARGS)
ifeq ($(strip $(ARGS)),)
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(PY) -m bench.gpu_tests; fi
endif

bench: $(VENV)/.dev
	$(PY) -m pytest bench --benchmark-only $(ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV)

# The stamps say that an install finished: an interrupted one is taken up again.
$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in [(3, 11), (3, 12)])' \
		|| { echo "timebox needs Python 3.11 or 3.12: make PYTHON=python3.11"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.runtime
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
