"""Model folders for tests that read configurations only: no weights."""

import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "examples" / "tiny-pair" / "target"
DRAFTER = ROOT / "examples" / "tiny-pair" / "drafter"
HF_CONFIGS = ROOT / "tests" / "fixtures" / "hf_configs"
CONFIGS = ROOT / "configs"


def model_folder(path: Path, like: Path = DRAFTER, tokenizer: bool = True, **changes: Any) -> Path:
    """A copy of a model's configuration, and of its tokenizer, with some fields changed; None removes a field."""
    path.mkdir(parents=True)
    config = json.loads((like / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(like / name, path)
    return path


def easyspec(model: Path | str = DRAFTER, **changes: Any) -> dict[str, Any]:
    return {"method": "easyspec", "model": str(model), "num_speculative_tokens": 4, **changes}
