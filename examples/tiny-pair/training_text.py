#!/usr/bin/env python3
"""Write the tiny pair's training text, one JSON line per file, for `vllm-easyspec fit`, without the held-out files.

usage: training_text.py FILE.jsonl
"""

import json
import sys
from pathlib import Path

from train import standard_library_texts


def main():
    report = json.loads((Path(__file__).parent / "report.json").read_text())
    held_out = set(report["held_out_files"])
    lines = [json.dumps({"text": text}) for path, text in standard_library_texts() if path not in held_out]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
