# `make` alone lists the targets. Everything stays in the clone: .venv, .run, caches.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
TRIREME := $(VENV)/bin/trireme
# File the fleet is read from; empty: fleet.yaml here, or else the built-in fleet.
CONFIG ?=

.PHONY: help setup demo up down status test test-unit check lint types imports proto clean

help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt .ci/setup.sh
	PYTHON=$(PYTHON) .ci/setup.sh $(VENV)

demo: setup ## run a fleet, ask it, kill a worker while it answers
	$(TRIREME) demo

up: setup ## run the fleet in the background (CONFIG=fleet.yaml)
	$(TRIREME) up --detach $(if $(CONFIG),--config $(CONFIG))

down: setup ## stop it
	$(TRIREME) down

status: setup ## show it
	$(TRIREME) status

test: setup ## run all tests that this machine can run
	$(VENV)/bin/python -m pytest

test-unit: setup ## run the tests that need no other process
	$(VENV)/bin/python -m pytest tests/unit

check: lint types imports proto ## lint, types, import directions, generated code

lint: setup ## ruff
	$(VENV)/bin/ruff check .

types: setup ## mypy --strict
	$(VENV)/bin/mypy libs services

imports: setup ## the import directions of the house
	$(VENV)/bin/python -m pytest -q tests/unit/test_import_rules.py

proto: setup ## fail if libs/trireme/wire differs from what proto/ generates
	.ci/generate_proto.sh --check

clean: ## remove caches and build outputs, but neither .venv nor .run
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
