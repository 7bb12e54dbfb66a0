PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tests run on one thread each; with more workers they are faster (9 minutes with 2 in place of 12), and in another order.
WORKERS ?= 1

.PHONY: help install demo test test-all lint bench clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

$(INSTALLED): pyproject.toml constraints.txt scripts/install.sh
	@echo "installing into $(VENV) (torch and transformers: a few minutes) ..."
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) dev --editable
	@touch $@

install: $(INSTALLED) ## Set up .venv with the tested versions

demo: $(INSTALLED) ## Train two adapters, serve them beside their base, merge one
	@$(BIN)/python examples/demo.py

test: $(INSTALLED) ## The tests that CI runs
	$(BIN)/python -m pytest -m "not slow and not gpu" $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile)

test-all: test ## Every test, also the slow and complete ones, one after another
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(INSTALLED) ## Style, types, import rules, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

bench: $(INSTALLED) ## The quick form of the side-by-side measurements
	$(BIN)/python benchmarks/serve.py --quick

clean: ## Remove what make made, but not the prepared base
	rm -rf $(VENV) demo build *.egg-info
