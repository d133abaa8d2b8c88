# Everything a fresh clone needs: `make demo` shows the whole road on real images, `make test` proves it.
# Needs python3 >= 3.11 (with venv), make and a network; no root. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
STAMP := $(VENV)/installed
LAUNCH = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node=2

.PHONY: help setup demo test test-latest lint lock clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv and install the pinned set

# uv comes from the lock as well: its version and hashes are the constraint. The stamp is the last thing written, so an
# interrupted install starts over.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version 2>&1) is too old: Python 3.11 or newer is needed (PYTHON=python3.12 make ...)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: python3 cannot make a venv: install python3-venv (apt) first"; exit 1; }
	@awk '/^uv==/{on=1} on{print} on&&!/\\$$/{exit}' requirements.lock > $(VENV)/uv.lock
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	$(VENV)/bin/uv pip sync -q --python $(VENV)/bin/python --require-hashes requirements.lock
	$(VENV)/bin/uv pip install -q --python $(VENV)/bin/python --no-deps --no-build-isolation --offline -e .
	@touch $@

lock:  ## compile requirements.lock anew from pyproject.toml
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" -q -o requirements.lock
