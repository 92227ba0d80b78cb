# make edit    the first edit: environment, embedded model, one ROME edit that collapses it
# make test    everything that is tested; make quick for the part without the embedded model
# make check   lint, types, import rule
# make bench   timings of benchmarks/

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3

.PHONY: edit test quick check bench env clean

edit: $(VENV)/.installed
	@echo "== one ROME edit of the embedded model (fetched on first use)"
	$(PY) single_case_edit.py

test: $(VENV)/.installed-dev check
	@echo "== tests on tiny models, two at a time, one thread each"
	$(PY) -m pytest -n 2 -m "not embedded"
	@echo "== tests on the embedded model (fetched on first use)"
	$(PY) -m pytest -m embedded

quick: $(VENV)/.installed-dev
	$(PY) -m pytest -n 2 -m "not slow"

check: $(VENV)/.installed-dev
	@echo "== lint and types"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/test_house.py

bench: $(VENV)/.installed
	$(PY) benchmarks/rome_edit.py

env: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@echo "== making $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	@echo "== installing requirements.txt (a few minutes the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-eval.txt requirements-data.txt $(VENV)/.installed
	@echo "== installing requirements-dev.txt"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
