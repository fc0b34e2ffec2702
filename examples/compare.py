"""A tuned configuration against the untuned one: in one engine, in turn, on held-out prompts that tuning has not seen.

Plan and K are each configuration's own for the batch size. Greedy, float32. `make demo` ends with it.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.engine.arg_utils import EngineArgs

from vllm_easyspec import plugin, support
from vllm_easyspec.bench.results import surroundings, write
from vllm_easyspec.config import EasySpecConfig, load
from vllm_easyspec.tune.planner import Point
from vllm_easyspec.tune.requests import TunedEngine
from vllm_easyspec.tune.trials import Pair, Trials, confirmed
from vllm_easyspec.tune.tuner import configured

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "examples" / "tiny-pair"
TOKENS = 64  # that each request generates


def compare(model: Path, untuned: Path, tuned: Path, ranks: int, sizes: list[int], turns: int) -> list[dict[str, Any]]:
    """One row for each batch size."""
    sys.path.insert(0, str(PAIR))
    from held_out import held_out_prompts

    plugin.register()
    configs = {"untuned": EasySpecConfig.parse(untuned), "tuned": EasySpecConfig.parse(tuned)}
    drafter = support.read_drafter(configs["tuned"].model, None)
    most = max(config.num_speculative_tokens for config in configs.values())
    arguments = EngineArgs(
        model=str(model),
        dtype="float32",
        tensor_parallel_size=ranks,
        max_model_len=1024,
        max_num_seqs=max(sizes),
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        speculative_config=load(tuned) | {"num_speculative_tokens": max(2, most)},
    )
    with TunedEngine(arguments) as engine:
        tokenizer = engine.llm.get_tokenizer()
        texts = held_out_prompts(48, 64, offset=3)
        prompts = [{"prompt_token_ids": tokenizer.encode(text)} for text in texts]
        trials, rows = Trials(prompts, max(sizes), most, TOKENS), []
        for size in sizes:
            points = {
                name: replace(configured(config, size, drafter.num_layers), lookahead=config.lookahead is not None)
                for name, config in configs.items()
            }
            rows.append(report(size, points, measure(engine, trials, size, list(points.values()), turns)))
    return rows


def measure(engine: TunedEngine, trials: Trials, size: int, points: list[Point], turns: int) -> dict[Point, list[Pair]]:
    seen: dict[Point, list[Pair]] = {point: [] for point in points}
    for turn in range(turns):
        for point, pair in trials.compare(engine, size, list(seen), turn, reference=points[0]):
            seen[point].append(pair)
    return seen


def report(size: int, points: dict[str, Point], seen: dict[Point, list[Pair]]) -> dict[str, Any]:
    print(f"\nbatch size {size}")
    rows = {name: confirmed(size, seen[point]) for name, point in points.items()}
    for name, row in rows.items():
        stages = ", ".join(f"{stage} {took:.1f}" for stage, took in row.stage_ms.items())
        accepted = (row.tokens_a_round - 1) / points[name].num_drafts if points[name].num_drafts else 0.0
        print(
            f"  {name:8} {points[name]!s:24} {row.tokens_a_round:.2f} tokens per round, "
            f"acceptance {100 * accepted:.0f}%\n"
            f"{'':11}{row.stage_rate:6.1f} tokens/s of the stages ({stages} ms), {row.wall_rate:6.1f} by wall-clock"
        )
    stage, wall = (
        getattr(rows["tuned"], rate) / getattr(rows["untuned"], rate) for rate in ("stage_rate", "wall_rate")
    )
    print(f"  tuned over untuned: {stage:.2f} of the stages, {wall:.2f} by wall-clock")
    arms = {name: {"point": str(points[name]), **vars(row)} for name, row in rows.items()}
    return {"batch_size": size, "stages": round(stage, 3), "wall_clock": round(wall, 3), **arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=PAIR / "target")
    parser.add_argument("--untuned", type=Path, default=ROOT / "configs" / "tiny-pair.yaml")
    parser.add_argument("--tuned", type=Path, default=ROOT / "configs" / "tiny-pair-tuned.yaml")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = compare(args.model, args.untuned, args.tuned, args.tensor_parallel_size, args.batch_sizes, args.turns)
    write(args.json, surroundings() | {"rows": rows})


if __name__ == "__main__":
    main()
