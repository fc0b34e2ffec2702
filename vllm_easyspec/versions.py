"""Which vLLM versions easyspec runs on, and what is installed here."""

import runpy
import sys
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.version import InvalidVersion, Version

SUPPORTED = ">=0.32,<0.34"


class UnsupportedVllmError(RuntimeError):
    """easyspec was asked for on an unsupported vLLM."""


class Support(Enum):
    """How far a version of vLLM is supported."""

    TESTED = "run and tested"
    CHECKED = "checked against its sources, not run"
    UNSUPPORTED = "not supported"

    @classmethod
    def of(cls, version: str) -> "Support":
        """Development builds count as the release they precede; an unreadable version is unsupported."""
        try:
            parsed = Version(version)
        except InvalidVersion:
            return cls.UNSUPPORTED
        return {(0, 32): cls.TESTED, (0, 33): cls.CHECKED}.get((parsed.major, parsed.minor), cls.UNSUPPORTED)


def vllm_version() -> str:
    """The version that vLLM itself reports; a source build without one reports 'dev'."""
    found = None if "vllm" in sys.modules else find_spec("vllm")
    if found and found.origin and (file := Path(found.origin).with_name("_version.py")).is_file():
        return runpy.run_path(str(file))["__version__"]  # importing vLLM takes seconds
    import vllm.version

    return vllm.version.__version__


def require_supported(version: str) -> None:
    """Raise `UnsupportedVllmError` for an unsupported vLLM."""
    if Support.of(version) is Support.UNSUPPORTED:
        raise UnsupportedVllmError(
            f"method: easyspec needs vLLM {SUPPORTED}, but vLLM {version} is installed. "
            "Install such a vLLM (pip install 'vllm>=0.32,<0.34'), a vllm-easyspec made for yours, "
            "or use vLLM's own method: draft_model"
        )


def installed(distribution: str) -> str:
    """Version of an installed distribution, or 'not installed'."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
