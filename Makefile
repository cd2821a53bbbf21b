# The commands a person runs; CI runs `make test` and `make check`, the same ones.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export NO_PROXY := localhost,127.0.0.1,::1

# Tests wait more than they compute, for clusters that start and hosts that die: several files run at a time.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-fast check format stubs bench chaos soak switch-off deploy-check gpu-check clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Make .venv with pinned dependencies

# torch comes first and alone: a package that asks for it must find it, or it would fetch another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"
	$(BIN)/pip install -q --progress-bar on -c constraints.txt torch
	$(BIN)/pip install -q --progress-bar on -c constraints.txt -e ".[serve]" --group dev
	$(BIN)/pip install -q --no-deps -c constraints.txt llama-models
	@touch $@

demo: setup ## A Ray cluster, a gateway and real prompts on this machine
	$(BIN)/python tools/demo.py

test: setup ## All tests: real actors, sockets and gateway; CPU, offline
	$(PYTEST)

test-fast: setup ## Tests without Ray and without the slow ones
	$(PYTEST) -m "not ray and not slow"

check: setup ## Format, lint, types, layering, protos, stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/generate_stubs.py --image build/protos.binpb
	$(BIN)/buf lint build/protos.binpb --path llama4_dist
	$(BIN)/python tools/generate_stubs.py --check

format: setup ## Format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: setup ## Generate the Python stubs from protos/
	$(BIN)/python tools/generate_stubs.py

bench: setup ## Dispatch against a bare echo, the gateway alone, a cluster against one process, that against transformers
	$(BIN)/python -m benchmarks.dispatch
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.compare

chaos: setup ## Kill hosts at every moment, scale under load, five minutes of chaos; about 25 minutes
	$(BIN)/python -m benchmarks.kills
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/llama4-dist chaos --model models/llama4-mini --kill-every 5s --stop-every 11s --scale-every 20s --duration 5m
	$(BIN)/llama4-dist chaos --model models/llama4-mini --kill-every 9s --kill-attention-every 14s --kill-gateway-every 17s \
		--kill-controller-every 25s --scale-every 20s --gateways 2 --experts 3 --hosts 4,2 --duration 2m

soak: setup ## An hour of chaos
	$(BIN)/llama4-dist chaos --model models/llama4-mini --kill-every 20s --stop-every 31s --scale-every 60s \
		--kill-attention-every 97s --kill-gateway-every 71s --kill-controller-every 151s --gateways 2 --duration 1h

switch-off: setup ## Take each mechanism out of a copy and see its tests fail; about 10 minutes
	$(BIN)/python tools/switch_off.py

deploy-check: setup ## Build every Kubernetes overlay and check it offline; lint image and scripts
	$(BIN)/python tools/validate_manifests.py
	$(BIN)/yamllint --strict -c .yamllint.yaml deploy tools/manifests
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/shellcheck deploy/docker/llama4-driver tests/deploy/pod_namespace.sh

# No `setup`: on a machine with a card, any python3 that has torch, Triton, numpy and safetensors will do.
gpu-check: ## On a CUDA device: check every kernel against float64 and time it; about 4 minutes
	$(PYTHON) tools/gpu_check.py

clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
