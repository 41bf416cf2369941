# make demo    the server on the built-in model, and eight conversations with it at once
# make test    every test            make check   format, lint, types, layers, generated docs
# make serve   the server on http://127.0.0.1:8000 (ARGS="--port 9000" adds flags)
# make clean   remove what was built (the virtual environment too)

VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
RUNTIME := $(VENV)/.quire-runtime
DEV     := $(VENV)/.quire-dev
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check format docs serve venv dev lock clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

demo: $(RUNTIME)
	@$(BIN)/quire demo $(ARGS)

serve: $(RUNTIME)
	@$(BIN)/quire serve $(ARGS)

test: $(DEV)
	@$(BIN)/python -m pytest -q $(ARGS)
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton/interpreted

check: $(DEV)
	@VENV=$(VENV) scripts/check

format: $(DEV)
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

docs: $(DEV)
	@$(BIN)/python scripts/gen_docs.py

lock: $(DEV)
	@$(BIN)/python scripts/lock.py

venv: $(RUNTIME)
dev: $(DEV)

# The stamps are newer than what they were made from, so a second `make` installs nothing.
$(BIN)/python:
	@python=$$(PYTHON="$(PYTHON)" scripts/find-python) || exit 1; \
	echo "Making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)

$(RUNTIME): requirements/lock.txt pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch and the other dependencies, pinned in requirements/lock.txt (once, a few minutes)"
	@$(PIP) install -r requirements/lock.txt
	@$(PIP) install --no-deps --editable .
	@touch $@

$(DEV): requirements/dev-lock.txt $(RUNTIME)
	@echo "Installing the test tools, pinned in requirements/dev-lock.txt"
	@$(PIP) install -r requirements/dev-lock.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
