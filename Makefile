# `make demo`, `make check` and `make test` start from nothing but Python >= 3.11 and make.
# VENV=.venv-3.13 keeps the packages of another PYTHON apart.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

# Compiled once, not by every process of the tests, also where the environment asks for the latter.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test test-plain docs wheel tag man lock lowest samples bench bench-quick bench-gpu fuzz sbom licences clean help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/demo ## set up, then measure the sample checkpoints
	@rm -f $(VENV)/demo.jsonl $(VENV)/demo.jsonl.part
	$(BIN)/loradiag spectrum sample_checkpoints/base sample_checkpoints/full_ft -o $(VENV)/demo.jsonl

test: $(VENV)/test ## set up, then lint, types and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict lora_diag
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

# What holds in these settings and in those of `make test` does not depend on the order of sums, nor on FMA.
test-plain: $(VENV)/test ## run the tests of numbers as on a processor without AVX and FMA
	OPENBLAS_CORETYPE=Prescott MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 \
	  $(BIN)/pytest -n auto --dist loadfile tests/linalg tests/metrics tests/layers \
	  tests/diagnostics/verify_merge tests/test_docs.py

check: $(VENV)/test ## lint, types and the tests that are not slow, in about a minute
	$(BIN)/ruff check -q .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy --strict lora_diag & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m "not slow"; tests=$$?; wait $$types && exit $$tests

docs: $(VENV)/docs ## set up, then build the site into build/site; a broken link is an error
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/release ## build dist/, check it, and run the demo from the wheel in an environment of its own
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv build/wheel
	build/wheel/$(notdir $(BIN))/python -m pip install --quiet dist/*.whl
	cd build && wheel/$(notdir $(BIN))/loradiag spectrum ../sample_checkpoints/base ../sample_checkpoints/full_ft

tag: $(BIN)/python ## check that TAG is the version and has an entry in the changelog
	$(BIN)/python .github/check_tag.py $(TAG)

man: $(VENV)/demo ## write build/man/man1/loradiag*.1 from the options of the commands
	$(BIN)/python tools/man.py build/man/man1

lock: $(VENV)/test ## write image.lock, the versions in .venv of what the container needs
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '==[^+]*$$' >$(VENV)/versions
	$(BIN)/uv pip compile pyproject.toml --extra arrow --extra hub --extra ray --extra remote --extra report \
	  --constraint $(VENV)/versions --universal --no-annotate --no-header --quiet | grep -vE '^(torch|triton|cuda-.*|nvidia-.*)==' >image.lock

lowest: ## run the tests with the oldest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) .venv-lowest/lowest VENV=.venv-lowest
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n auto --dist loadfile

samples: $(VENV)/train ## train the sample checkpoints again
	$(BIN)/python sample_checkpoints/make.py

bench: $(VENV)/test ## measure speed and memory beside the alternatives
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/test ## measure the kernels for a minute; fail if one is 1.3 times slower than its stored ratio
	$(BIN)/python -m benchmarks.quick

bench-gpu: ## check the numbers of a GPU, measure it, and write the tables into docs/benchmarks.md
	$(MAKE) .venv-gpu/demo VENV=.venv-gpu VENV_OPTIONS=--system-site-packages
	.venv-gpu/$(notdir $(BIN))/python -m benchmarks.gpu --write

fuzz: $(VENV)/test ## damage inputs at random for MINUTES (10), other ones with another SEED (0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.robustness --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)
	OMP_NUM_THREADS=1 LORADIAG_EVERY_STEP=1 $(BIN)/pytest tests/robustness/test_killed.py tests/robustness/test_faults.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m hypothesis --hypothesis-profile others --hypothesis-seed $(or $(SEED),0)

sbom: $(VENV)/audit ## write build/sbom.json, what is installed, and look for known vulnerabilities (needs a network)
	mkdir -p build
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json
	! grep -nE 'file:|"/[a-z]' build/sbom.json
	-$(BIN)/pip-audit --progress-spinner off

licences: $(VENV)/test ## put the licences of all runtime dependencies into docs/licences.txt
	$(BIN)/python -m tests.robustness.licences --write

clean: ## remove what make and the tests created
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loradiag needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(VENV)/release: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[release]'
	touch $@

$(VENV)/docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

# What those versions need in turn is taken from the same time: later releases no longer work with them.
$(VENV)/lowest: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --resolution lowest-direct --exclude-newer 2026-10-01 -e '.[test]'
	touch $@

$(VENV)/audit: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[audit,report,train]'
	touch $@

$(VENV)/train: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@
