# make demo   install and run the main job: predict, measure on this machine, compare, draw
# make test   install the test extras and run all tests
# make check  format, lint and types
# Only Python (>= 3.11), pip and make are needed. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out/demo

.PHONY: demo test check format docs gallery bench wheel clean accuracy planning

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[all]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test,dev]'
	touch $@

demo: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/demo.py --output $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 $(PYTEST_ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/docs.py --check

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.test
	$(BIN)/python scripts/docs.py

accuracy: $(VENV)/.test
	$(BIN)/python scripts/accuracy.py $(if $(DATA),--data $(DATA))

planning: $(VENV)/.test
	$(BIN)/python scripts/plan_traces.py $(DATA)

gallery: $(VENV)/.test
	$(BIN)/python scripts/gallery.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/predict_speed.py

wheel: $(VENV)/.test
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) out dist build
