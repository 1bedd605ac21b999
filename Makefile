# Everything that a person or CI does with a checkout. Every target can be run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU wheels of torch, where no package source that pip already knows has one.
TORCH_VERSION ?= 2.13.0
# What compiles and interprets the Triton kernels where torch's own build brings none.
TRITON_VERSION ?= 3.6.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
QUICKSTART := recipes/emoji_quickstart.yaml
OPERATORS := contrastive packed_attention moe_routing fp8_cast image_normalize

.PHONY: help install install-dev quickstart test asan lint bench-cpu bench-table bench-env bench-peers bench-decode bench-scaling parity prove-kill prove-fp8 prove-duplicates prove-curation prove-data prove-sets fuzz-decode clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# CUDA torch where there is an NVIDIA driver, CPU torch elsewhere. A CPU build comes from the package
# sources that pip is set up with, or from PyTorch's own index.
$(VENV)/.torch: $(BIN)/python
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then echo "torch is there"; \
	elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install -q "torch==$(TORCH_VERSION)"; \
	else \
	  $(BIN)/pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(BIN)/pip install -q "torch==$(TORCH_VERSION)+cpu" --index-url $(TORCH_CPU_INDEX); \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja
	$(BIN)/pip install -q --no-build-isolation -e .
	@touch $@

install: $(VENV)/.installed  ## make .venv, install torch and Carillon, build the extension

$(VENV)/.installed-dev: $(VENV)/.installed Makefile
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	@$(BIN)/python -c 'import triton' 2>/dev/null \
	|| $(BIN)/pip install -q --no-deps "triton==$(TRITON_VERSION)"
	@touch $@

install-dev: $(VENV)/.installed-dev  ## install, with what tests and linters need

quickstart: install  ## data, five minutes of training, a recall table and pictures
	@$(BIN)/python recipes/quickstart.py $(QUICKSTART)

test: install-dev  ## lint, types and the whole CPU suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

asan: install-dev  ## the CPU operators' tests under AddressSanitizer and UBSan (3 minutes)
	bash tests/kernels/sanitizers/run.sh $(BIN)/python

lint: install-dev  ## format and lint in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# The operators against every peer that runs on a CPU, on one torch; some twelve minutes on two cores.
bench-cpu: bench-env  ## speed and memory of the operators: a table with the bars (JSON, PNG)
	@set -e; for op in $(OPERATORS); do \
	  .venv-bench/bin/python -m pytest -c benchmarks/pytest.ini benchmarks/test_$$op.py \
	    --benchmark-quiet --benchmark-json=benchmarks/results/$$op.json; \
	done
	@.venv-bench/bin/python benchmarks/plots.py
	@$(PYTHON) benchmarks/table.py

bench-table:  ## that table from the results in the checkout
	@$(PYTHON) benchmarks/table.py

# Against OpenCLIP, webdataset and a bare loop, on Flickr8k and the emoji set; about half an hour.
bench-peers: bench-env  ## speed and final loss against peers (JSON in benchmarks/results)
	.venv-bench/bin/python -m pytest -c benchmarks/pytest.ini benchmarks/test_loader.py \
	  --benchmark-json=benchmarks/results/loader.json
	.venv-bench/bin/python -m pytest -c benchmarks/pytest.ini benchmarks/test_training.py \
	  --benchmark-json=benchmarks/results/training.json
	.venv-bench/bin/python benchmarks/convergence.py
	.venv-bench/bin/python benchmarks/contrastive_training.py

# Decoding against other loaders and libraries; torchcodec needs Debian's ffmpeg (4 to 8) beside it.
bench-decode: bench-env  ## pictures, sound and video to tensors per core second, against peers (JSON)
	@set -e; for part in pictures sound video; do \
	  .venv-bench/bin/python -m pytest -c benchmarks/pytest.ini benchmarks/test_decode.py \
	    -k test_$$part --benchmark-json=benchmarks/results/decode_$$part.json; \
	done

bench-scaling: install-dev  ## two processes on two cores against one, and balance (JSON; quarter of an hour)
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/balance.py

bench-env:  ## a second environment with the peers that benchmarks compare with
	bash benchmarks/environment.sh

parity: install-dev  ## every layout's step against one process's: writes docs/parity.md (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m carillon.engine.train.parity --out docs/parity.md

prove-kill: install-dev  ## kill and resume small runs sixty times: nothing is lost (strace, 20 minutes)
	$(BIN)/python benchmarks/prove_durable.py
	$(BIN)/python benchmarks/prove_kill.py

prove-fp8: install-dev  ## final loss of fp8 against bf16, three seeds of 300 steps (half an hour)
	$(BIN)/python benchmarks/prove_fp8.py

prove-sets: install-dev  ## build all real data sets from their packages; draws docs/pictures (quarter of an hour)
	$(BIN)/python benchmarks/prove_sets.py

prove-duplicates: install-dev  ## how many planted duplicates curation finds (JSON; two minutes)
	$(BIN)/python benchmarks/prove_duplicates.py

prove-curation: install-dev  ## speed, kills and Ray Data: the same kept set (JSON; four minutes)
	$(BIN)/pip install -q -e ".[ray]" --no-build-isolation
	$(BIN)/python benchmarks/prove_curation.py

prove-data: install-dev  ## from URLs and a store to trained runs, killed at every stage (ten minutes)
	$(BIN)/python benchmarks/prove_data.py

# Damaged pictures, sounds and videos. A decoder that crashes leaves its file in build/fuzz-last.
FUZZ_EXAMPLES ?= 20000
fuzz-decode: install-dev  ## damage thousands of files for the decoders (some three minutes)
	@mkdir -p build
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_LAST=build/fuzz-last $(BIN)/python -m pytest -q \
	  --timeout 3600 tests/engine/data/decode/test_fuzz.py

clean:  ## remove build products (not runs, data or .venv)
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
