# Two commands: `make demo` and `make test`. Both start from nothing but Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test samples bench clean help

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: .venv/demo ## set up, then measure the sample checkpoints
	@rm -f .venv/demo.jsonl .venv/demo.jsonl.part
	$(BIN)/loradiag spectrum sample_checkpoints/base sample_checkpoints/full_ft -o .venv/demo.jsonl

test: .venv/test ## set up, then lint, types and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict lora_diag
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

samples: .venv/train ## train the sample checkpoints again
	$(BIN)/python sample_checkpoints/make.py

bench: .venv/test ## measure speed and memory beside the alternatives
	$(BIN)/python -m tests.benchmarks

clean: ## remove what make and the tests created
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loradiag needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

.venv/train: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@
