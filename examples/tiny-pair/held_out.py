"""Held-out prompts for the tiny pair, as JSON lines: pieces of the files that its training left out.

usage: held_out.py FILE [--count 48] [--tokens 64] [--offset 0]
"""

import argparse
import json
import sysconfig
from pathlib import Path

from transformers import AutoTokenizer

PAIR = Path(__file__).resolve().parent
STRIDE = 6  # every sixth piece of the held-out text is a prompt


def held_out_ids(count: int, tokens: int, offset: int = 0) -> list[list[int]]:
    """`count` prompts of `tokens` ids, spread over the files. offset: 0 to 5, each of which gives different prompts."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / name for name in json.loads((PAIR / "report.json").read_text())["held_out_files"]]
    prompts = []
    for file in filter(Path.exists, files):  # later Pythons, and those of some distributions, lack a few
        text = file.read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(offset * tokens, len(ids) - tokens, STRIDE * tokens)
        prompts += [ids[start : start + tokens] for start in starts]
    return prompts[:: max(1, len(prompts) // count)][:count]


def held_out_prompts(count: int, tokens: int, offset: int = 0) -> list[str]:
    """The same as text, which may have a few tokens more or less when it is tokenized again."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    return [tokenizer.decode(ids) for ids in held_out_ids(count, tokens, offset)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--offset", type=int, default=0)
    args = parser.parse_args()
    prompts = held_out_prompts(args.count, args.tokens, args.offset)
    args.file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    print(f"{len(prompts)} prompts in {args.file}")


if __name__ == "__main__":
    main()
