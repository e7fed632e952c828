# `make fit` and `make test` set up everything they need in .venv and run.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# Photographs for `make bench`, in train/<class>/ and test/<class>/: make bench PHOTOS=trashnet
PHOTOS ?= trashnet

.PHONY: fit test test-slow lint docs wheel bench bench-accuracy soak gpu-check clean

fit: $(INSTALLED)  ## Imprint the embedded backbone on scikit-learn's digits.
	$(BIN)/python -m imprint_pl fit --config configs/quickstart.yaml

# Two processes, one thread each: on two cores a third less time, and the same sums everywhere. Files
# are dealt whole, in their own order, which ends with small ones, so that neither process waits long
# for the other; the long tests one by one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test: $(INSTALLED)  ## The test suite (under 6 minutes on 2 quiet cores).
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(INSTALLED)  ## The long tests, dealt one by one (some 25 minutes on 2 quiet cores).
	$(PYTEST) --dist loadgroup -m slow

lint: $(INSTALLED)  ## ruff (check and format) and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(INSTALLED)  ## The documentation site; a warning is an error, and no network is needed.
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}; try make PYTHON=python3.12")'
	@echo "Installing into .venv (once; some 5 minutes and 8 GB, most of it CUDA)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

wheel: $(INSTALLED)  ## dist/ gets the package and its sources; the version comes from the tags.
	$(BIN)/python -m build

bench: $(INSTALLED)  ## Ratios against scikit-learn, faiss and the bare forward (some minutes).
	$(BIN)/python benchmarks/kmeans.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/fit_overhead.py
	$(BIN)/python benchmarks/runtime.py
	$(BIN)/python benchmarks/auto.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/whole_job.py $(PHOTOS)

bench-accuracy: $(INSTALLED)  ## Real tasks: auto beside trained probes (the first time 15 minutes).
	$(BIN)/python benchmarks/accuracy.py

soak: $(INSTALLED)  ## Ten minutes of fit and predict: memory and open files must not grow.
	$(BIN)/python benchmarks/soak.py

gpu-check: $(INSTALLED)  ## GPU against CPU results, and how near to its limits; skipped without one.
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf .venv dist runs docs/_build docs/notebooks
