"""The CUDA path without a GPU: real vLLM, torch, Triton and CUDA graphs on stub libraries whose kernels do nothing.

`rehearse.py` creates what is missing of its environment in `.gpu-rehearsal/` (5 GB: CUDA's torch 2.11, the pruned vLLM
of tools/offline-bundle, the stubs, a copy of this project), then runs gpu-check's own parts, by `tools/gpu_check.py`
itself, and engines with settings that gpu-check doesn't have. Values mean nothing: `steering/` writes the numbers by
which the host advances, and comparisons of values count as passed. What it shows is every other exception: a module
missing in the bundle, a file missing in the checkout, a wrong shape or argument of a launch, a host synchronization
during graph capture (the stubs end the process with a line FAULT), a round that drafts without a graph.

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
PROJECT = HOME / "project"
NATIVE = PROJECT / "vllm_easyspec" / "_native.abi3.so"
TORCH = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0")
# What else a GPU host's image has, as far as vLLM imports it.
PACKAGES = (
    "pytest pytest-timeout scipy setuptools wheel psutil prometheus-client fastapi uvicorn uvloop aiohttp cloudpickle "
    "pillow protobuf einops requests py-cpuinfo sentencepiece tiktoken pyzmq numba six nvidia-ml-py cachetools ninja "
    "regex"
).split()
STUBS = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libnvidia-ml.so.1")

# gpu-check, with other limits: a part may take longer on a few cores, and only two small engines start together.
CHECK = """
import sys
from dataclasses import replace

sys.path.insert(0, "tools")
import gpu_check

known, seconds = gpu_check.parts, float(sys.argv.pop(1))
gpu_check.parts = lambda device: [replace(part, most_s=seconds) for part in known(device)]
gpu_check.device_gib = lambda device: 18
sys.exit(gpu_check.main())
"""
ENGINE = """
import json, os, sys
from vllm import LLM, SamplingParams

pair, arguments = sys.argv[1], json.loads(sys.argv[2])
temperature, pauses = arguments.pop("temperature", 0), arguments.pop("pauses", False)
spec = dict(method="easyspec", model=f"{pair}/drafter", num_speculative_tokens=5) | arguments
llm = LLM(f"{pair}/target", speculative_config=spec, dtype="bfloat16", attention_config={"backend": "FLASH_ATTN"},
          max_model_len=512, max_num_seqs=16, num_gpu_blocks_override=1024, async_scheduling=True)
for requests in (1, 6, 16):
    params = [SamplingParams(temperature=temperature, max_tokens=20 + 4 * i, ignore_eos=True) for i in range(requests)]
    outs = llm.generate(["import os"] * requests, params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outs] == [each.max_tokens for each in params]
counted = llm.collective_rpc("easyspec_stats")[0]
print({name: counted[name] for name in ("rounds", "paused_rounds", "caught_up_tokens", "graphs")}, flush=True)
drafted = counted["rounds"] - counted["paused_rounds"]
assert not counted["graphs"]["eager_rounds"], "rounds drafted without graphs"
assert counted["graphs"]["replays"] > drafted > 0, "no calibration was replayed from a graph"
assert (counted["paused_rounds"] > 0) == (counted["caught_up_tokens"] > 0) == pauses
os._exit(0)  # what the stubs hold need not be taken down in order
"""
STEP = """
import sys
from vllm_easyspec.bench.draft_step import measure

