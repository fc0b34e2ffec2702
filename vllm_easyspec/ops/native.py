"""The native kernels (csrc/), which stand in for the references on the devices that they were built for."""

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def load() -> str | None:
    """Put the native kernels in the place of the references. Returns why there are none, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() == "x86_64" and capability == "DEFAULT":
        return "this processor has no AVX2"
    on_gpu = torch.version.cuda or torch.version.hip
    # With a GPU one build contains everything; an AVX-512 build may be left over.
    names = ["_native_avx512", "_native"] if capability == "AVX512" and not on_gpu else ["_native"]
    built = [path for name in names for path in Path(__file__).parents[1].glob(f"{name}.*so")]
    if not built:
        return "they have not been built"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return f"they do not load: {error}"
    if on_gpu and not torch._C._dispatch_has_kernel_for_dispatch_key("vllm_easyspec::group_rms_norm", "CUDA"):
        return "they were built without nvcc, for the CPU only"
    return None


def warn_without() -> None:
    """Say once why this process has no native operators, where it has none."""
    if (why := load()) is not None:
        from vllm.logger import init_logger  # not above: `doctor` needs this module, and importing vLLM takes seconds

        init_logger("vllm.easyspec").warning_once(
            "native operators are not used, since %s. Drafting runs on plain torch, slower. To build them, install a "
            "C++ compiler (on a GPU host nvcc too) and then vllm-easyspec again with pip's --no-build-isolation",
            why,
        )
