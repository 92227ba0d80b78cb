# make edit    the first edit: environment, embedded model, one ROME edit that collapses it;
#              TORCH=cpu takes PyTorch's small build, for machines without an NVIDIA GPU
# make test    everything that is tested; make quick for the part without the embedded model
# make check   lint, types, import rule
# make wheels  asks whether every pin has a wheel for every supported Python; installs nothing
# make isa     the golden and embedded tests under several instruction sets and thread counts (an hour or more)
# make kills   ends runs at every place where the disk changes (about 800; make test does so at 40)
# make fuzz    wrong inputs of every kind, drawn anew, for MINUTES=10
# make bench   timings of benchmarks/
# make mutants wrong changes to the library, each of which a quick test must notice

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
TORCH ?= default
MINUTES ?= 10
SEED ?= 0
SUPPORTED := 3.11 3.12 3.13 3.14
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
, := ,
refused = $(error $(1) is $(if $(2),Python $(2),no Python that runs here); this project needs Python 3.11 to 3.14: \
install one (for example apt install python3.12 python3.12-venv)$(3) and run: PYTHON=python3.12 make edit)
supported = $(if $(filter $(SUPPORTED),$(2)),,$(call refused,$(1),$(2),$(3)))

test quick kills fuzz mutants: export OMP_NUM_THREADS := 1

.PHONY: edit test quick check wheels isa kills fuzz bench mutants env clean

edit: $(VENV)/.installed
	@echo "== one ROME edit of the embedded model (fetched on first use)"
	$(PY) single_case_edit.py

test: $(VENV)/.installed-dev check
	@echo "== tests on tiny models, two at a time, one thread each"
	$(PY) -m pytest -n 2 -m "not embedded" --junitxml .pytest_cache/tiny.xml
	@echo "== tests on pretended GPUs"
	$(PY) -m pytest -n 2 tests/test_devices.py --junitxml .pytest_cache/devices.xml
	@echo "== tests on the embedded model, one thread (fetched on first use)"
	$(PY) -m pytest -m embedded --junitxml .pytest_cache/embedded.xml
	@$(PY) tools/skipped.py .pytest_cache/tiny.xml .pytest_cache/devices.xml .pytest_cache/embedded.xml

quick: $(VENV)/.installed-dev
	$(PY) -m pytest -n 2 -m "not slow"
	$(PY) -m pytest -n 2 -m "not slow" tests/test_devices.py

check: $(VENV)/.installed-dev
	@echo "== lint and types"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/test_house.py

wheels: | $(VENV)/bin/python
	$(PY) tools/wheels.py requirements.txt requirements-eval.txt requirements-data.txt requirements-dev.txt

isa: $(VENV)/.installed-dev
	$(PY) tools/isa.py

kills: $(VENV)/.installed-dev
	KILLS=1000 $(PY) -m pytest -n 2 -rP tests/test_kills.py

fuzz: $(VENV)/.installed-dev
	cd tests && PYTHONPATH=.. ../$(PY) fuzz.py $(MINUTES) $(SEED)

bench: $(VENV)/.installed
	$(PY) benchmarks/rome_edit.py

mutants: $(VENV)/.installed-dev
	$(PY) tests/mutants.py

env: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(call supported,$(PYTHON),$(call version,$(PYTHON)))
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(if $(wildcard $(PY)),$(call supported,$(PY),$(call version,$(PY)),$(,) remove $(VENV)))
ifeq ($(TORCH),cpu)
	@echo "== installing PyTorch's CPU build (0.2 GB)"
	@$(PY) tools/install.py --index-url https://download.pytorch.org/whl/cpu $(shell grep '^torch==' requirements.txt)
	@echo "== installing requirements.txt (0.2 GB)"
else
	@echo "== installing requirements.txt (2.9 GB with the CUDA build of PyTorch; TORCH=cpu: 0.4 GB)"
endif
	@$(PY) tools/install.py -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-eval.txt requirements-data.txt $(VENV)/.installed
	@echo "== installing requirements-dev.txt"
	@$(PY) tools/install.py -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
