# Every target sets up what it needs on a fresh machine: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench results wheel clean

demo: .venv/ready
	$(BIN)/neurosde demo

# A file's tests stay together, for what they share; one thread each, as there is a process for each core, up to 8.
# One after another: make test WORKERS=0
WORKERS = logical

test: .venv/julia
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy neurosde

bench: .venv/ready
	$(BIN)/neurosde benchmark recovery

# The benchmark, then the README's section and figures from its cube. Another suite, and options of the figures:
# make results SUITE='--suite paper --workers 8' RESULTS=results/paper FIGURES='--networks 400'
RESULTS = results/inference
SUITE =
FIGURES =
PAGE = README.md
GALLERY = examples/gallery

results: .venv/ready
	$(BIN)/neurosde benchmark inference $(SUITE) --out $(RESULTS)
	$(BIN)/python -m neurosde.evaluation.results_section $(FIGURES) $(RESULTS) $(PAGE) $(GALLERY)

wheel: .venv/ready
	rm -rf dist build
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch first and by itself, so that it is the pinned one that everything else is resolved against.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "neurosde needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A Julia for the tests of the Julia core. Where none can be had they are skipped, unless NEUROSDE_REQUIRE_JULIA is 1.
.venv/julia: .venv/ready
	if $(BIN)/neurosde install-julia; then touch $@; \
	else test "$$NEUROSDE_REQUIRE_JULIA" != 1 && echo 'Going on without Julia: the tests that need it are skipped.'; fi
