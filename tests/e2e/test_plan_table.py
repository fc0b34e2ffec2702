"""A plan and a K for each range of batch sizes, and plans swapped under load: lossless, with precise pages."""

import pytest
from engines import (
    AUDIT_LIMIT,
    audit,
    configure,
    easyspec,
    engine,
    greedy,
    metric,
    mixed_prompts,
    stats,
    token_ids,
)

pytestmark = pytest.mark.engine
NEW_TOKENS = 60
LENGTHS = [60] * 3 + [20] * 6 + [40] * 4 + [60] * 3  # tokens of each request
BY_BATCH_SIZE = [[1, 4, 5], [5, 10, 3], [11, 16, 0]]  # first and last batch size, K
TABLE = [
    {"up_to": 4, "scope": "block", "group_sizes": [1, 8, 1]},
    {"up_to": 10, "scope": "attention", "group_sizes": [1, 4, 4, 1]},
    {"scope": "block", "group_sizes": [1, 4, 4, 1]},
]
EXPECTED = {(5, "block", "1-8-1"), (3, "attention", "1-4-4-1"), (0, "block", "1-4-4-1")}
SWAPPED = [
    dict(scope="block", group_sizes=[1, 8, 1]),
    dict(scope="attention", group_sizes=[4, 4, 2]),
    dict(scope="block", group_sizes=[10]),
    dict(restore=True),
    dict(scope="attention", group_sizes=[1] * 10),
]


@pytest.fixture(scope="module")
def expected(target_alone) -> list[list[int]]:
    return target_alone[NEW_TOKENS]


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def llm(request, expected):
    config = easyspec(
        num_speculative_tokens=5,
        num_speculative_tokens_per_batch_size=BY_BATCH_SIZE,
        layer_parallel={"by_batch_size": TABLE, "mlp": "tensor"},
    )
    with engine(speculative_config=config, tensor_parallel_size=request.param) as llm:
        yield llm


def run(llm, arrivals: dict[int, range], at_step) -> list[list[int]]:
    """Token ids of the prompts, which arrive at the given steps; `at_step(step)` is called after each."""
    core, prompts, done = llm.llm_engine, mixed_prompts(), {}
    for step in range(1000):
        for index in arrivals.get(step, ()):
            core.add_request(f"{index}", prompts[index], greedy(LENGTHS[index]))
        for out in core.step():
            if out.finished:
                done[int(out.request_id)] = list(out.outputs[0].token_ids)
        at_step(step)
        if step > max(arrivals) and not core.has_unfinished_requests():
            return [done[index] for index in range(len(prompts))]
    raise AssertionError("the engine doesn't come to an end")


def cut(expected: list[list[int]]) -> list[list[int]]:
    return [ids[:length] for ids, length in zip(expected, LENGTHS, strict=True)]


def drafted(llm) -> dict[tuple, int]:
    """Rounds by K, scope and plan."""
    rows = stats(llm)[0]["rounds_by_plan"]
    return {
        (row["num_speculative_tokens"], row["scope"], "-".join(map(str, row["group_sizes"]))): row["rounds"]
        for row in rows
    }


def test_k_goes_to_0_and_back(llm, expected):
    """3 requests, then 16 for a while, then fewer: K is 5, 0, 3, 5, and each K comes with its plan."""
    llm.reset_prefix_cache()
    configure(llm, restore=True)
    audited, seen = [], []

    def at_step(step: int) -> None:
        rounds = drafted(llm)
        seen.extend(key for key in rounds if rounds[key] != before.get(key, 0))
        before.update(rounds)
        if step % 4 == 3:
            audited.extend(audit(llm))

    before: dict[tuple, int] = {}
    assert run(llm, {0: range(3), 6: range(3, 16)}, at_step) == cut(expected)
    assert set(drafted(llm)) == EXPECTED
    by_k = [k for k, *_ in seen]
    assert by_k.index(0) > by_k.index(5) and 5 in by_k[by_k.index(0) :], "K goes from 5 to 0 and back"
    assert len(audited) > 16 and max(request["largest_difference"] for request in audited) < AUDIT_LIMIT
    assert stats(llm)[0]["accepted_at"][4] > 0


