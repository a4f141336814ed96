# `make serve` sets up and serves the demo model, `make test` sets up and runs the tests; `make gpu` tests and measures what
# needs a GPU. docs/contributing.md says when to use the others.

# `make serve PYTHON=python3.12` takes another Python, and makes an environment of another one anew.
OUR_PYTHON := $(if $(PYTHON),--this-python)
PYTHON ?= python3
VENV ?= .venv
# Where no GPU is seen torch's CPU build is installed. TORCH_INDEX names a package index that has it, where the one pip asks
# does not and uv is not wanted; TORCH=cuda takes 2.7 GB instead of 190 MB.
TORCH_INDEX ?=
export TORCH_INDEX TORCH
# The CUDA kernels are compiled where there is a GPU to run them on; `make serve GPTQ_API_CUDA=on` insists.
GPTQ_API_CUDA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo auto || echo off)
export GPTQ_API_CUDA
ARGS ?=
# Every process of ours would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve chat test compiled fast attack soak audit lint format compare gpu gpu-portable sanitize-cpu clients demo-model-test image image-smoke clean

serve: environment
	$(VENV)/bin/gptq-api serve $(ARGS)

chat: environment
	$(VENV)/bin/gptq-api chat $(ARGS)

# tests/__main__.py: side by side, then one by one those that others would spoil. ARGS are pytest's; -n0: all in one process.
test: environment-dev
	@echo "all tests take ten to twenty-five minutes on two cores, and longer on busy ones; make fast takes some minutes"
	$(VENV)/bin/python -m tests $(ARGS)

# What nvcc, Triton and the sanitizers make of kernels, for who changes them: tests that compile.
compiled: environment-dev
	$(VENV)/bin/python -m pytest -m compiles -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# What needs no process, no compiler, no clock and no patience: between two edits.
fast: environment-dev
	$(VENV)/bin/python -m pytest -q -m 'not server and not timing and not slow and not compiles and not gpu' $(ARGS)

# The long forms: 20,000 bodies, 1,000 hang-ups, every bomb, what schemathesis thinks up. Some 20 minutes.
attack: environment-dev
	$(VENV)/bin/python -m pytest -m attack $(ARGS)

# Half an hour of everything at once: memory, descriptors and times, into benchmarks/results.
soak: environment-dev
	$(VENV)/bin/python benchmarks/soak.py --minutes 30 --out benchmarks/results/soak-cpu.json $(ARGS)

# The CPU kernels under the compiler's sanitizers: random shapes, then the tests of the kernels. Some five minutes.
sanitize-cpu: environment-dev
	$(VENV)/bin/python -m tests.kernels.sanitize_cpu $(ARGS)

# The versions of constraints.txt in the database of known vulnerabilities; in an environment of its own.
audit: constraints.txt
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install pip-audit
	.audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict $(ARGS)

lint: environment-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: environment-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Two result files of one benchmark: `make compare OLD=before.json NEW=after.json`.
compare: environment
	$(VENV)/bin/python benchmarks/compare.py $(OLD) $(NEW) $(ARGS)

# How the demo model was made: it is finished, so that nothing else waits for these checks.
demo-model-test: environment-dev
	$(VENV)/bin/ruff check demo_model
	$(VENV)/bin/ruff format --check demo_model
	$(VENV)/bin/python -m pytest -c demo_model/pyproject.toml demo_model $(ARGS)

# Programs that others wrote, each in its own environment under .clients/, against servers of ours.
clients: environment-dev
	$(VENV)/bin/python -m tests.clients.environments
	$(VENV)/bin/python -m pytest tests/clients $(ARGS)

# The container image, with docker, podman or buildah: `make image DEVICE=cuda BASE=debian-python:bookworm`.
image:
	$(PYTHON) tools/build_image.py $(if $(DEVICE),--device $(DEVICE)) $(if $(BASE),--base $(BASE)) $(ARGS)

# The CPU image as a careful operator runs it, and what it measures; IMAGE names another than the one of `make image`.
image-smoke: environment-dev
	IMAGE=$(or $(IMAGE),gptq-api:cpu) $(VENV)/bin/python -m pytest tests/deploy/test_image.py
	$(VENV)/bin/python benchmarks/image.py --out benchmarks/results/image-cpu.json $(ARGS)

gpu: environment-dev
	$(VENV)/bin/python -m pytest -m gpu $(ARGS)
	$(VENV)/bin/python benchmarks/gemm.py --out benchmarks/results
	$(VENV)/bin/python benchmarks/sampler.py --out benchmarks/results
	$(VENV)/bin/python benchmarks/sanitize.py --out benchmarks/results
	$(VENV)/bin/python benchmarks/decode.py --synthetic llama-13b --out benchmarks/results

# The code that an A100 runs, compiled by the driver for the GPU that is here and launched as on an A100: the cards that
# GPTQ lives on, rehearsed on any newer one. GPTQ_API_ARCHS=89-virtual: as on a 4090.
gpu-portable: GPTQ_API_ARCHS ?= 80-virtual
gpu-portable: environment-dev
	rm -rf build/portable
	CMAKE_ARGS="-DGPTQ_API_ARCHS=$(GPTQ_API_ARCHS) -DGPTQ_API_HOPPER_ARCHS=" GPTQ_API_CUDA=on GPTQ_API_CPU=off \
	  $(VENV)/bin/python -m pip wheel --no-deps --wheel-dir build/portable .
	$(VENV)/bin/python -m zipfile -e build/portable/*.whl build/portable
	GPTQ_CUDA_MODULE=$$(ls $(abspath build/portable)/gptq_api/_cuda*.so) $(VENV)/bin/python -m pytest -m gpu $(ARGS)
	GPTQ_CUDA_MODULE=$$(ls $(abspath build/portable)/gptq_api/_cuda*.so) \
	  $(VENV)/bin/python benchmarks/sanitize.py --out benchmarks/results

# The environment, made or brought up to date by tools/install.py, which has nothing to do where it is.
.PHONY: environment environment-dev
environment environment-dev:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH: gptq-api needs Python 3.11 or newer," \
	  "and python3-venv where that is a package of its own"; exit 1; }
	@$(PYTHON) tools/install.py --venv $(VENV) $(OUR_PYTHON) $(if $(findstring dev,$@),--dev)

clean:
	rm -rf $(VENV) .clients .audit build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
