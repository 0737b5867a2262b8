# `make train`, `make test`, `make bench`: each makes .venv first if it is missing or older than pyproject.toml.
# `make dev` makes it with all that every command of the documentation needs, and says how `python` becomes its Python.
# Pass arguments on with ARGS: make train ARGS="--time-budget 10"
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=

ifeq ($(origin PYTHON)$(wildcard $(PY)),command line$(PY))
$(info note: $(VENV) is there and keeps its Python; for one with $(PYTHON): make clean, then this again)
endif

.PHONY: train dev test test-extras bench lint clean
.DEFAULT_GOAL := train

train: $(VENV)/.runtime
	$(PY) -m train $(ARGS)

dev: $(VENV)/.dev
	@echo "python is $(PY) in every shell that has run: source $(VENV)/bin/activate"

# A process a core, at most four: each holds a GB. What takes a GPU runs after it, where there is one.
test: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m pytest tests -n logical --maxprocesses 4 --dist worksteal $(ARGS)
ifeq ($(strip $(ARGS)),)
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(PY) -m bench.gpu_tests; fi
endif

# What is large, or needs more than Python, and so is no part of `make test`: the extras `hf`, `wandb`, `trackio` and
# `pandas`, and the page of `train.report` in a headless Chromium, which has to be there.
test-extras: $(VENV)/.extras
	$(PY) -m pytest tests/extras tests/extras/page_in_a_browser.py $(ARGS)

bench: $(VENV)/.dev
	$(PY) -m pytest bench --benchmark-only $(ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV)

# A .venv that `uv venv` made has no pip: it gets the one that Python brings along, or else uv installs into it.
define install
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 || command -v uv >/dev/null \
		|| { echo "$(VENV) has no pip, and its Python brings none: make clean, then make PYTHON=python3.11"; exit 2; }
	@if $(PY) -m pip --version >/dev/null 2>&1; \
		then set -x; $(PY) -m pip install --quiet --disable-pip-version-check -e '$(1)'; \
		else set -x; uv pip install --quiet --python $(PY) -e '$(1)'; fi
endef

# The stamps say that an install finished: an interrupted one is taken up again.
$(VENV)/.runtime: pyproject.toml
	@$$(test -x $(PY) && echo $(PY) || echo $(PYTHON)) \
		-c 'import sys; v = sys.version_info[:2]; sys.exit(v not in [(3, 11), (3, 12)])' \
		|| { echo "timebox needs Python 3.11 or 3.12: make clean if there is a $(VENV), then make PYTHON=python3.11"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(call install,.)
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.runtime
	$(call install,.[dev])
	@touch $@

WITH_EXTRAS := .[dev,hf,pandas,trackio,wandb]
$(VENV)/.extras: pyproject.toml $(VENV)/.dev
	$(call install,$(WITH_EXTRAS))
	@touch $@
