# make demo   create the environment, train on built-in parts, evaluate, write demo/report.html
# make test   create the environment, run the tests that take minutes at most
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo install test test-all lint format

demo: $(INSTALLED)
	$(BIN)/ddad demo --out demo

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints/pins.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints/pins.txt --editable '.[dev]'
	touch $(INSTALLED)

# Two processes of one thread each: most tests are too small to share a core's work. Each gets half of the files, and takes
# from the other in the end: so the models and servers that the tests of a file share are made once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-all: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
