"""What a draft vocabulary costs in acceptance, and what it saves in the LM head.

usage: draft_vocabulary.py acceptance FILE... [--json RESULT]   the tiny pair on held-out prompts, without and with each
       draft_vocabulary.py head [--tokens 32768] [--json RESULT]   one core, Qwen2.5 0.5B's head: all rows against some
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from vllm import LLM, SamplingParams

from vllm_easyspec.bench.results import surroundings, write
from vllm_easyspec.drafter.vocabulary import DraftVocabulary

PAIR = Path(__file__).resolve().parents[1] / "examples" / "tiny-pair"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, DRAFTS = 96, 64, 64, 5
HIDDEN, VOCABULARY = 896, 151_936  # Qwen2.5 0.5B


def answers_and_acceptance(vocabulary: str | None) -> tuple[list[list[int]], dict]:
    """The engine's answers, and rank 0's counters."""
    sys.path.insert(0, str(PAIR))
    from held_out import held_out_ids

    prompts = [{"prompt_token_ids": ids} for ids in held_out_ids(PROMPTS, PROMPT_TOKENS)]
    config = {"method": "easyspec", "model": str(PAIR / "drafter"), "num_speculative_tokens": DRAFTS}
    llm = LLM(
        str(PAIR / "target"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 28,
        speculative_config=config | ({} if vocabulary is None else {"draft_vocabulary": vocabulary}),
    )
    try:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        outs = llm.generate(prompts, params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs], llm.collective_rpc("easyspec_stats")[0]
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=0.1)


def acceptance(files: list[str]) -> list[dict]:
    rows, reference = [], None
    for file in [None, *files]:
        answers, stats = answers_and_acceptance(file)
        reference = reference or (answers, stats)
        ids = range(512) if file is None else json.loads(Path(file).read_text())["ids"]
        rates = [sum(each["accepted_at"]) / each["verified"] for each in (stats, reference[1])]
        rows.append(
            {
                "tokens": len(ids),
                "coverage_of_the_answers": DraftVocabulary(tuple(ids), 512).share_of(reference[0])[0],
                "accepted_a_round": rates[0],
                "kept": rates[0] / rates[1],
                "same_answers": answers == reference[0],
            }
        )
    return rows


@torch.inference_mode()
def head(tokens: int) -> list[dict]:
    """Milliseconds of the head's product and arg-max in bfloat16, as vLLM's CPU build takes them; in turn, medians."""
    import vllm._custom_ops as ops

    torch.set_num_threads(1)
    rows = []
    for batch in (1, 4):
        x = torch.randn(batch, HIDDEN, dtype=torch.bfloat16)
        heads = {}
        for size in (VOCABULARY, tokens):
            weight = torch.randn(size, HIDDEN, dtype=torch.bfloat16)
            heads[size] = ops.create_onednn_mm(weight.t(), 32)
        seconds: dict[int, list[float]] = {size: [] for size in heads}
        for _ in range(25):
            for size, handler in heads.items():
                began = time.perf_counter()
                ops.onednn_mm(handler, x, None).max(-1)
                seconds[size].append(time.perf_counter() - began)
        rows += [{"batch": batch, "rows": size, "ms": 1e3 * median(took)} for size, took in seconds.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["acceptance", "head"])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = acceptance(args.files) if args.what == "acceptance" else head(args.tokens)
    write(args.json, surroundings() | {"rows": rows})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
