# make install | demo | tune | test | bench | soak | gpu-check | gpu-rehearsal | lint | format | clean. Each does the
# set-up first where missing.
#
# TARGET       cuda or cpu; by default cuda if nvidia-smi lists a GPU
# TORCH_INDEX  PyTorch's CPU wheel index, for a CPU host whose pip does not know one
# PYTHON       the Python of .venv, 3.11 or newer; by default python3.11, which the tests run on, if it exists
# ARGS         more arguments for pytest, the demo, tune, gpu-check or gpu-rehearsal
# WORKERS      tests at once; by default 2, and on CUDA 0, which is one after the other: engines share the GPU
# RANKS, TUNED, TUNE_JSON    of make tune: ranks, and the files of its two results

TARGET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TARGET := $(TARGET)
TORCH_INDEX ?=
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed-$(TARGET)
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

# Some containers set it. Then each process of an engine would compile all of vLLM that it imports, since nothing is
# compiled at installation either.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo tune test bench soak gpu-check gpu-rehearsal lint lint-python lint-cuda format clean

install: $(INSTALLED)

# The project is installed editable: only its metadata, native sources and the installer require another run.
$(INSTALLED): pyproject.toml setup.py tools/install.py $(wildcard cpu/*/pyproject.toml) $(NATIVE) | $(BIN)/pip
	$(BIN)/python tools/install.py $(TARGET) --torch-index="$(TORCH_INDEX)"
	touch $@

$(BIN)/pip:
	$(if $(PYTHON),,$(error no Python 3.11 or newer found as python3.11 or python3; name one: make install PYTHON=<path>))
	$(PYTHON) -m venv .venv

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(ARGS)

# The tiny pair's tuned configuration, from held-out prompts; ARGS may add a time budget and the like.
RANKS ?= 2
TUNED ?= configs/tiny-pair-tuned.yaml
TUNE_JSON ?= benchmarks/results/tune-$(TARGET).json
tune: $(INSTALLED)
	mkdir -p build
	$(BIN)/python examples/tiny-pair/held_out.py build/held-out.jsonl
	$(BIN)/vllm-easyspec tune --model examples/tiny-pair/target --config configs/tiny-pair-lookahead.yaml \
		--prompts build/held-out.jsonl -o $(TUNED) --report build/tiny-pair-tuned.html \
		--json $(TUNE_JSON) --tensor-parallel-size $(RANKS) --batch-sizes 1,4,8 $(ARGS) \
		-- --dtype float32 --max-model-len 1024 --kv-cache-memory-bytes 256M --enforce-eager

# The quick loop: make test ARGS="-m 'not engine'"
WORKERS ?= $(if $(filter cpu,$(TARGET)),2,0)
test: $(INSTALLED)
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

# The CPU figures, on two otherwise idle cores; about 25 minutes.
RESULTS := benchmarks/results
BENCH := $(BIN)/vllm-easyspec bench
TINY_PAIR := --model examples/tiny-pair/target --config configs/tiny-pair.yaml --dtype float32 \
	--engine '{"kv_cache_memory_bytes": 268435456}'
bench: $(INSTALLED)
	$(BENCH) draft-step --drafter examples/tiny-pair/drafter --ranks 2 --plans 1-4-4-1 1-8-1 1-9 --batch 1,8 --context 256 \
		--json $(RESULTS)/draft-step-cpu.json --plot docs/draft-step-cpu.svg
	$(BIN)/python benchmarks/rounds.py --lookahead examples/tiny-pair/lookahead.safetensors \
		--json $(RESULTS)/rounds-cpu.json
	$(BIN)/python benchmarks/lookahead_cost.py --json $(RESULTS)/lookahead-cost-cpu.json
	mkdir -p build
	$(BIN)/python examples/tiny-pair/held_out.py build/held-out.jsonl
	$(BENCH) engine $(TINY_PAIR) --prompts build/held-out.jsonl --concurrency 1,4,16 --output-tokens 64 \
		--json $(RESULTS)/engine-cpu.json --plot docs/engine-cpu.svg
	$(BENCH) engine $(TINY_PAIR) --input-tokens 1900 --output-tokens 16 --concurrency 1 --requests 8 \
		--baselines none,draft_model --json $(RESULTS)/engine-long-prompts-cpu.json
	$(BIN)/python benchmarks/interpreted.py --json $(RESULTS)/interpreted-cpu.json

# Mixed requests on one and two ranks, then long fuzzing; about half an hour.
soak: $(INSTALLED)
	$(BIN)/python tools/soak.py --json $(RESULTS)/soak-$(TARGET).json $(ARGS)
	EASYSPEC_FUZZ_EXAMPLES=400 $(BIN)/pytest -q tests/unit/test_fuzzed_config.py tests/integration/test_fuzzed_rounds.py

gpu-check: $(INSTALLED)
	$(BIN)/python tools/gpu_check.py $(ARGS)

# gpu-check on stub libraries, without a GPU: 5 GB of packages, then some 50 minutes on two cores.
gpu-rehearsal:
	$(or $(PYTHON),python3) tools/gpu-rehearsal/rehearse.py $(ARGS)

lint: lint-python
	$(if $(shell command -v nvcc),$(MAKE) lint-cuda,@echo "lint: no nvcc, CUDA sources not compiled")

lint-python: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

# LINT_OLDEST_TORCH=required: fail where the headers of the oldest torch can't be fetched
lint-cuda: $(INSTALLED)
	PYTHON=$(BIN)/python tools/lint_cuda.sh

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Build outputs and caches. The installation stays: delete .venv for a new one.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache cpu/*/build
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
