"""The build of the native operators, and that the package works without it and says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Prints what an operator gives, why there are no native ones, and the warning.
USE = """
import torch
from vllm_easyspec import ops
print(ops.prefix_sums(torch.ones(1, 2), torch.ones(3, 1, 2))[:, 0, 0].tolist(), ops.WHY_NOT_NATIVE)
ops.warn_without()
ops.warn_without()
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, with nothing built."""
    for name in ("csrc", "vllm_easyspec"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(folder, *arguments, **environment):
    # vLLM itself may be on the path.
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "WARNING"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def built(folder):
    return [path.name for path in (folder / "vllm_easyspec").glob("_native*.so")]


def test_without_a_compiler_the_build_goes_on_and_says_so(checkout):
    without_nvcc = {"PATH": "", "CUDA_HOME": "", "CUDA_PATH": ""}
    said = run(checkout, "setup.py", "build_ext", "--inplace", CXX="no-such-compiler", **without_nvcc)
    assert 'building extension "vllm_easyspec._native" failed' in said and "no-such-compiler" in said
    assert built(checkout) == []
    said = run(checkout, "-c", USE)
    assert "[2.0, 3.0, 4.0] they have not been built" in said
    assert said.count("native operators are not used, since they have not been built") == 1


def test_a_library_that_does_not_load_is_one_reason(checkout):
    (checkout / "vllm_easyspec" / "_native.abi3.so").write_text("no library")
    said = run(checkout, "-c", USE)
    assert "[2.0, 3.0, 4.0] they do not load: " in said
    assert said.count("native operators are not used, since they do not load") == 1


def test_an_older_processor_takes_its_own_build(native):
    """Of the two builds for x86-64 the tests run the one for this processor; here the other."""
    said = run(ROOT, "-c", USE, ATEN_CPU_CAPABILITY="avx2")
    assert "[2.0, 3.0, 4.0] None" in said


def test_kernels_include_nothing_of_torchs():
    """So that any machine with a compiler can build them."""
    for source in (ROOT / "csrc").iterdir():
        if source.suffix != ".cpp" and source.name not in ("binding.h", "product_binding.h"):
            assert "torch/" not in source.read_text()
