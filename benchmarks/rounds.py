"""Tokens a round, acceptance by position, and stage times of the tiny pair: several plans in one engine a rank count.

Held-out text (the files that training left out, `examples/tiny-pair/report.json`), greedy, float32, one request at a
time. Plans take turns, repetition by repetition; times are medians over all rounds. Every output is compared with the
precise plan's. JSON last; --json FILE keeps it.
"""

import argparse
import json
import sys
import sysconfig
from pathlib import Path
from statistics import median

from vllm import LLM, SamplingParams

from vllm_easyspec.bench.report import surroundings

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "examples" / "tiny-pair"
DRAFTS = 5
PLANS = {
    "precise": dict(scope="attention", group_sizes=[1] * 10),
    "attention 1-4-4-1": dict(scope="attention", group_sizes=[1, 4, 4, 1]),
    "block 1-4-4-1": dict(scope="block", group_sizes=[1, 4, 4, 1]),
    "block 1-8-1": dict(scope="block", group_sizes=[1, 8, 1]),
}


def held_out_prompts(count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of `tokens` tokens, spread over the held-out files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    files = json.loads((PAIR / "report.json").read_text())["held_out_files"]
    library = Path(sysconfig.get_paths()["stdlib"])
    prompts = []
    for name in files:
        ids = tokenizer((library / name).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        prompts += [ids[start : start + tokens] for start in range(0, len(ids) - tokens, 6 * tokens)]
    return prompts[:: max(1, len(prompts) // count)][:count]


def measure(ranks: int, prompts: list[list[int]], new_tokens: int, repetitions: int) -> list[dict]:
    llm = LLM(
        str(PAIR / "target"),
        dtype="float32",
        tensor_parallel_size=ranks,
        max_model_len=512,
        max_num_seqs=4,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        speculative_config=dict(method="easyspec", model=str(PAIR / "drafter"), num_speculative_tokens=DRAFTS),
    )
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    snapshots: dict[str, list[dict]] = {name: [] for name in PLANS}
    expected = None
    for _ in range(repetitions):
        for name, plan in PLANS.items():
            llm.collective_rpc("easyspec_configure", kwargs=plan)
            outs = [llm.generate([{"prompt_token_ids": p}], params, use_tqdm=False)[0].outputs[0] for p in prompts]
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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = held_out_prompts(args.prompts, args.prompt_tokens)
    rows = [r for ranks in args.ranks for r in measure(ranks, prompts, args.new_tokens, args.repetitions)]
    print("| ranks | plan | tokens a round | acceptance by position | calibrate ms | fuzzy step ms | verify ms |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        by_position = " ".join(f"{a:.2f}" for a in r["acceptance"])
        times = " | ".join(f"{r[key]:.2f}" for key in ("calibrate_ms", "step_ms", "verify_ms"))
        print(f"| {r['ranks']} | {r['plan']} | {r['tokens_a_round']:.2f} | {by_position} | {times} |")
    result = surroundings(" ".join(["benchmarks/rounds.py", *sys.argv[1:]])) | {
        "settings": {"num_speculative_tokens": DRAFTS, **vars(args)},
        "rows": rows,
    }
    text = json.dumps(result, indent=1, default=str)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
