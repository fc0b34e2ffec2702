"""The CUDA path without a GPU: real vLLM, torch, Triton and CUDA graphs on stub libraries whose kernels do nothing.

`rehearse.py` creates what is missing of its environment in `.gpu-rehearsal/` (5 GB: CUDA's torch 2.11, the pruned vLLM
of tools/offline-bundle, the stubs, this project's extension), then starts engines and drafters and captures their
graphs. Values mean nothing, and no request is answered, since kernels that do nothing sample nothing. What it shows is
every exception on the way to the first request: a module missing in the bundle, a wrong shape or argument of a launch,
a host synchronization during graph capture (the stubs print FAULT), a plan whose graphs are not captured.

Exit code 1 if a part failed. It needs Python 3.12, gcc, xz and a CUDA 13 toolkit.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HOME = ROOT / ".gpu-rehearsal"
TORCH = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0")
# What else a GPU host's image has, as far as vLLM imports it.
PACKAGES = (
    "pytest pytest-timeout scipy setuptools wheel psutil prometheus-client fastapi uvicorn uvloop aiohttp cloudpickle "
    "pillow protobuf einops requests py-cpuinfo sentencepiece tiktoken pyzmq numba six nvidia-ml-py cachetools ninja "
    "regex"
).split()
STUBS = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libnvidia-ml.so.1")

ENGINE = """
import json, os, sys
from vllm import LLM
from vllm_easyspec.drafter import weights

weights._check_finite = lambda model: None  # of kernels that do nothing, sums are whatever lay in memory
pair, arguments = sys.argv[1], json.loads(sys.argv[2])
spec = dict(method="easyspec", model=f"{pair}/drafter", num_speculative_tokens=5) | arguments.pop("spec", {})
shared = dict(max_model_len=512, max_num_seqs=16, gpu_memory_utilization=0.3, disable_log_stats=True)
llm = LLM(f"{pair}/target", speculative_config=spec, **shared, **arguments)
if spec["method"] == "easyspec" and not arguments.get("enforce_eager"):
    before = llm.collective_rpc("easyspec_stats")[0]["graphs"]["captured"]
    llm.collective_rpc("easyspec_configure", kwargs=dict(scope="block", plan="1-8-1"))
    llm.collective_rpc("easyspec_capture", kwargs=dict(batch_sizes=[1, 6], num_speculative_tokens=[5]))
    captured = llm.collective_rpc("easyspec_stats")[0]["graphs"]["captured"]
    print(f"{before} graphs captured at start, {captured - before} after a change of plan", flush=True)
    assert before and captured > before, "no graphs were captured"
os._exit(0)  # what the stubs hold need not be taken down in order
"""
STEP = """
import sys
from vllm_easyspec.bench.draft_step import measure

rows = measure(sys.argv[1], 1, None, [1, 8], [256], dtype="bfloat16", load_format="dummy", repetitions=2)
print(len(rows), "cases replayed from graphs", flush=True)
"""


def parts() -> dict[str, tuple[str, str]]:
    """Program and arguments of each part."""
    bf16, f32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
    flash, triton = ({"attention_config": {"backend": name}} for name in ("FLASH_ATTN", "TRITON_ATTN"))
    tables = {"layer_parallel": {"plan": "1-4-4-1", "by_batch_size": [{"up_to": 4, "scope": "block", "plan": "1-8-1"}]}}
    by_size = {"num_speculative_tokens_per_batch_size": [[1, 4, 5], [5, 8, 2], [9, 16, 0]]}
    maps = {"lookahead": str(ROOT / "examples" / "tiny-pair" / "lookahead.safetensors")}
    engines = {
        "eager": f32 | triton | {"enforce_eager": True},
        "float32-triton": f32 | triton,
        "bfloat16-flash": bf16 | flash,
        "sampled-drafts": bf16 | flash | {"spec": {"draft_sample_method": "probabilistic"}},
        "k-by-batch-size": bf16 | flash | {"spec": by_size},
        "plans-by-batch-size": bf16 | flash | {"spec": tables},
        "lookahead": bf16 | flash | {"spec": maps},
        "quantized": bf16 | flash | {"spec": {"quantization": "int8_per_channel_weight_only", "draft_vocabulary": 256}},
        "draft-model": bf16 | flash | {"spec": {"method": "draft_model"}},
    }
    pair, shapes = ROOT / "examples" / "tiny-pair", ROOT / "tests" / "fixtures" / "hf_configs"
    found = {name: (ENGINE, f"{pair}\n{json.dumps(arguments)}") for name, arguments in engines.items()}
    return found | {"draft-step": (STEP, str(shapes / "Qwen2.5-0.5B-Instruct"))}


def run(*command: object, **environment: str) -> None:
    print("rehearsal:", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, env=os.environ | environment)


def python_3_12() -> str:
    """The GPU host's version. pyenv puts a `python3.12` on the path that fails where another version is selected."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python"), reverse=True)
    for candidate in ("python3.12", *map(str, pyenv)):
        with contextlib.suppress(OSError):
            if not subprocess.run([candidate, "-c", ""], stderr=subprocess.DEVNULL).returncode:
                return candidate
    sys.exit("rehearsal: no Python 3.12, the GPU host's version. Install it as python3.12, or with pyenv")


