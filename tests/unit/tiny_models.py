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


def with_other_tokens(folder: Path, renumbered: dict[int, int]) -> Path:
    """The folder's tokenizer with other ids for some tokens, of which each id must be given to one."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: renumbered.get(index, index) for token, index in vocabulary.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = renumbered.get(token["id"], token["id"])
    path.write_text(json.dumps(tokenizer))
    return folder


def easyspec(model: Path | str = DRAFTER, **changes: Any) -> dict[str, Any]:
    return {"method": "easyspec", "model": str(model), "num_speculative_tokens": 4, **changes}
