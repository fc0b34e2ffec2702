"""Writes prompts of the tiny pair's held-out text, for `vllm-easyspec bench engine --prompts`."""

import argparse
import json
from pathlib import Path

from rounds import held_out_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a prompt")
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": ids}) for ids in held_out_prompts(args.prompts, args.tokens)]
    args.file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
