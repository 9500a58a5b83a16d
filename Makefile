# make demo: trains four small MoEs and compares them.  make test: the tests of every change.
# Both set themselves up in .venv. Where plain pip would fetch the CUDA build of torch and a CPU build is wanted:
# make demo PIP_OPTIONS='--extra-index-url ADDRESS-OF-TORCH-CPU-WHEELS'

PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin

# Nothing is loaded from a hub: no call may wait for a network.
export HF_HUB_OFFLINE = 1

.PHONY: demo results measures test test-slow lint docs clean

demo: .venv/installed
	$(BIN)/consistency-reg ablate recipes/ablations/demo.yaml
	$(BIN)/consistency-reg report runs/demo --out runs/demo/report --wandb consistency-reg

# The tables and pictures of README and docs, from the committed rows; a test says when they are out of step.
# Each file of rows, and the pages that hold its tables.
RESULTS := demo:README.md,docs/results.md gate:docs/results.md frontier:docs/results.md medium:docs/results.md \
	longer:docs/results.md,docs/choosing.md finetune:docs/finetuning.md paper:docs/ablations.md \
	deployed:docs/results.md deployed_gate:docs/results.md deployed_transfer:docs/results.md \
	deployed_domains:docs/results.md finetune_deployed:docs/finetuning.md \
	finetune_mature:docs/finetuning.md upcycle_deployed:docs/results.md longer_deployed:docs/results.md
comma := ,

results: .venv/installed
	$(foreach one,$(RESULTS),$(BIN)/consistency-reg report recipes/results/$(firstword $(subst :, ,$(one))).csv \
		--out runs/reports/$(firstword $(subst :, ,$(one))) \
		$(foreach page,$(subst $(comma), ,$(lastword $(subst :, ,$(one)))),--update $(page)) &&) true
	$(BIN)/python -m consistency_reg.lab.offload.page docs/deploying.md
	cp runs/reports/frontier/frontier.png docs/frontier/
	cp runs/reports/deployed/deployed.png docs/deployed/

# The table of measures in the docs; a test says when it is out of step.
measures: .venv/installed
	$(BIN)/python -m consistency_reg.lab.render.measures_page docs/measures.md

test: .venv/installed
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: .venv/installed
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(BIN)/python -m pytest -m "slow or gpu" -n 2

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The documentation site in site/; a link that leads nowhere fails. The variables silence notices about other site builders.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build

# What can be made again; runs/ is left alone.
clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find consistency_reg tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt torch
	$(BIN)/pip install --no-compile --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[dev]'
	touch $@
