import os
import shutil

import pytest
import torch

from vllm_easyspec import ops

# The tests of operators run on this device; on a GPU host gpu-check runs them on both.
DEVICE = os.environ.get("EASYSPEC_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def device():
    """Where tensors are made that name no device."""
    with torch.device(DEVICE):
        yield DEVICE


@pytest.fixture
def native():
    """Skips where there is no compiler to build the native operators with; where there is one, they must be there."""
    if ops.WHY_NOT_NATIVE is not None and shutil.which("c++") is None:
        pytest.skip(f"no compiler, and no native operators: {ops.WHY_NOT_NATIVE}")
    assert ops.WHY_NOT_NATIVE is None


@pytest.fixture
def of_cpu():
    """For a test of the kernels of the CPU alone."""
    if DEVICE != "cpu":
        pytest.skip("of the CPU's kernels")


@pytest.fixture
def of_gpu():
    """For a test of how CUDA's kernels share their work."""
    if DEVICE == "cpu":
        pytest.skip("of a GPU's kernels")