def test_paused_rounds_leave_pages_uncalibrated_until_a_round_drafts(llm, expected):
    """16 requests: K = 0, and the drafter reads nothing. When three are left, it first catches up with them."""
    llm.reset_prefix_cache()
    configure(llm, restore=True)
    uncalibrated, differences = [], []

    def at_step(step: int) -> None:
        if step % 2:
            found = audit(llm)
            uncalibrated.append(sum(request["uncalibrated"] for request in found))
            differences.extend(request["largest_difference"] for request in found)

    assert run(llm, {0: range(16)}, at_step) == cut(expected)
    for rank in stats(llm):
        assert rank["paused_rounds"] > 0 and rank["caught_up_tokens"] > 0
    most = uncalibrated.index(max(uncalibrated))
    assert max(uncalibrated) > 16 * 20, "nothing is read while K = 0"
    assert 0 in uncalibrated[most:], "all is read afterwards"
    assert any(0 < left < uncalibrated[most] for left in uncalibrated[most + 1 :]), (
        "no more in a round than an engine step may hold"
    )
    assert max(differences) < AUDIT_LIMIT


def test_prefix_caching_shares_uncalibrated_blocks(llm, expected):
    """Answers of paused rounds become prompts while K is 5: their cached blocks are read before drafting."""
    llm.reset_prefix_cache()
    configure(llm, restore=True)
    prompts = mixed_prompts()
    answered = llm.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in answered] == expected
    assert stats(llm, reset=True)[0]["paused_rounds"] > 0
    hits, core, known = metric(llm, "vllm:prefix_cache_hits"), llm.llm_engine, NEW_TOKENS - 10
    for index in range(8, 11):
        ids = list(answered[index].prompt_token_ids) + expected[index][:known]
        core.add_request(f"again-{index}", {"prompt_token_ids": ids}, greedy(10))
    answers, audited = {}, []
    while core.has_unfinished_requests():
        for out in core.step():
            answers[out.request_id] = list(out.outputs[0].token_ids)
        audited += audit(llm)
    assert [answers[f"again-{index}"] for index in range(8, 11)] == [expected[i][known:] for i in range(8, 11)]
    assert metric(llm, "vllm:prefix_cache_hits") > hits
    assert stats(llm)[0]["caught_up_tokens"] > 0 and stats(llm)[0]["paused_rounds"] == 0
    assert len(audited) > 3 and not any(request["uncalibrated"] for request in audited)
    assert max(request["largest_difference"] for request in audited) < AUDIT_LIMIT


def test_plans_swapped_under_load(llm, expected):
    """Another plan in every second step, in place of the table's, while requests come and go."""
    llm.reset_prefix_cache()
    audited, seen = [], set()

    def at_step(step: int) -> None:
        if step % 2 == 1:
            seen.update(drafted(llm))
            configure(llm, **SWAPPED[step // 2 % len(SWAPPED)])
        if step % 5 == 4:
            audited.extend(audit(llm))

    assert run(llm, {0: range(2), 5: range(2, 9), 12: range(9, 16)}, at_step) == cut(expected)
    drafting = {(scope, plan) for k, scope, plan in seen if k > 1}
    assert drafting >= {("block", "1-8-1"), ("attention", "4-4-2"), ("block", "10"), ("attention", "-".join("1" * 10))}
    assert max(request["largest_difference"] for request in audited) < AUDIT_LIMIT


def test_a_plan_by_rpc_holds_for_all_batch_sizes(llm, expected):
    configure(llm, restore=True)
    assert [row["up_to"] for row in stats(llm)[0]["by_batch_size"]] == [4, 10, None]
    configure(llm, scope="block", group_sizes=[1, 4, 4, 1])
    assert stats(llm)[0]["by_batch_size"] == []
    assert token_ids(llm, mixed_prompts()[:6], greedy(NEW_TOKENS)) == expected[:6]
    assert {key[1:] for key in drafted(llm)} == {("block", "1-4-4-1")}
    configure(llm, restore=True, calibration="never")
    assert stats(llm)[0]["calibration"] == "never" and len(stats(llm)[0]["by_batch_size"]) == 3
    configure(llm, restore=True)
