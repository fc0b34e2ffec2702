import shutil

import pytest

from vllm_easyspec import ops


@pytest.fixture
def native():
    """Skips where there is no compiler to build the native operators with; where there is one, they must be there."""
    if ops.WHY_NOT_NATIVE is not None and shutil.which("c++") is None:
        pytest.skip(f"no compiler, and no native operators: {ops.WHY_NOT_NATIVE}")
    assert ops.WHY_NOT_NATIVE is None
