# make train    trains in a fresh environment: SOURCE=folder|zip|Hub id  PRESET=tiny  SIZE=64  MINUTES=30  BATCH=128  SEED=0
#               RECIPE=dense|plain
# make test     everything CI checks, with today's newest packages
# make test-colab   the same unit tests and notebook smoke with Colab's versions
# make browser  two notebooks in JupyterLab, driven by headless Chromium; screenshots in .venv/browser
# make tables   the tables of README.md and docs/quality.md from the results of the benchmarks
# make text     the notebook as nb.py, to edit it as text;   make notebook   nb.py back into the notebook and the module

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NOTEBOOK  := LiquidDiffusion_Training.ipynb
NOTEBOOKS := $(NOTEBOOK) $(wildcard notebooks/*.ipynb)
CANONICAL := --extra-keys "metadata.language_info metadata.jupytext cell.id cell.metadata.id cell.metadata.lines_to_next_cell cell.metadata.outputId cell.metadata.executionInfo"

.PHONY: train test test-colab check unit smoke browser canonical export tables text notebook clean
.DELETE_ON_ERROR:

LD_SOURCE     ?= $(SOURCE)
LD_PRESET     ?= $(PRESET)
LD_IMAGE_SIZE ?= $(SIZE)
LD_MINUTES    ?= $(MINUTES)
LD_BATCH_SIZE ?= $(BATCH)
LD_SEED       ?= $(SEED)
LD_RECIPE     ?= $(RECIPE)
export LD_SOURCE LD_PRESET LD_IMAGE_SIZE LD_MINUTES LD_BATCH_SIZE LD_SEED LD_RECIPE

train: $(VENV)/run
	@$(BIN)/python run_notebook.py $(NOTEBOOK)

test: check unit smoke

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify $(CANONICAL) $(NOTEBOOKS) || \
	  { echo "A notebook is not in its canonical form; run 'make canonical' and commit."; exit 1; }
	@cp liquid_diffusion.py $(VENV)/committed.py && $(MAKE) -s export && cmp -s liquid_diffusion.py $(VENV)/committed.py || \
	  { echo "liquid_diffusion.py differs from the notebook; run 'make export' and commit."; exit 1; }

unit: $(VENV)/dev
	$(BIN)/python -m pytest tests

smoke: $(VENV)/dev
	LD_SMOKE=1 LD_SOURCE= LD_RUN_DIR=$(VENV)/smoke $(BIN)/python -m pytest --nbval-lax --nbval-current-env $(NOTEBOOKS)

browser: $(VENV)/dev
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } || \
	  { echo "There is no Chromium here; install it (Debian: apt install chromium) and run 'make browser' again."; exit 1; }
	LD_SHOTS=$(VENV)/browser $(BIN)/python -m pytest tests/browser.py

test-colab: $(VENV)-colab/dev
	$(MAKE) unit smoke VENV=$(VENV)-colab

canonical: $(VENV)/dev
	$(BIN)/nbstripout $(CANONICAL) $(NOTEBOOKS)

export: $(VENV)/dev
	$(BIN)/nb-export $(NOTEBOOK) --lib-path . --name liquid_diffusion --solo-nb
	$(BIN)/ruff format -q liquid_diffusion.py

tables: $(VENV)/dev
	$(BIN)/python benchmarks/quality_tables.py > /dev/null
	$(BIN)/python benchmarks/readme.py

text: $(VENV)/dev
	$(BIN)/jupytext --to py:percent $(NOTEBOOK) -o nb.py

notebook: $(VENV)/dev
	$(BIN)/jupytext --update --to ipynb nb.py -o $(NOTEBOOK)
	$(MAKE) -s canonical export

clean:
	rm -rf runs $(VENV) $(VENV)-colab

# ---- environments ---------------------------------------------------------------------------------------------------
# A stamp file says that the requirements of that moment are installed.

$(VENV)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no '$(PYTHON)'; install Python 3.10 to 3.13, or name one: make PYTHON=python3.12."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "'$(PYTHON)' is $$($(PYTHON) --version); LiquidDiffusion needs 3.10 to 3.13: make PYTHON=python3.12."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' has no venv module; on Debian and Ubuntu: apt install python3-venv."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run: requirements.txt | $(VENV)/python
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt | $(VENV)/python
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@ $(VENV)/run

$(VENV)-colab/dev: requirements.txt requirements-dev.txt constraints-colab.txt
	$(MAKE) $(VENV)-colab/python VENV=$(VENV)-colab
	$(VENV)-colab/bin/python -m pip install -q -r requirements-dev.txt -c constraints-colab.txt
	@touch $@ $(VENV)-colab/run
