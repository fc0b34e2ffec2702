# make install | demo | test | gpu-check | lint | format | clean. Each does the set-up first where it is missing.
#
# TARGET       cuda or cpu; by itself cuda where nvidia-smi lists a GPU
# TORCH_INDEX  PyTorch's CPU wheel index, for a CPU host whose pip does not know one
# PYTHON       the Python that .venv is made of, 3.11 or newer; python3.11 where it exists, as the tests run on it
# ARGS         more arguments for pytest, the demo or gpu-check

TARGET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TARGET := $(TARGET)
TORCH_INDEX ?=
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed-$(TARGET)
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

.PHONY: install demo test gpu-check lint format clean

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

test: $(INSTALLED)
	$(BIN)/pytest $(ARGS)

gpu-check: $(INSTALLED)
	$(BIN)/python tools/gpu_check.py $(ARGS)

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
