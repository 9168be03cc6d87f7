# make demo   environment, then the whole path on rendered scenes: train, evaluate, export, C-simulate, report
# make test   lint, format check, type check on the built wheel, the whole test suite
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

# On the wheel: mypy cannot resolve the package-dir mapping of an editable install.
typecheck: $(VENV)/.installed
	rm -rf build/typecheck && mkdir -p build/typecheck/source
	git ls-files -z | xargs -0 cp --parents -t build/typecheck/source
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/typecheck build/typecheck/source
	$(BIN)/python -m zipfile -e build/typecheck/*.whl build/typecheck/wheel
	cp pyproject.toml build/typecheck/wheel
	cd build/typecheck/wheel && $(abspath $(BIN))/mypy -p m3vit
	rm -rf build/typecheck

pytest: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

gpu: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python bash benchmarks/gpu.sh runs/gpu

clean:
	rm -rf $(VENV) build # not runs/: those are yours