def set_up() -> None:
    """Create what is missing."""
    HOME.mkdir(exist_ok=True)
    python = HOME / "venv" / "bin" / "python"
    if not (HOME / "installed").exists():
        run(python_3_12(), "-m", "venv", HOME / "venv")
        run(python, "-m", "pip", "install", "-q", *TORCH, *PACKAGES)
        run(python, "-m", "pip", "install", "-q", "--no-deps", "torchvision==0.26.0")
        (HOME / "installed").touch()
    if not (HOME / "site" / "vllm").is_dir():
        run(ROOT / "tools" / "offline-bundle" / "make-bundle", HOME)
        (HOME / "site").mkdir(exist_ok=True)
        run("tar", "-xJf", HOME / "site.tar.xz", "-C", HOME / "site")
    shutil.copytree(HERE, HOME / "stubs", dirs_exist_ok=True)
    run("make", "-s", "-C", HOME / "stubs")
    # The project as a GPU host builds it, except for the CUDA runtime, which must be the stubs'.
    project = HOME / "project"
    shutil.rmtree(project, ignore_errors=True)
    for folder in ("csrc", "vllm_easyspec"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    setup = f"cd '{project}' && '{python}' setup.py -q egg_info build_ext --inplace"
    # NVCC_APPEND_FLAGS is nvcc's own variable.
    flags = {"EASYSPEC_NATIVE": "required", "EASYSPEC_NVCC_ARCH": "sm_90", "NVCC_APPEND_FLAGS": "-cudart=shared"}
    run("sh", "-c", setup, **flags)


def rehearse(name: str, program: str, arguments: str, seconds: float) -> str:
    """The part's outcome; its output goes to `.gpu-rehearsal/NAME.log`."""
    stubs = HOME / "stubs" / "lib"
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(stubs),
        "LD_PRELOAD": " ".join(str(stubs / library) for library in STUBS),
        "TRITON_LIBCUDA_PATH": str(stubs),
        "PYTHONPATH": os.pathsep.join(map(str, (HOME / "project", HOME / "site"))),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    script = HOME / f"{name}.py"
    # vLLM's processes import the main module again.
    script.write_text(
        "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in program.strip().splitlines())
    )
    command = [HOME / "venv" / "bin" / "python", script, *arguments.split("\n")]
    log = HOME / f"{name}.log"
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, cwd=HOME / "project"
            )
        except subprocess.TimeoutExpired:
            return f"no end after {seconds:.0f} s"
    text = log.read_text(errors="replace")
    if "FAULT" in text:
        return next(line for line in text.splitlines() if "FAULT" in line)
    last = text.strip().splitlines()[-1:]
    return "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = parts()
    parser.add_argument("--only", nargs="+", choices=list(known), metavar="PART", default=list(known))
    parser.add_argument("--seconds", type=float, default=400, help="the limit of a part")
    args = parser.parse_args()
    set_up()
    outcomes = {}
    for name in args.only:
        began = time.monotonic()
        outcomes[name] = rehearse(name, *known[name], args.seconds)
        print(f"{name} | {time.monotonic() - began:.0f} s | {outcomes[name]}", flush=True)
    return int(any(outcome != "passed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
