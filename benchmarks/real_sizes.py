"""Whole engines at a published size on a CPU: easyspec against vLLM's `draft_model` and no speculation, in turn.

A target of Qwen2.5 3B's shape and a drafter of Qwen2.5 0.5B's, in bfloat16, from `config.json` alone: weights are
random, so acceptance is vLLM's synthetic one, and only times count. Besides tokens per second, each drafting arm is
shown with the bytes per second that a rank reads from its share of the drafter, and the share of the floor that its
drafting stage reaches: the time that these bytes take at the memory's speed over the time measured.
"""

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from shapes import model_folder

from vllm_easyspec import plugin
from vllm_easyspec.bench import engine
from vllm_easyspec.bench.draft_step import read_bandwidth
from vllm_easyspec.bench.prompts import random_prompts
from vllm_easyspec.bench.results import surroundings, table, write
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.ranks import run_ranks

DRAFTER = "Qwen2.5-0.5B-Instruct"
TARGET_CHANGES = dict(  # Qwen2.5 3B
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    max_window_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
)
DRAFTS, ACCEPTANCE_LENGTH = 5, 4.0
INPUT_TOKENS, OUTPUT_TOKENS = 64, 32
INT8 = {"quantization": "int8_per_channel_weight_only"}
VOCABULARY = 32_768
# What each arm of easyspec adds to the configuration.
ARMS: dict[str, dict[str, Any]] = {
    "precise": {"layer_parallel": {"group_size": 1}},
    "easyspec": {},
    "int8": INT8,
    "int8 and vocabulary": INT8 | {"draft_vocabulary": VOCABULARY},
    "K = 0": {"num_speculative_tokens_per_batch_size": [[1, 64, 0]]},
}


def rank_bytes(folder: str, ranks: int, changes: dict[str, Any]) -> int:
    """What a rank reads of the drafter in a step: its share of the layers and of the LM head.

    changes: of an arm.
    """
    from transformers import AutoConfig

    shape = DrafterShape.from_hf_config(AutoConfig.from_pretrained(folder))
    layer = shape.attention_parameters() + 3 * shape.hidden_size * shape.intermediate_size
    numbers = shape.num_layers * layer + shape.hidden_size * changes.get("draft_vocabulary", shape.vocab_size)
    return numbers * (1 if "quantization" in changes else 2) // ranks


def _bandwidth() -> float:
    import torch

    return read_bandwidth(torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arms", default=",".join(["none", "draft_model", *ARMS]), help="of these, in this order")
    parser.add_argument("--concurrency", default="1,4")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    plugin.register()
    target, drafter = model_folder(DRAFTER, **TARGET_CHANGES), model_folder(DRAFTER)
    synthetic = dict(rejection_sample_method="synthetic", synthetic_acceptance_length=ACCEPTANCE_LENGTH)
    drafting = dict(model=drafter, num_speculative_tokens=DRAFTS) | synthetic
    configs = {"none": None, "draft_model": drafting | {"method": "draft_model"}}
    configs |= {name: drafting | {"method": "easyspec"} | changes for name, changes in ARMS.items()}
    configs = {name: configs[name] for name in args.arms.split(",")}

    levels = [int(level) for level in args.concurrency.split(",")]
    prompts = random_prompts(max(args.requests, 2 * max(levels)), INPUT_TOKENS, 100_000)
    workload = engine.Workload(prompts, levels, OUTPUT_TOKENS, args.requests)
    arguments = dict(
        tensor_parallel_size=args.ranks,
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=INPUT_TOKENS + OUTPUT_TOKENS + DRAFTS,
        max_num_seqs=max(levels),
        kv_cache_memory_bytes=1 << 29,
    )
    bandwidths = [min(run_ranks(args.ranks, _bandwidth))]
    result = surroundings() | {"settings": {name: str(value) for name, value in vars(args).items()}}

    def keep(measured: dict[str, Any]) -> None:
        arms = {
            name: arm | {"speculative_config": configs[name] and "see ARMS"} for name, arm in measured["arms"].items()
        }
        write(args.json, result | measured | {"arms": arms, "bandwidth": bandwidths})

    def say(line: str) -> None:
        print(line, flush=True)

    measured = engine.run(target, configs, workload, arguments, args.turns, keep, say)
    bandwidths.append(min(run_ranks(args.ranks, _bandwidth)))
    for row in measured["rows"]:
        if row["draft_ms"] is not None and row["arm"] != "K = 0":
            bytes_read = DRAFTS * rank_bytes(drafter, args.ranks, ARMS.get(row["arm"], {}))
            row["drafter_gb_per_s"] = round(bytes_read / row["draft_ms"] / 1e6, 2)
            row["share_of_floor"] = round(1e3 * bytes_read / median(bandwidths) / row["draft_ms"], 3)
    keep(measured)
    print(describe(measured, median(bandwidths)))


def describe(measured: dict[str, Any], bandwidth: float) -> str:
    header = (
        "arm",
        "concurrency",
        "tokens/s",
        "drafting ms",
        "of it calibrating",
        "verification ms",
        "GB/s",
        "of floor",
    )
    keys = ("arm", "concurrency", "tokens_a_second", "draft_ms", "calibrate_ms", "verify_ms", "drafter_gb_per_s")
    rows = [[row.get(key) for key in (*keys, "share_of_floor")] for row in measured["rows"]]
    return f"{table(header, rows)}\n\nA rank reads {bandwidth / 1e9:.1f} GB/s of memory while all do."


if __name__ == "__main__":
    main()
