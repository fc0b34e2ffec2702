# make install | demo | tune | test | lint | format | clean. Each does the set-up first where it is missing.
#
# TARGET       cuda or cpu; by itself cuda where nvidia-smi lists a GPU
# TORCH_INDEX  PyTorch's CPU wheel index, for a CPU host whose pip does not know one
# PYTHON       the Python that .venv is made of, 3.11 or newer; python3.11 where it exists, as the tests run on it
# ARGS         more arguments for pytest or the demo

TARGET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TARGET := $(TARGET)
TORCH_INDEX ?=
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed-$(TARGET)
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

.PHONY: install demo tune test lint format clean

install: $(INSTALLED)

# The project is installed editable: only its metadata and the tool that installs it call for another run.
$(INSTALLED): pyproject.toml setup.py tools/install.py $(wildcard cpu/*/pyproject.toml) | $(BIN)/pip
	$(BIN)/python tools/install.py $(TARGET) --torch-index="$(TORCH_INDEX)"
	touch $@

$(BIN)/pip:
	$(if $(PYTHON),,$(error no Python 3.11 or newer found as python3.11 or python3; name one: make install PYTHON=<path>))
	$(PYTHON) -m venv .venv

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(ARGS)

# The tiny pair's tuned configuration, from held-out prompts; ARGS may add a time budget and the like.
tune: $(INSTALLED)
	mkdir -p build
	$(BIN)/python examples/tiny-pair/held_out.py build/prompts.jsonl
	$(BIN)/vllm-easyspec tune --model examples/tiny-pair/target --config configs/tiny-pair.yaml \
		--prompts build/prompts.jsonl -o configs/tiny-pair-tuned.yaml --report build/tiny-pair-tuned.html \
		--json benchmarks/results/tune-cpu.json $(ARGS) -- --dtype float32 --max-model-len 1024 \
		--kv-cache-memory-bytes 256M --enforce-eager

test: $(INSTALLED)
	$(BIN)/pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

# Build outputs and caches. The set-up stays: delete .venv for a new one.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache cpu/*/build
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
