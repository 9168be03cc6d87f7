# make demo   environment, then the whole path on rendered scenes: train, evaluate, export, C-simulate, report
# make test   lint, format check, the whole test suite, type check beside it (what it says comes last)
# make quick  lint, format check and the tests that take no seconds and start no processes: a minute or two
# make gpu    tests and benchmarks of one CUDA GPU into runs/gpu; without network or an environment: benchmarks/gpu.sh
PYTHON ?= python3
VENV ?= .venv
# On two cores: tests wait for processes, servers and compilers.
WORKERS ?= 4
BIN := $(VENV)/bin
# The tests start a hundred processes: each would compile every module again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test quick lint typecheck pytest gpu clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/m3vit demo --out runs/demo

test: lint
	@$(BIN)/mypy -p m3vit >$(VENV)/mypy.txt 2>&1 & mypy=$$!; \
	echo "$(PYTEST)"; $(PYTEST); tests=$$?; \
	wait $$mypy; types=$$?; echo "mypy -p m3vit"; cat $(VENV)/mypy.txt; \
	exit $$((tests | types))

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed
	$(BIN)/mypy -p m3vit

# Files in the order of tests/conftest.py: those with most slow tests first.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

pytest: $(VENV)/.installed
	$(PYTEST)

quick: WORKERS = 2
quick: lint
	$(PYTEST) -m "not slow and not process"

gpu: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python bash benchmarks/gpu.sh runs/gpu

clean:
	rm -rf $(VENV) build # not runs/: those are yours
