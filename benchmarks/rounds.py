"""Tokens per round, acceptance by position, and stage times of the tiny pair: several plans in one engine per rank
count.

Held-out text (the files that training left out, `examples/tiny-pair/report.json`), greedy, float32, one request at a
time unless --batch says otherwise. Plans take turns, repetition by repetition; times are medians over all rounds. Every
output is compared with the precise plan's. --lookahead FILE runs every fuzzy plan without and with its look-ahead maps;
--own uses the drafter as the target too, so that acceptance is the self-acceptance: the share of drafts that the
drafter's own precise pass confirms. Prints JSON last; --json FILE saves it.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from vllm import LLM, SamplingParams

from vllm_easyspec.bench.results import surroundings, write

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "examples" / "tiny-pair"
sys.path.insert(0, str(PAIR))
from held_out import held_out_ids  # noqa: E402

DRAFTS = 5
PLANS = {
    "precise": dict(scope="attention", group_sizes=[1] * 10),
    "attention 1-4-4-1": dict(scope="attention", group_sizes=[1, 4, 4, 1]),
    "block 1-4-4-1": dict(scope="block", group_sizes=[1, 4, 4, 1]),
    "block 1-8-1": dict(scope="block", group_sizes=[1, 8, 1]),
}


def plans(lookahead: Path | None) -> dict[str, dict]:
    """Arguments of `easyspec_configure` by name."""
    if lookahead is None:
        return PLANS
    without = {name: plan | {"lookahead": False} for name, plan in PLANS.items()}
    with_maps = {f"{name} + maps": plan | {"lookahead": True} for name, plan in PLANS.items() if name != "precise"}
    return without | with_maps


def measure(ranks: int, args: argparse.Namespace) -> list[dict]:
    prompts = [{"prompt_token_ids": ids} for ids in held_out_ids(args.prompts, args.prompt_tokens)]
    config = dict(method="easyspec", model=str(PAIR / "drafter"), num_speculative_tokens=DRAFTS)
    if args.lookahead is not None:
        config["lookahead"] = str(args.lookahead)
    llm = LLM(
        str(PAIR / ("drafter" if args.own else "target")),
        dtype="float32",
        tensor_parallel_size=ranks,
        max_model_len=512,
        max_num_seqs=max(4, args.batch),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        speculative_config=config,
    )
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True, detokenize=False)
    snapshots: dict[str, list[dict]] = {name: [] for name in plans(args.lookahead)}
    expected = None
    for _ in range(args.repetitions):
        for name, plan in plans(args.lookahead).items():
            llm.collective_rpc("easyspec_configure", kwargs=plan)
            batches = [prompts[start : start + args.batch] for start in range(0, len(prompts), args.batch)]
            outs = [out.outputs[0] for batch in batches for out in llm.generate(batch, params, use_tqdm=False)]
            tokens = [list(out.token_ids) for out in outs]
            expected = expected or tokens
            if tokens != expected:
                raise SystemExit(f"{name} on {ranks} ranks: output differs from the precise plan's")
            snapshots[name].append(llm.collective_rpc("easyspec_stats")[0])
    llm.llm_engine.engine_core.shutdown()
    return [row(ranks, name, repeated) for name, repeated in snapshots.items()]


def row(ranks: int, name: str, repeated: list[dict]) -> dict:
    first = repeated[0]

    def stage(which: str) -> float:
        return median(snapshot["stage_ms"][which] for snapshot in repeated)

    return {
        "ranks": ranks,
        "plan": name,
        "tokens_a_round": first["tokens_a_round"],
        "acceptance": first["acceptance"],
        "mean_acceptance": round(sum(first["acceptance"]) / DRAFTS, 4),
        "calibrate_ms": round(stage("calibrate"), 2),
        "step_ms": round(stage("draft") / (DRAFTS - 1), 2),
        "verify_ms": round(stage("verify"), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lookahead", metavar="FILE", type=Path)
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [r for ranks in args.ranks for r in measure(ranks, args)]
    print("| ranks | plan | tokens per round | acceptance | by position | calibrate ms | fuzzy step ms | verify ms |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        by_position = " ".join(f"{a:.2f}" for a in r["acceptance"])
        times = " | ".join(f"{r[key]:.2f}" for key in ("calibrate_ms", "step_ms", "verify_ms"))
        acceptance = f"{r['tokens_a_round']:.2f} | {r['mean_acceptance']:.3f} | {by_position}"
        print(f"| {r['ranks']} | {r['plan']} | {acceptance} | {times} |")
    paths = {name: value and str(value) for name, value in vars(args).items() if name in ("lookahead", "json")}
    result = surroundings() | {
        "settings": {"num_speculative_tokens": DRAFTS, **vars(args), **paths},
        "rows": rows,
    }
    write(args.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
