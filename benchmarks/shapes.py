"""Published model shapes as folders that hold a `config.json` and nothing else, for engines with dummy weights."""

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

from vllm_easyspec.documents import write_whole

SHAPES = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "hf_configs"


def model_folder(name: str, **changes: Any) -> str:
    """The published configuration `name`, with some fields changed.

    It is kept, under a name for its content: vLLM's compile caches identify a model by its folder.
    """
    text = json.dumps(json.loads((SHAPES / name / "config.json").read_text()) | changes)
    folder = Path(tempfile.gettempdir()) / "easyspec-shapes" / f"{name}-{zlib.crc32(text.encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", text)
    return str(folder)
