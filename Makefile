# make demo   environment, then the whole path on rendered scenes: train, evaluate, export, C-simulate, report
# make test   lint, format check, type check, the whole test suite
# make gpu    tests and benchmarks of one CUDA GPU into runs/gpu; without network or an environment: benchmarks/gpu.sh
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test lint typecheck pytest gpu clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/m3vit demo --out runs/demo

test: lint typecheck pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed
	$(BIN)/mypy -p m3vit

pytest: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

gpu: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python bash benchmarks/gpu.sh runs/gpu

clean:
	rm -rf $(VENV) build # not runs/: those are yours