rows = measure(sys.argv[1], 1, None, [1, 8], [256], dtype="bfloat16", load_format="dummy", repetitions=2)
print(len(rows), "cases replayed from graphs", flush=True)
"""


def parts() -> dict[str, tuple[str, str]]:
    """Program and arguments of each part that gpu-check doesn't have."""
    tables = {"layer_parallel": {"plan": "1-4-4-1", "by_batch_size": [{"up_to": 4, "scope": "block", "plan": "1-8-1"}]}}
    by_size = {"num_speculative_tokens_per_batch_size": [[1, 4, 5], [5, 8, 2], [9, 16, 0]]}
    engines = {
        "sampled-drafts": {"draft_sample_method": "probabilistic", "temperature": 1},
        "k-by-batch-size": by_size | {"pauses": True},
        "plans-by-batch-size": tables,
        "lookahead": {"lookahead": str(ROOT / "examples" / "tiny-pair" / "lookahead.safetensors")},
        "adaptive-verification": {"enable_adaptive_verification": True},
        "quantized": {"quantization": "int8_per_channel_weight_only", "draft_vocabulary": 256},
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


def is_built() -> bool:
    """Whether the operators have been built from the present sources."""
    sources = [ROOT / "setup.py", *(ROOT / "csrc").iterdir()]
    return NATIVE.exists() and all(NATIVE.stat().st_mtime > file.stat().st_mtime for file in sources)


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
    # What a checkout holds, so that a part that needs another file fails here too, and what was built from it.
    built = NATIVE.rename(HOME / NATIVE.name) if is_built() else None
    shutil.rmtree(PROJECT, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (PROJECT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, PROJECT / name)
    if built:
        built.rename(NATIVE)
    run("sh", "-c", f"cd '{PROJECT}' && '{python}' setup.py -q egg_info")
    # vLLM finds plugins by a distribution's metadata.
    metadata = HOME / "stubs" / "steering" / "easyspec_rehearsal-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: easyspec-rehearsal\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nrehearsal = steer:register\n")


def environment() -> dict[str, str]:
    """Of every part: docs/gpu-check.md's for a host without network, and the stubs."""
    stubs = HOME / "stubs" / "lib"
    return os.environ | {
        "LD_LIBRARY_PATH": str(stubs),
        "LD_PRELOAD": " ".join(str(stubs / library) for library in STUBS),
        "TRITON_LIBCUDA_PATH": str(stubs),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPYCACHEPREFIX": str(HOME / "pyc"),
        "PYTHONPATH": os.pathsep.join(map(str, (PROJECT, HOME / "site", HOME / "stubs" / "steering"))),
        "PYTEST_ADDOPTS": "-p accept_comparisons",
        "EASYSPEC_NVCC_ARCH": "sm_90",
        # The CUDA runtime must be the stubs'. This is nvcc's own variable.
        "NVCC_APPEND_FLAGS": "-cudart=shared",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def check(names: list[str], seconds: float) -> dict[str, str]:
    """The outcomes of gpu-check's parts, all of them if there are no `names`."""
    results, script = HOME / "results", HOME / "gpu-check.py"
    shutil.rmtree(results, ignore_errors=True)
    script.write_text(CHECK)
    command = [HOME / "venv" / "bin" / "python", script, str(seconds), "--jobs", "1", "--budget", "1e9"]
    command += ["--results", results, *(["--only", *names] if names else [])]
    done = subprocess.run(command, env=environment(), cwd=PROJECT)
    found = [json.loads(file.read_text()) for file in results.glob("gpu-*.json")]
    outcomes = dict.fromkeys(names, "not run") | {each["part"]: each["outcome"] for each in found if "part" in each}
    return outcomes | ({"gpu-check": f"exit code {done.returncode}"} if done.returncode else {})


def rehearse(name: str, program: str, arguments: str, seconds: float) -> str:
    """The part's outcome; its output goes to `.gpu-rehearsal/NAME.log`."""
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
                command, env=environment(), stdout=output, stderr=subprocess.STDOUT, timeout=seconds, cwd=PROJECT
            )
        except subprocess.TimeoutExpired:
            return f"no end after {seconds:.0f} s"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parts()
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"parts of gpu-check, or {' '.join(own)}")
    parser.add_argument("--seconds", type=float, default=1800, help="the limit of a part")
    args = parser.parse_args()
    set_up()
    chosen = [name for name in args.only or () if name not in own]
    if args.only and not is_built() and "build" not in chosen:
        chosen.append("build")  # it runs first
    outcomes = check(chosen, args.seconds) if chosen or not args.only else {}
    for name in args.only or own:
        if name in own:
            began = time.monotonic()
            outcomes[name] = rehearse(name, *own[name], args.seconds)
            print(f"{name} | {time.monotonic() - began:.0f} s | {outcomes[name]}", flush=True)
    failed = {name: outcome for name, outcome in outcomes.items() if not outcome.startswith(("passed", "skipped"))}
    print("\n".join(f"{name}: {outcome}" for name, outcome in failed.items()) or "rehearsal: every part passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
