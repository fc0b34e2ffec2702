"""Shared by all benchmarks: the JSON's description of the run, the file, the table."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.documents import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = (":!benchmarks/results", ":!docs/*.svg", ":!configs/tiny-pair-tuned.yaml")  # excluded, in git's syntax
PACKAGES = ("vllm-easyspec", "vllm", "torch", "triton", "transformers")


def surroundings() -> dict[str, Any]:
    """Command, commit, versions and hardware of this run."""
    return {
        "command": _command(),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            # Not with torch.cuda: a process that has initialized CUDA can't fork vLLM's processes.
            "gpu": current_platform.get_device_name() if current_platform.is_cuda() else None,
        },
    }


def machine(run: dict[str, Any]) -> str:
    """The hardware of `surroundings` in words."""
    hardware = run["hardware"]
    return hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}"


def check_writable(path: Path | None) -> None:
    """Raise `BenchmarkError` before anything is measured if the result could not be saved."""
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        why = f"there is no folder {path.parent}. Make it, or name another file"
    elif path.is_dir():
        why = "it is a folder. Name a file"
    elif not os.access(folder, os.W_OK):
        why = f"files can't be made in {folder}. Name another file"
    else:
        return
    raise BenchmarkError(f"{path} can't be written: {why}")


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Save the result as JSON."""
    if path is not None:
        write_whole(path, json.dumps(result, indent=1) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell; None is a dash."""
    lines = [list(header), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def from_here(path: str) -> str:
    """A path inside the current folder, relative to it; any other path unchanged."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _command() -> str:
    """This run's command line: a script of the checkout by its path there, a command by its name."""
    program = Path(sys.argv[0]).resolve()
    if program.parent.name == "vllm_easyspec":  # python -m vllm_easyspec.cli
        name = "vllm-easyspec"
    elif program.suffix == ".py" and program.is_relative_to(ROOT):
        name = str(program.relative_to(ROOT))
    else:
        name = program.name
    return shlex.join([name, *sys.argv[1:]])


def _commit() -> str | None:
    """The checkout's commit, with a + if it has changes other than results.

    Without a checkout or git it is what `EASYSPEC_COMMIT` says, perhaps None.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return os.environ.get("EASYSPEC_COMMIT")
    commit = git("rev-parse", "HEAD")
    return f"{commit}+" if git("status", "--porcelain", "--untracked-files=no", "--", ".", *RESULTS) else commit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
