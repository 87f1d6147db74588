# Two commands do everything on a machine with Python 3.11 or later; each makes its own virtual environment first.
#   make quickstart   the main job: simulate, train, gate, sample and report the lynx and hare record
#   make test         the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint science benchmarks clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/sbiplat run workflows/predator_prey.toml

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not science" -n auto

lint: $(VENV)/installed
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/lint-imports

science: $(VENV)/installed
	$(BIN)/python -m pytest -m science

clean:
	rm -rf $(VENV)
