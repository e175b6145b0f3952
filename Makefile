# `make` alone lists the targets. Everything stays in the clone: .venv, .run, caches.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
TRIREME := $(VENV)/bin/trireme
# Servers that Trireme is measured against, in an environment of their own.
PEERS := .tools/peers
LLAMA_CPP := .tools/llama_cpp
OPENVINO := .tools/openvino
LOAD_GENERATOR := .tools/load_generator
# File the fleet is read from; empty: fleet.yaml here, or else the built-in fleet.
CONFIG ?=

.PHONY: help setup demo up down status test test-unit golden check lint types imports proto metrics-reference metrics-current api-reference api-current clean \
        kernels bench bench-engine bench-floor bench-overhead bench-scaling bench-kvstore bench-peers bench-gpu bench-load-generator

help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## make .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt .ci/setup.sh
	PYTHON=$(PYTHON) .ci/setup.sh $(VENV)

demo: kernels ## run a fleet, ask it, kill a worker while it answers
	$(TRIREME) demo

up: kernels ## run the fleet in the background (CONFIG=fleet.yaml)
	$(TRIREME) up --detach $(if $(CONFIG),--config $(CONFIG))

down: setup ## stop it
	$(TRIREME) down

status: setup ## show it
	$(TRIREME) status

kernels: setup ## build the CPU kernels; without a compiler PyTorch serves
	-$(VENV)/bin/python -m trireme.kernels.cpu_build

test: kernels ## run all tests that this machine can run
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

golden: kernels ## write tests/golden anew, from what OpenAI's API answers now
	TRIREME_REWRITE_GOLDEN=1 $(VENV)/bin/python -m pytest -q tests/service/test_golden_openai.py

test-unit: kernels ## run the tests that need no other process
	$(VENV)/bin/python -m pytest tests/unit

check: lint types imports proto metrics-current api-current ## lint, types, import directions, generated code

audit: setup ## a bill of materials (build/sbom.cdx.json), and known vulnerabilities of what is installed
	PYTHON=$(PYTHON) .ci/audit.sh

lint: setup ## ruff
	$(VENV)/bin/ruff check .

types: setup ## mypy --strict
	$(VENV)/bin/mypy libs services

imports: setup ## the import directions of the house
	$(VENV)/bin/python -m pytest -q tests/unit/test_import_rules.py

proto: setup ## fail if libs/trireme/wire differs from what proto/ generates
	.ci/generate_proto.sh --check

metrics-reference: setup ## write the reference part of docs/metrics.md
	PYTHONPATH=libs:services $(VENV)/bin/python .ci/metrics_reference.py

metrics-current: setup ## fail if docs/metrics.md is not what the services serve
	PYTHONPATH=libs:services $(VENV)/bin/python .ci/metrics_reference.py --check

api-reference: setup ## write the reference part of docs/api.md
	PYTHONPATH=libs:services $(VENV)/bin/python .ci/api_reference.py

api-current: setup ## fail if docs/api.md is not what the gateway serves
	PYTHONPATH=libs:services $(VENV)/bin/python .ci/api_reference.py --check

bench: setup ## any script of benchmarks/ (NAME=fastserve_sim)
	$(VENV)/bin/python -m benchmarks.$(or $(NAME),$(error say which: make bench NAME=fastserve_sim))

bench-engine: setup ## the engine against transformers, in process
	$(VENV)/bin/python -m benchmarks.engine

bench-floor: setup ## what gRPC and Redis alone cost here
	$(VENV)/bin/python -m benchmarks.floor

bench-overhead: setup ## what the fleet adds to the engine
	$(VENV)/bin/python -m benchmarks.overhead

bench-scaling: setup ## cost per request as workers, streams and tenants grow
	$(VENV)/bin/python -m benchmarks.scaling

bench-kvstore: setup ## blocks to and from the KV store, against the floor of copying them
	$(VENV)/bin/python benchmarks/kvstore_transfer.py

bench-gpu: setup ## CUDA kernels on one GPU: right first, then beside PyTorch and beside copying
	$(VENV)/bin/python -m benchmarks.gpu

bench-peers: setup $(PEERS)/.installed ## the fleet, llama-cpp-python's server and transformers on one trace
	$(VENV)/bin/python -m benchmarks.peers

$(PEERS)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -c constraints.txt 'llama-cpp-python[server]' gguf torch 'transformers[serving]'
	touch $@

bench-load-generator: kernels $(LOAD_GENERATOR)/.installed ## guidellm beside `trireme bench`, on one fleet
	$(VENV)/bin/python -m benchmarks.load_generator $(ARGS)

# guidellm wants torch for its data loader alone; the one that `make setup` has does.
$(LOAD_GENERATOR)/.installed:
	$(PYTHON) -m venv $(LOAD_GENERATOR)
	$(if $(TORCH_INDEX_URL),$(LOAD_GENERATOR)/bin/pip install --quiet --index-url $(TORCH_INDEX_URL) torch==2.13.0)
	$(LOAD_GENERATOR)/bin/pip install --quiet guidellm==0.8.1 torch==2.13.0
	touch $@

bench-cpu: kernels $(LLAMA_CPP)/.built $(OPENVINO)/.installed ## whole models beside llama.cpp, OpenVINO and transformers (ARGS=--quick)
	$(VENV)/bin/python -m benchmarks.cpu_models $(ARGS)

$(LLAMA_CPP)/.built:
	$(PYTHON) -m benchmarks.cpu_models.llama_cpp_install

# torch, of which only the tracer is used, is pinned to what `make setup` has. torchvision comes along uncalled for,
# and breaks the import of transformers where its build is another than torch's.
$(OPENVINO)/.installed:
	$(PYTHON) -m venv $(OPENVINO)
	$(if $(TORCH_INDEX_URL),$(OPENVINO)/bin/pip install --quiet --index-url $(TORCH_INDEX_URL) torch==2.13.0)
	$(OPENVINO)/bin/pip install --quiet 'optimum-intel[openvino]==2.2.0' openvino==2026.4.1 nncf==3.4.0 torch==2.13.0
	$(OPENVINO)/bin/pip uninstall --quiet --yes torchvision
	touch $@

clean: ## remove caches and build outputs, but neither .venv nor .run
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
