import pytest
from engines import REQUESTS, answers, engine, greedy, mixed_prompts, prompts_near_the_end, token_ids


@pytest.fixture(scope="session")
def target_alone() -> dict:
    """The target's own answers, without speculation, on one rank: token ids by their number, and what is asked more."""
    with engine() as llm:
        return {tokens: token_ids(llm, mixed_prompts(), greedy(tokens)) for tokens in (40, 60, 180)} | {
            "length": token_ids(llm, prompts_near_the_end(llm), greedy(60)),
            "requests": {name: answers(llm, changes) for name, changes in REQUESTS.items()},
        }
