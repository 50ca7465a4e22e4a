# Two commands: `make demo` and `make test`. Both build the same environment from the lock first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test check docs lock clean

demo: $(VENV)/.installed
	$(BIN)/celltyper demo --output $(DEMO) --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages in site/, which open from disk; a warning is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "celltyper needs Python 3.11 to 3.13; run: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Names and versions only, for Python 3.11 to 3.13 on Linux, macOS and Windows; needs uv, which
# keeps the versions that are locked already (--upgrade-package NAME moves one).
lock:
	uv pip compile --universal --python-version 3.11 --group dev --no-header --no-annotate \
		--no-emit-index-url pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) $(DEMO) build dist site
