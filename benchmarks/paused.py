"""K = 0 at every batch size against no speculation: tokens per second by wall-clock, engines in turn, one after
another.

The tiny pair, held-out prompts, greedy, float32, one rank.
"""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from rounds import PAIR, held_out_ids
from vllm.engine.arg_utils import EngineArgs

from vllm_easyspec import plugin
from vllm_easyspec.tune.requests import AskedEngine
from vllm_easyspec.tune.trials import Trials

SIZES, TOKENS, TURNS = (1, 8), 64, 2


def main() -> None:
    plugin.register()
    prompts = [{"prompt_token_ids": ids} for ids in held_out_ids(48, 64)]
    trials = Trials(prompts, max(SIZES), 1, TOKENS)
    paused = {
        "method": "easyspec",
        "model": str(PAIR / "drafter"),
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [[1, 16, 0]],
    }
    for name, config in (("no speculation", None), ("K = 0", paused)) * 2:
        arguments = EngineArgs(
            model=str(PAIR / "target"),
            dtype="float32",
            max_model_len=1024,
            kv_cache_memory_bytes=1 << 28,
            enforce_eager=True,
            max_num_seqs=max(SIZES),
            disable_log_stats=True,
            speculative_config=config,
        )
        with AskedEngine(arguments, in_process=False) as engine:
            rates = {size: round(trials.wall_rate(engine, size, TURNS), 1) for size in SIZES}
        print(name, {f"batch size {size}": f"{rate} tokens/s" for size, rate in rates.items()}, flush=True)


if __name__ == "__main__":
    main()
