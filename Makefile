# Every target makes what it needs. The environment lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
EXP ?= demo

.PHONY: demo test check sweep plots ui clean test-gpu bench-gpu slurm-up slurm-down browser latex sandbox

demo: .venv/ready  ## train a small grid and draw its figure
	$(BIN)/python -m runner -m -cd experiments/demo -cn sweep
	$(BIN)/espalier plots demo
	@echo "figure: experiments/demo/figures/loss_by_size.png    MLflow: make ui, then http://127.0.0.1:5000"

sweep: .venv/ready  ## run experiments/$(EXP)
	$(BIN)/python -m runner -m -cd experiments/$(EXP) -cn sweep

plots: .venv/ready  ## draw the figures of experiments/$(EXP)
	$(BIN)/espalier plots $(EXP)

ui: .venv/ready  ## serve the MLflow UI
	$(BIN)/espalier ui

test: .venv/dev  ## run the tests, a file to a core at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-gpu:  ## run the GPU tests with this machine's own torch (PYTHON=...)
	$(PYTHON) -m pytest -o addopts= -q -rs tests/gpu

bench-gpu:  ## tokens/s, MFU and quantising on this machine's GPU
	$(PYTHON) -m tests.bench.gpu
	$(PYTHON) -m tests.bench.precision --fused

SLURM_PACKAGES := slurmctld slurmd slurm-client slurmdbd munge mariadb-server
slurm-up: .venv/dev  ## a four-node SLURM on this Debian machine (root), for the tests
	which slurmctld slurmdbd munged mariadbd > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(SLURM_PACKAGES) > /dev/null; }
	$(BIN)/python tests/slurm/cluster.py up

browser:  ## Chromium from Debian (root), for the tests of the status page
	which chromium > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; }

latex:  ## LaTeX from Debian (root), for the test of papers
	which latexmk > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends latexmk texlive-latex-recommended > /dev/null; }

sandbox:  ## bubblewrap from Debian (root), in which programs of models run
	which bwrap > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq bubblewrap > /dev/null; }

slurm-down:  ## end it
	$(BIN)/python tests/slurm/cluster.py down

check: .venv/dev  ## format, lint, types, import arrows, layout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_layout.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install -q -e .
	touch $@

.venv/dev: .venv/ready
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install -q -e '.[dev]'
	touch $@

clean:  ## remove caches (never runs)
	rm -rf .mypy_cache .ruff_cache .pytest_cache data_cache
