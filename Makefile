# nondecoupling: both experiments of arXiv 2601.07389, reproduced. `make` alone prints the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

OPTIONS := PROFILE SEEDS JOBS DATA MODEL SET SCHEDULER RANDOM_WEIGHTS FORMAT
PROFILE ?=
SEEDS   ?=
DATA    ?=
MODEL   ?=
SET     ?=
RANDOM_WEIGHTS ?=
# Empty: this machine. local, or the address or the file of a running scheduler: a Dask cluster.
SCHEDULER ?=
# commands: of `list`, a command for each run that is not finished.
FORMAT  ?= grid
# On processors runs are side by side with a thread each, also where threads are limited, which nproc takes for the
# number of processors; studies of real models share a GPU one after the other.
ifndef JOBS
JOBS    := $(if $(and $(wildcard /dev/nvidia0),$(filter-out nano tiny four,$(value PROFILE))),1,$(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 2))
endif
# What a user writes is text, and never a rule or a command: options are read by $(value), and not handed to the
# environment of recipes, for which make would expand them.
unexport $(OPTIONS)

# A misspelt option would start another study than the one that was meant.
GIVEN   := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(firstword $(filter-out $(OPTIONS) -%,$(GIVEN)))
ifneq ($(UNKNOWN),)
NEAREST := $(shell python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1))' \
             '$(UNKNOWN)' $(OPTIONS))
$(error there is no option '$(UNKNOWN)'$(if $(NEAREST), (did you mean $(NEAREST)?)); the options are $(OPTIONS))
endif

# The active conda environment of environment.yml, or a .venv made from requirements.lock.
ifeq ($(CONDA_DEFAULT_ENV),nondecoupling)
PYTHON := python
READY  :=
BUILDER :=
else
PYTHON := .venv/bin/python
READY  := .venv/.ready
BUILDER := .venv/.book
endif

# An option's value as one word of the shell, whatever is in it.
quoted   = '$(subst ','\'',$(value $(1)))'
STUDY    = --profile=$(call quoted,PROFILE) --data=$(call quoted,DATA) --model=$(call quoted,MODEL) --set=$(call quoted,SET) \
           --seeds=$(call quoted,SEEDS)
HOW      = --scheduler=$(call quoted,SCHEDULER) --jobs=$(call quoted,JOBS)
WORKFLOW = $(PYTHON) -m nondecoupling.workflow
KERNELS  = JUPYTER_PATH='$(subst ','\'',$(CURDIR))/src/nondecoupling/workflow/jupyter'

TARGETS := FORCE help setup reproduce controls betas geometry everything seeds study theory sweep list bench score smollm2 lab book test lint \
           verify report reference notebooks clean
.PHONY: $(TARGETS)

help: ## print the targets
	@echo 'usage: make TARGET [OPTION=value ...]      times: two CPU cores, PROFILE=nano'
	@echo
	@sed -nE 's/^([a-z0-9]+):.*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'
	@echo
	@echo '  PROFILE=nano|laptop|paper|tiny|four  SEEDS=0-4  JOBS=2 (runs side by side)'
	@echo '  DATA=folder of TSV files          MODEL=folder of a causal LM'
	@echo '  SET="rl.beta=0.25 sft.steps=100"  any setting of src/nondecoupling/profiles/'
	@echo '  SCHEDULER=local|tcp://host:8786   a Dask cluster; also its scheduler file'
	@echo '  FORMAT=commands                   of list: a command for each run to do'
	@echo '  older names: study (controls), theory (betas), sweep (seeds)'

reproduce: $(READY) ## both experiments, five seeds, claims and report: 5 min
	@$(WORKFLOW) reproduce $(STUDY) $(HOW)

controls: $(READY) ## also controls and joint training: 14 min more
	@$(WORKFLOW) controls $(STUDY) $(HOW)

betas: $(READY) ## also RL at other prices of the KL: 11 min more
	@$(WORKFLOW) betas $(STUDY) $(HOW)

geometry: $(READY) ## how long, when, along which directions: 12 min more
	@$(WORKFLOW) geometry $(STUDY) $(HOW)

