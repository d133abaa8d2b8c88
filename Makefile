# Everything a fresh clone needs: `make demo` shows the whole road on real images, `make test` proves it.
# Needs python3 >= 3.11 (with venv), make and a network; no root. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
PYTEST = -m pytest -n 2 --dist loadgroup

.PHONY: help setup demo test test-latest lint lock clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/built  ## create .venv, install the pinned set, compile the native core where that is possible

demo: setup  ## train a Vision Permutator on real digits with two processes, evaluate it, say what comes next
	$(VENV)/bin/python scripts/prepare_digits.py
	NPROC=2 scripts/launch.sh train.py experiment=digits
	$(VENV)/bin/python eval.py checkpoint=runs/digits
	@$(VENV)/bin/python -c 'import json; print("top-1 %.2f %%, run folder runs/digits" % json.load(open("runs/digits/eval.json"))["top1"])'
	@echo "interrupted or not, the same command goes on: NPROC=2 scripts/launch.sh train.py experiment=digits"
	@echo "next, with ImageNet on disk: scripts/launch.sh train.py model=vip_m7 data.root=/path/to/imagenet"

test: setup  ## the whole suite
	$(VENV)/bin/python $(PYTEST)

test-latest: $(LATEST)/installed  ## the whole suite on the newest torch that pyproject.toml allows
	$(LATEST)/bin/python $(PYTEST)

lint: setup  ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lock: setup  ## compile requirements.lock anew from pyproject.toml
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --custom-compile-command "make lock" -q -o requirements.lock

clean:  ## remove what make made: environments and caches, not runs/ and datasets/
	rm -rf $(VENV) $(LATEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# uv comes from the lock as well, by version and hash. The stamp is the last thing written: an interrupted install starts over.
# Bytecode is written now: where Python may not later (a read-only disk, PYTHONDONTWRITEBYTECODE), each start takes twice as long.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version 2>&1) is too old, 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) cannot make a venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@awk '/^uv==/{on=1} on{print} on&&!/\\$$/{exit}' requirements.lock > $(VENV)/uv.lock
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	$(VENV)/bin/uv pip sync -q --python $(VENV)/bin/python --require-hashes --compile-bytecode requirements.lock
	@touch $@

# The project itself and its native core, without which torch decodes; tried again by every make until it is there.
$(VENV)/built: $(VENV)/installed setup.py $(wildcard data/native/*.[ch])
	@rm -f data/native/_core.*
	$(VENV)/bin/uv pip install -q --python $(VENV)/bin/python --no-deps --no-build-isolation --offline --reinstall -e .
	@$(VENV)/bin/python -c 'import sys; from data import native; why = native.reason(); \
	  sys.exit(why and f"make: {why}; until then torch decodes the images, more slowly" or 0)' && touch $@ || true

$(LATEST)/installed: pyproject.toml $(VENV)/installed
	$(PYTHON) -m venv $(LATEST)
	$(VENV)/bin/uv pip install -q --no-config --compile-bytecode --upgrade --python $(LATEST)/bin/python -e '.[dev]'
	@$(LATEST)/bin/python -c 'import torch, torchvision, timm; print("torch", torch.__version__, "torchvision", torchvision.__version__, "timm", timm.__version__)'
	@touch $@
