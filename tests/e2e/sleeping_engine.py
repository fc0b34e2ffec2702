"""Puts an engine to sleep and wakes it up, in a process of its own, and prints JSON about it last."""

import json
import sys
from collections.abc import Callable
from typing import Any

from engines import ROOT, audit, easyspec, engine, greedy, mixed_prompts, stats, token_ids
from vllm import LLM

MAPS = ROOT / "examples" / "tiny-pair" / "lookahead.safetensors"


def observed(llm: LLM) -> dict[str, Any]:
    """Answers, accepted drafts, and the pages of live requests."""
    stats(llm, reset=True)
    found: dict[str, Any] = {"greedy": token_ids(llm, mixed_prompts(), greedy(40))}
    found["accepted_at"] = stats(llm)[0]["accepted_at"]
    found["audited"] = in_flight(llm, lambda: None)["audited"]
    return found


def in_flight(llm: LLM, between: Callable[[], None]) -> dict[str, Any]:
    """Does something between two steps of requests."""
    core, done, audited = llm.llm_engine, {}, []
    for index, prompt in enumerate(mixed_prompts()):
        core.add_request(str(index), prompt, greedy(40))
    for step in range(1000):
        if not core.has_unfinished_requests():
            break
        if step == 6:
            between()
        done |= {out.request_id: list(out.outputs[0].token_ids) for out in core.step() if out.finished}
        if step % 4 == 3:
            audited += audit(llm)
    return {"greedy": [done[str(index)] for index in range(len(done))], "audited": audited}


def sleep(llm: LLM, level: int, mode: str = "abort") -> list[str]:
    """Sleep and wake up as a trainer does it: the weights first, then the cache. Returns what was lost meanwhile."""
    llm.sleep(level, mode)
    lost = llm.collective_rpc("easyspec_test_lost")[0]
    llm.wake_up(["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(["kv_cache"])
    return lost


def main() -> None:
    config = easyspec(num_speculative_tokens=5, lookahead=str(MAPS), layer_parallel={"plan": "1-4-4-1"})
    arguments = {
        "enable_sleep_mode": True,
        "worker_extension_cls": "simulated_sleep.Extension",  # not imported here: only a worker should
    }
    found: dict[str, Any] = {}
    with engine(speculative_config=config, **arguments) as llm:
        found["awake"] = observed(llm)
        for level in (1, 2):
            lost = sleep(llm, level)
            found[f"level {level}"] = observed(llm) | {"lost": lost}
        llm.sleep(2)
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        found["level 2, all at once"] = observed(llm)
        for level in (1, 2):
            found[f"kept, level {level}"] = in_flight(llm, lambda level=level: sleep(llm, level, "keep") and None)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
