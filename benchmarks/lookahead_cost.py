"""The time that look-ahead maps add to a fuzzy step of the tiny drafter: a round's loop with and without them, in turn.

One rank, one request, float32, K = 5; times are medians of a step in milliseconds. Prints JSON last; --json FILE saves
it.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from rounds import DRAFTS, PAIR, PLANS

from vllm_easyspec.bench.results import surroundings, write
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.lookahead import LookaheadFile, LookaheadMaps
from vllm_easyspec.ranks import run_ranks

CONTEXT = 256


@torch.inference_mode()
def measure(file: str, repetitions: int) -> list[dict]:
    drafter = EnginelessDrafter(PAIR / "drafter", max_num_reqs=1, max_len=CONTEXT + 32, num_drafts=DRAFTS)
    model = drafter.model
    model.lookahead = LookaheadMaps.load(LookaheadFile.read(file), model.placement, model.rank, model.final_norm)
    loop = drafter.loop
    plans = {name: DraftPlan(tuple(plan["group_sizes"]), plan["scope"]) for name, plan in PLANS.items()}
    times: dict[tuple[str, bool], list[float]] = {}
    if drafter.device.type != "cpu":
        raise SystemExit("this times calls on a CPU; on a GPU they return before their work is done")
    for repetition in range(repetitions + repetitions // 5):
        for name, plan in plans.items():
            for lookahead in (False, True):
                loop.positions[:1], loop.live[:1] = CONTEXT - 1, True
                began = time.perf_counter()
                loop.draft(1, DRAFTS, plan, CONTEXT + DRAFTS, lookahead)
                if repetition >= repetitions // 5:
                    times.setdefault((name, lookahead), []).append(time.perf_counter() - began)
    steps = {key: 1e3 * median(seconds) / (DRAFTS - 1) for key, seconds in times.items()}
    return [
        {
            "plan": name,
            "step_ms": round(steps[name, False], 4),
            "step_with_maps_ms": round(steps[name, True], 4),
            "ratio": round(steps[name, True] / steps[name, False], 3),
        }
        for name in plans
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lookahead", metavar="FILE", type=Path, default=PAIR / "lookahead.safetensors")
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = run_ranks(1, measure, str(args.lookahead), args.repetitions)[0]
    for row in rows:
        print(row)
    result = surroundings() | {"rows": rows}
    write(args.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
