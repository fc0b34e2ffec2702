import os
import shutil

import pytest
import torch

from vllm_easyspec import ops

# The tests of operators run on this device; on a GPU host gpu-check runs them on both.
DEVICE = os.environ.get("EASYSPEC_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def device():
    """The device of tensors that name none."""
    with torch.device(DEVICE):
        yield DEVICE


@pytest.fixture
def native():
    """Skip if there is no compiler to build the native operators; if there is one, they must have been built."""
    if ops.WHY_NOT_NATIVE is not None and shutil.which("c++") is None:
        pytest.skip(f"no compiler, and no native operators: {ops.WHY_NOT_NATIVE}")
    assert ops.WHY_NOT_NATIVE is None


@pytest.fixture
def of_cpu():
    """For tests of the CPU kernels only."""
    if DEVICE != "cpu":
        pytest.skip("of the CPU's kernels")


@pytest.fixture
def of_gpu():
    """For tests of how CUDA kernels divide their work."""
    if DEVICE == "cpu":
        pytest.skip("of a GPU's kernels")
