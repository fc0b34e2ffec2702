"""The correctness checks of `tools/gpu_check.py`, on the trained tiny pair: each ends with an error or writes rows.

`identity`: the target alone answers greedily, then easyspec does, at several batch sizes, plans and both scopes. In
float32 every token must be the same. In bfloat16 kernels of different shapes round differently, so a first difference
is allowed if the target's own two best tokens are closer together than twice the noise: the largest difference between
the log-probability of a generated token when it was decoded and when it is read again as a prompt. The audit runs on
live requests, and counters tell whether CUDA graphs ran. Rows are saved as they come, plan by plan.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from engines import AUDIT_LIMIT, audited, configure, easyspec, engine, greedy, mixed_prompts, stats  # noqa: E402

from vllm_easyspec.bench.processes import in_new_process  # noqa: E402
from vllm_easyspec.bench.results import surroundings, write  # noqa: E402
from vllm_easyspec.drafter.xformers_attention import why_unusable  # noqa: E402

NEW_TOKENS = 48
DRAFTS = 5
BATCHES = (1, 3, 8, 16)
PLANS = {"1-4-4-1": [1, 4, 4, 1], "1-8-1": [1, 8, 1], "precise": [1] * 10}
LARGEST_DIFFERENCE = {"float32": AUDIT_LIMIT, "bfloat16": 0.25}


def arguments(device: str, dtype: str, graphs: bool) -> dict[str, Any]:
    """Of both engines. FlashAttention has no float32."""
    given: dict[str, Any] = dict(dtype=dtype, enforce_eager=not graphs)
    if device == "cuda":
        backend = "TRITON_ATTN" if dtype == "float32" else "FLASH_ATTN"
        given |= dict(attention_config={"backend": backend}, gpu_memory_utilization=0.3)
    return given


class Answer(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    steps: list[dict[int, float]]  # log-probabilities of each generated token's candidates, the two best among them


def answers(llm: Any, batch: int) -> list[Answer]:
    """What is generated for the first `batch` prompts, together."""
    outs = llm.generate(mixed_prompts()[:batch], greedy(NEW_TOKENS, logprobs=2), use_tqdm=False)
    return [
        Answer(
            list(out.prompt_token_ids),
            list(out.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in out.outputs[0].logprobs],
        )
        for out in outs
    ]


def noise(llm: Any, answered: list[Answer]) -> float:
    """The largest difference between a generated token's log-probability decoded and read again as a prompt."""
    whole = [{"prompt_token_ids": answer.prompt + answer.tokens} for answer in answered]
    # A prefix found in the cache would not be read again.
    llm.reset_prefix_cache()
    reread = llm.generate(whole, greedy(1, prompt_logprobs=0), use_tqdm=False)
    return max(
        abs(again.prompt_logprobs[len(answer.prompt) + place][token].logprob - answer.steps[place][token])
        for answer, again in zip(answered, reread, strict=True)
        for place, token in enumerate(answer.tokens)
    )


def first_differences(expected: list[Answer], found: list[Answer]) -> list[float]:
    """The target's top-two gap at the first token that differs, for each answer that differs."""
    gaps = []
    for wanted, got in zip(expected, found, strict=True):
        pairs = zip(wanted.tokens, got.tokens, strict=True)
        differing = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if differing is not None:
            best, second = sorted(wanted.steps[differing].values(), reverse=True)[:2]
            gaps.append(best - second)
    return gaps


def target_alone(device: str, dtype: str, graphs: bool) -> tuple[dict[int, list[Answer]], float]:
    """Its answers by batch size, and their noise."""
    with engine(**arguments(device, dtype, graphs)) as llm:
        expected = {batch: answers(llm, batch) for batch in BATCHES}
        return expected, noise(llm, expected[max(BATCHES)])


def use(llm: Any, scope: str, sizes: list[int]) -> None:
    """Use this plan from now on. Graphs, if the engine has any, are captured for all batch sizes up to the largest."""
    configure(llm, scope=scope, group_sizes=sizes)
    batches = list(range(1, max(BATCHES) + 1))
    llm.collective_rpc("easyspec_capture", kwargs=dict(batch_sizes=batches, num_speculative_tokens=[DRAFTS]))


def check_identity(
    device: str, dtype: str, graphs: bool, xformers: bool, save: Callable[[list[dict]], None]
) -> list[dict]:
    expected, measured_noise = in_new_process(target_alone, device, dtype, graphs)
    allowed = 0.0 if dtype == "float32" else 2 * measured_noise
    shared = arguments(device, dtype, graphs)
    more = {"grouped_attention": "xformers"} if xformers else {}
    rows: list[dict] = []
    with engine(speculative_config=easyspec(num_speculative_tokens=DRAFTS, **more), **shared) as llm:
        for scope in ("attention", "block"):
            for name, sizes in PLANS.items():
                use(llm, scope, sizes)
                gaps = [gap for batch in BATCHES for gap in first_differences(expected[batch], answers(llm, batch))]
                counted = stats(llm)[0]
                rows.append(
                    {
                        "scope": scope,
                        "plan": name,
                        "answers": sum(BATCHES),
                        "differing": len(gaps),
                        "largest_gap": max(gaps, default=0.0),
                        "allowed_gap": allowed,
                        "noise": measured_noise,
                        "tokens_a_round": counted["tokens_a_round"],
                        "rounds": counted["rounds"],
                        "graphs": counted["graphs"],
                    }
                )
                save(rows)
        llm.reset_prefix_cache()
        pages = audited(llm, mixed_prompts(), NEW_TOKENS)
    rows.append({"audited": len(pages), "largest_difference": max(pages), "allowed": LARGEST_DIFFERENCE[dtype]})
    save(rows)
    return rows


def problems(rows: list[dict], graphs: bool) -> list[str]:
    """What is wrong with the rows; empty if the check passes."""
    wrong = []
    for row in rows:
        if row.get("differing") and row["largest_gap"] >= row["allowed_gap"]:
            wrong.append(f"output differs where the target is sure: {row}")
        if "plan" in row and row["tokens_a_round"] < 1.5:
            wrong.append(f"hardly a draft was accepted: {row}")
        if "plan" in row and graphs:
            drafted = row["rounds"] - row["graphs"]["eager_rounds"]  # from a graph
            if drafted < row["rounds"]:
                wrong.append(f"{row['rounds'] - drafted} of {row['rounds']} rounds drafted without a CUDA graph: {row}")
            if row["graphs"]["replays"] <= drafted:
                wrong.append(f"no calibration came from a CUDA graph: {row}")
        if "audited" in row and not (row["audited"] and row["largest_difference"] <= row["allowed"]):
            wrong.append(f"the drafter's pages are not precise: {row}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["identity"])
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, which must then have run")
    parser.add_argument("--xformers", action="store_true", help="xformers' attention for the drafter")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.dtype == "float32":
        # On NVIDIA Triton multiplies float32 in TF32 unless told otherwise, which vLLM's attention kernels don't do:
        # with 10 bits of mantissa, equal tokens and precise pages could not be asked for.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    around = surroundings()
    skipped = why_unusable() if args.xformers else None
    if skipped:
        write(args.json, around | {"skipped": skipped})
        return
    rows = check_identity(
        args.device, args.dtype, args.graphs, args.xformers, lambda rows: write(args.json, around | {"rows": rows})
    )
    wrong = problems(rows, args.graphs)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
