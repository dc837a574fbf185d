# Headwater. `make help` lists the targets.
PYTHON ?= python3.11
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?= smollm2-135m

SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet
WEB   := clients/web
PAGE  := server/pages/web/index.html
# Folders too: what is removed from one changes it.
PAGE_SOURCES := $(shell find $(WEB)/src $(WEB)/public $(WEB)/index.html $(WEB)/*.json \
                          $(WEB)/*.ts 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help run page test test-slow check format openapi lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

run: $(VENV)/run.stamp  ## set up, fetch the default model, serve it (PORT, HOST, MODEL)
	@$(MAKE) --no-print-directory page \
	  || echo "make: the web page was not built (see above); the API works without it" >&2
	@exec $(BIN)/headwater serve $(MODEL) --host $(HOST) --port $(PORT)

page: $(PAGE)  ## build the web page, where its sources are newer

# If the page cannot be built, the tests of all else still run; then it fails.
test: $(VENV)/dev.stamp  ## set up and run the tests
	@$(BIN)/headwater pull smollm2-135m
	@$(MAKE) --no-print-directory page || true
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not alone"
	@$(BIN)/python -m pytest -m "alone and not slow"
	@$(MAKE) --no-print-directory page
	@cd $(WEB) && ./with-node npm test

test-slow: $(VENV)/dev.stamp $(PAGE)  ## the tests that take minutes
	@$(BIN)/headwater pull smollm2-135m
	@$(BIN)/python -m pytest -m slow

check: $(VENV)/dev.stamp  ## lint, format, types, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_imports.py

format: $(VENV)/dev.stamp  ## format the code and mend what ruff can
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

$(VENV)/run.stamp: requirements/run.txt requirements/torch.txt pyproject.toml
	@echo "setting up $(VENV) (once; about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "make: needs Python 3.11 with venv; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PIP) install --require-hashes -r requirements/run.txt
	@$(PIP) install -r requirements/torch.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements/dev.txt
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

$(PAGE): $(WEB)/node_modules/.package-lock.json $(PAGE_SOURCES)
	@echo "building the web page"
	@cd $(WEB) && ./with-node npm run --silent build -- --logLevel error
	@touch $@

$(WEB)/node_modules/.package-lock.json: $(WEB)/package-lock.json | $(VENV)/run.stamp
	@echo "fetching what the web page is built with"
	@cd $(WEB) && ./with-node npm ci --no-audit --no-fund --ignore-scripts --loglevel=error
	@touch $@

openapi: $(VENV)/dev.stamp  ## write docs/openapi.json anew
	@$(BIN)/python -m server.openapi > docs/openapi.json

lock: $(VENV)/dev.stamp  ## write requirements/*.txt anew from requirements/*.in
	@$(PIP) install pip-tools
	@cd requirements && for set in run dev node; do \
	  ../$(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o $$set.txt $$set.in; done

clean:  ## remove what the targets made here (the models stay in the user's cache)
	@rm -rf $(VENV) $(WEB)/node_modules server/pages/web build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