everything: $(READY) ## all of these
	@$(WORKFLOW) everything $(STUDY) $(HOW)

seeds: SEEDS := $(or $(value SEEDS),0-19)
seeds: $(READY) ## reproduce with more seeds (SEEDS=0-19): 13 min more
	@$(WORKFLOW) reproduce $(STUDY) $(HOW)

list: $(READY) ## which runs are finished, and what makes the others
	@$(WORKFLOW) list $(STUDY) --format=$(call quoted,FORMAT)

verify: $(READY) ## could your results come from the committed reference?
	@$(WORKFLOW) verify $(STUDY)

report: $(READY) ## write results/<study>/report.html once more
	@$(WORKFLOW) report $(STUDY) --shown

lab: $(READY) ## JupyterLab on copies of the notebooks, tour first
	@$(WORKFLOW) lab

book: $(READY) $(BUILDER) ## book/index.html: chapters, docs and reports as a site
	@$(WORKFLOW) book

bench: $(READY) ## time and memory of PROFILE here (RANDOM_WEIGHTS=1: no hub)
	@$(WORKFLOW) bench $(STUDY) $(if $(value RANDOM_WEIGHTS),--random-weights)

score: $(READY) ## lm-evaluation-harness on finished policies, beside our numbers
	@$(WORKFLOW) score $(STUDY)

smollm2: $(READY) ## make models/smollm2, a real model for MODEL=: 1 min
	@$(WORKFLOW) smollm2 --target=models/smollm2

clean: ## remove the study's results, never the reference
	@$(WORKFLOW) clean $(STUDY)

setup: $(READY) ## create .venv (all targets do it by themselves): 2 min

.venv/.ready: requirements.lock pyproject.toml
	@echo 'setting up .venv, once: about two minutes and 2 to 3 GB'
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock -e .
	@touch $@

.venv/.book: .venv/.ready
	@echo 'installing what builds the book, once: about 70 MB'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[book]'
	@touch $@

# The notebooks run in a results folder of their own (`kernels while`), so that a test never touches a study.
NBVAL = $(KERNELS) OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
        $(PYTHON) -m nondecoupling.workflow.kernels while $(PYTHON) -m pytest -q --nbval \
        --nbval-sanitize-with tests/nbval-sanitize.cfg --nbval-kernel-name python3 --nbval-cell-timeout 600
# Stages need each other's results; the other chapters read committed ones.
STAGES = $(wildcard notebooks/0[1-4]_* notebooks/09_* notebooks/1[01]_*)
READERS = $(filter-out $(STAGES),$(wildcard notebooks/*.ipynb))
# Another kernel of torch's, as on an older processor: other arithmetic, in which the same must hold.
OTHER = ATEN_CPU_CAPABILITY=default
# Two commands side by side, which fail if one does.
both = $(1) & first=$$!; $(2); second=$$?; wait $$first && exit $$second

test: $(READY) ## lint, unit tests, every notebook checked: 9 min
	$(call both,$(PYTHON) -m pytest -q -n 2 --dist loadfile,make --no-print-directory lint && $(NBVAL) $(STAGES) && $(NBVAL) $(READERS) && $(OTHER) $(NBVAL) $(wildcard notebooks/0[1-4]_*) && $(OTHER) $(PYTHON) -m pytest -q tests/test_training.py tests/test_rl.py)

lint: $(READY) ## maintainers: ruff and mypy
	$(PYTHON) -m ruff check src tests
	$(PYTHON) -m ruff format --check src tests
	$(PYTHON) -m mypy

reference: $(READY) ## maintainers: the finished study becomes the reference
	@$(WORKFLOW) reference $(STUDY)

notebooks: $(READY) ## maintainers: execute the committed notebooks in place
	@$(WORKFLOW) notebooks

.DEFAULT:
	@python3 -c 'import difflib, sys; name, *known = sys.argv[1:]; near = difflib.get_close_matches(name, known, 1); \
	    sys.exit(f"error: there is no target {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "") + "; see make help")' \
	    '$@' $(TARGETS)

study: controls
theory: betas
sweep: seeds

results/%: $(READY) FORCE
	@$(WORKFLOW) everything $(STUDY) $(HOW) --target='$@'
