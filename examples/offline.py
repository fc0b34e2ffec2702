"""A batch through `LLM.generate`, without a server.

usage: offline.py [ranks]
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import threading\n\nclass Worker(threading.Thread):\n",
    "for name in os.listdir(path):\n",
    "def test_",
]


def main() -> None:
    llm = LLM(
        str(ROOT / "examples/tiny-pair/target"),
        speculative_config=str(ROOT / "configs/tiny-pair.yaml"),
        tensor_parallel_size=int(sys.argv[1]) if len(sys.argv) > 1 else 1,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    for result in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48)):
        print("---", result.prompt, result.outputs[0].text, sep="\n")
    first_rank = llm.collective_rpc("easyspec_stats")[0]
    print(
        f"---\n{first_rank['tokens_a_round']:.2f} tokens per round, acceptance by position: {first_rank['acceptance']}"
    )


if __name__ == "__main__":  # vLLM's worker processes import this file again
    main()
