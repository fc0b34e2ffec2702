"""Checks of a drafter's safetensors files, from their headers, before anything is loaded."""

import json
import struct
from pathlib import Path
from typing import Any

from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.weights import expected_shapes
from vllm_easyspec.errors import ConfigError

LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
GET_AGAIN = "Get the file again"


def check_files(folder: Path, shape: DrafterShape) -> None:
    """Raise `ConfigError`, which names file and tensor, for a truncated file or a tensor of a wrong shape.

    folder: of the checkpoint; without safetensors files in it, nothing is checked.
    """
    expected = dict(expected_shapes(shape))
    for path in sorted(folder.glob("*.safetensors")):
        for name, found in read_header(path).items():
            wanted = expected.get(name.removeprefix("model."))
            if wanted is not None and found != wanted:
                raise ConfigError(
                    f"{path}: {name!r} has shape {list(found)}, but config.json asks for {list(wanted)}. Check that "
                    "both are of one model"
                )


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file. Raises `ConfigError` for one that is cut short or isn't one."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LARGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ConfigError(f"{path} is not a whole safetensors file: {error}. {GET_AGAIN}") from error
    if size < end:
        raise ConfigError(f"{path} is cut short: {size:,} of {end:,} bytes are there. {GET_AGAIN}")
    return shapes
