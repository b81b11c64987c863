# What to do with a clone. Everything sets up what it needs, so `make demo` or `make test` is enough.

BIN := .venv/bin
MINUTES := 10

.DEFAULT_GOAL := help
.PHONY: help setup demo test simulation soak bench lint build constraints clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## */\1	/p' Makefile | expand -t 14

setup: .venv/installed  ## the virtual environment, the programs for private servers, and a browser for the tests
	@config/setup.sh servers rabbitmq postgres redis memcached prometheus openssl chromium

demo: .venv/installed  ## the story, told with real servers in under a minute
	@config/setup.sh servers rabbitmq postgres
	@$(BIN)/cacheinval demo

test: setup  ## all tests but the longest, against private servers
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

simulation: .venv/installed  ## the rules in every order of events: states explored, mutants and what caught them
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/simulation

soak: setup  ## MINUTES=10 of walks through the rules, then as many of random faults under load, then the long tests; SEED=… plays them again
	@cd tests && ../$(BIN)/python -m simulation.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))
	@PYTHONPATH=tests $(BIN)/python tests/faults/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python -m pytest -q -m long

bench: setup .venv/bench  ## how fast, beside its peers; ONLY=hit for one, ROUNDS=5, PICTURES=FOLDER; exits 1 where a target is missed
	@cd tests && ../$(BIN)/python -m benchmarks $(ONLY) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		--json ../bench.json $(if $(PICTURES),--pictures $(abspath $(PICTURES)))

lint: .venv/installed  ## ruff, mypy, import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary cacheinval
	@out=$$($(BIN)/lint-imports --no-cache 2>&1) || { echo "$$out"; exit 1; }

build: .venv/installed  ## wheel and source distribution, in dist/
	@out=$$($(BIN)/python -m build 2>&1) || { echo "$$out"; exit 1; }
	@ls dist

constraints:  ## config/constraints.txt again, with the newest versions
	@config/setup.sh constraints

clean:  ## remove all that was made
	@rm -rf .venv dist bench.json .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml config/constraints.txt config/setup.sh
	@config/setup.sh python

.venv/bench: .venv/installed
	@config/setup.sh peers
