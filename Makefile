# make run and make test set up all that they need (scripts/setup.py), and are quick a second time.
ifndef PYTHON
PYTHON := $(shell command -v python3)
endif
VENV := $(CURDIR)/.venv
# Arguments for the command: make run ARGS="--model mixtral-8x7b --ranks 4"
ARGS ?=
export PATH := $(VENV)/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help run test test-quick build setup format lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

run: build ## run a mixture-of-experts layer on several ranks: flashmoe run $(ARGS)
	@flashmoe run $(ARGS)

test: setup ## everything: build, gates, C++ and Python tests, sanitizers
	@python scripts/run_tests.py $(ARGS)

test-quick: setup ## the same without what is slow: under two minutes once built
	@python scripts/run_tests.py --quick $(ARGS)

build: setup ## the libraries: python/flashmoe/lib and build/release
	@test -f build/release/build.ninja || cmake --preset release
	@cmake --build --preset release

setup: ## system packages and the virtual environment .venv
	@$(PYTHON) scripts/setup.py

format: setup ## rewrite the sources in the house format
	@python scripts/gates/run.py --fix format

lint: build ## the gates: format, lint, style, headers, README commands
	@python scripts/gates/run.py $(ARGS)

clean: ## remove what was built; .venv stays
	rm -rf build dist python/flashmoe/lib
