"""Runs an engine in a process of its own, on the platform that the environment names, and prints JSON about it last.

usage: one_engine.py ENGINE_ARGUMENTS_AS_JSON SPECULATIVE_FIELDS_AS_JSON
"""

import json
import sys

import warm_start  # noqa: F401
from engines import audit, configure, easyspec, engine, greedy, mixed_prompts, stats, token_ids


def main() -> None:
    arguments, fields = map(json.loads, sys.argv[1:])
    with engine(speculative_config=easyspec(num_speculative_tokens=5, **fields), **arguments) as llm:
        config = llm.llm_engine.vllm_config
        found = {
            "async_scheduling": config.scheduler_config.async_scheduling,
            "executor": str(config.parallel_config.distributed_executor_backend),
            "greedy": token_ids(llm, mixed_prompts(), greedy(40)),
            "stats": stats(llm),
        }
        configure(llm, scope="block", group_sizes=[1, 4, 4, 1])
        core = llm.llm_engine
        for index, prompt in enumerate(mixed_prompts()):
            core.add_request(f"r{index}", prompt, greedy(60))
        audited, step = [], 0
        while core.has_unfinished_requests():
            core.step()
            step += 1
            if step == 3:
                core.abort_request(["r0", "r5"])
            if step % 5 == 0:
                audited += audit(llm)
        found["audited"] = audited
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
