# make demo: trains four small MoEs and compares them.  make test: the tests of every change.
# Both set themselves up in .venv. Where plain pip would fetch the CUDA build of torch and a CPU build is wanted:
# make demo PIP_OPTIONS='--extra-index-url ADDRESS-OF-TORCH-CPU-WHEELS'

PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin

# Nothing is loaded from a hub: no call may wait for a network.
export HF_HUB_OFFLINE = 1

.PHONY: demo results test test-slow lint clean

demo: .venv/installed
	$(BIN)/consistency-reg ablate recipes/ablations/demo.yaml
	$(BIN)/consistency-reg report runs/demo --out runs/demo/report --wandb consistency-reg

# The tables and pictures of README and docs, from the committed rows; a test says when they are out of step.
RESULTS := demo gate frontier medium

results: .venv/installed
	for name in $(RESULTS); do $(BIN)/consistency-reg report recipes/results/$$name.csv --out runs/reports/$$name \
		--update README.md || exit 1; done
	cp runs/reports/frontier/frontier.png docs/frontier/
	$(BIN)/consistency-reg report recipes/results/longer.csv --out runs/reports/longer --update README.md --update docs/choosing.md
	$(BIN)/consistency-reg report recipes/results/finetune.csv --out runs/reports/finetune --update docs/finetuning.md
	$(BIN)/consistency-reg report recipes/results/paper.csv --out runs/reports/paper --update docs/ablations.md

test: .venv/installed
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: .venv/installed
	WANDB_MODE=offline $(BIN)/python -m pytest -m "slow or gpu"

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# What can be made again; runs/ is left alone.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find consistency_reg tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt torch
	$(BIN)/pip install --no-compile --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[dev]'
	touch $@
