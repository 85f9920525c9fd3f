# Every target sets up what it needs and does nothing twice. `make help` lists them.
#   PYTHON=python3.12 make test     another interpreter (3.11 to 3.13)
#   VENV=/somewhere make test       another place for the environment

VENV ?= .venv
PYTHON ?=
ARCHIVE = clusters
PROFILE = quick
SEED = 1
NB =

override VENV := $(abspath $(VENV))
BIN := $(VENV)/bin
STAMP := $(VENV)/stellar_lab.stamp
CLUSTERS := $(CURDIR)/data/archives/clusters

# The caller's shell must not decide what the tests see. STELLAR_LAB_REAL_DATA, the optional folder
# of raw survey files, may. Compiled modules are kept, whatever the shell says: without them each of
# some hundred processes compiles what it imports anew (TensorFlow takes 13 s of a processor, not 5).
unexport STELLAR_LAB_ARCHIVE STELLAR_LAB_PROFILE PYTHONPATH PYTHONHOME PYTHONSTARTUP
unexport PYTHONDONTWRITEBYTECODE
export MPLBACKEND = Agg
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env lab test faults notebook fromtext sync check format archive outputs bench constraints clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## the environment in .venv alone

$(STAMP): settings.ini setup.py constraints.txt tools/environment.sh
	@sh tools/environment.sh "$(VENV)" "$(PYTHON)"

ifneq ($(shell sh tools/environment.sh --ready "$(VENV)" "$(PYTHON)" && echo yes),yes)
$(STAMP): FORCE
endif
FORCE:

lab: $(STAMP) ## the whole lab into _build/ [ARCHIVE=clusters|mock|URL|folder] [PROFILE=quick|full]
	@$(BIN)/python tools/lab.py run --archive "$(ARCHIVE)" --profile "$(PROFILE)"

test: archive check ## all tests: generated files, notebooks, then tests/
	@echo "== notebooks"
	@$(BIN)/python tools/test_notebooks.py
	@echo "== tests"
	@$(BIN)/python tools/test_files.py

faults: $(STAMP) ## the whole campaign of faults: what is damaged, and what becomes of it [SEED=1]
	@$(BIN)/python tools/faults.py --seed "$(SEED)"

notebook: archive ## JupyterLab in nbs/
	@unset MPLBACKEND; $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs \
		$(if $(filter 0,$(shell id -u)),--allow-root)

fromtext: $(STAMP) ## bring changed text twins (nbs/text) into their notebooks [NB="05_cannon …"]
	@sh tools/from_text.sh $(NB)

sync: $(STAMP) ## regenerate package and text twins from the notebooks, and clean these
	@sh tools/sync.sh

check: $(STAMP) ## formatted, linted, imports in order, package and twins as the notebooks, outputs there?
	@echo "== checks"
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run 'make format'" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/python tools/check.py

format: $(STAMP) ## format code in notebooks, tests and tools, then as 'make sync'
	@$(BIN)/ruff format .
	@sh tools/sync.sh

archive: $(STAMP) ## write the embedded archive of real stars into data/archives/clusters
	@$(BIN)/python tools/lab.py archive

outputs: $(STAMP) ## refresh the outputs that the notebooks carry [NB="03_normalize …"]
	@$(BIN)/python tools/lab.py outputs $(NB)
	@$(if $(NB),,$(BIN)/python tools/readme.py)

bench: $(STAMP) ## time training and inversion, compared with their plain matrix products
	@$(BIN)/python tools/bench.py

constraints: $(STAMP) ## fix the newest versions that go together, for all three Pythons
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv
	@$(BIN)/python -m uv pip compile setup.py --extra all --universal --python-version 3.11 --fork-strategy fewest --upgrade --refresh-package stellar-lab \
		--no-annotate --custom-compile-command "make constraints" --quiet --output-file constraints.txt

clean: ## remove _build/ and build/; the environment and the archives stay
	rm -rf _build build
