# `make demo` and `make test` are all there is to know; both set up .venv first.

# The first of these that is Python 3.11 or newer; or say make PYTHON=/path/to/python.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
# The few tests that take longer than about ten seconds run with LONG=1.
LONG ?=
PYTEST_ARGS ?=

.PHONY: demo test setup lint types unit clean

demo: setup
	$(BIN)/python main.py --config=configs/demo.py --workdir=$(WORKDIR)
	@echo
	@echo "Look at: $(WORKDIR)/seed0/attention.png (where teacher and student look), curves.png"
	@echo "Your own photos next: docs/your_own.md, --config.data.source=folder:DIR"
	@echo "Results of real size, each with its command: RESULTS.md"

test: lint types unit

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt pyproject.toml
	@test -n "$(PYTHON)" || \
	{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) (about a minute and 1.2 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

unit: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(LONG),,-m "not long") $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) runs
