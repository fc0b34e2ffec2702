"""Greedy output is the target's own, token for token, under every plan and kind of serving."""

import pytest
from engines import (
    AUDIT_LIMIT,
    REQUESTS,
    answers,
    audit,
    audited,
    configure,
    easyspec,
    engine,
    greedy,
    metric,
    mixed_prompts,
    prompts_near_the_end,
    stats,
    token_ids,
)
from vllm.exceptions import VLLMValidationError

pytestmark = pytest.mark.engine
LAYERS = 10
PLANS = {
    "precise": [1] * LAYERS,
    "1-4-4-1": [1, 4, 4, 1],
    "1-3-3-2-1": [1, 3, 3, 2, 1],
    "1-8-1": [1, 8, 1],
    "4-4-2": [4, 4, 2],
    "all": [LAYERS],
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def llm(request, target_alone):
    """K up to 8; chunks of at most 192 tokens; a cache that 16 long requests don't fit in."""
    config = easyspec(layer_parallel={"mlp": "tensor"})
    with engine(speculative_config=config, tensor_parallel_size=request.param) as llm:
        yield llm


@pytest.mark.parametrize("num_drafts", [8, 1, 2, 3, 4, 5, 6, 7])
def test_every_k(llm, target_alone, num_drafts):
    configure(llm, scope="attention", group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=num_drafts)
    assert token_ids(llm, mixed_prompts(), greedy(40)) == target_alone[40]
    drafted = stats(llm)[0]
    assert drafted["verified"] > 0 and drafted["accepted_at"][0] > 0
    assert not any(drafted["accepted_at"][num_drafts:])


@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(llm, target_alone, scope, plan):
    configure(llm, scope=scope, group_sizes=PLANS[plan], num_speculative_tokens=5)
    assert token_ids(llm, mixed_prompts(), greedy(40)) == target_alone[40]


@pytest.mark.parametrize("request_kind", REQUESTS)
def test_every_kind_of_request(llm, target_alone, request_kind):
    configure(llm, scope="block", group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=5)
    found, wanted = answers(llm, REQUESTS[request_kind]), target_alone["requests"][request_kind]
    assert [answer[:3] for answer in found] == [answer[:3] for answer in wanted]
    for answer, original in zip(found, wanted, strict=True):
        assert [token for token, _ in answer[3]] == [token for token, _ in original[3]]
        assert [value for _, value in answer[3]] == pytest.approx([value for _, value in original[3]], abs=2e-3)


def test_end_of_the_engines_context(llm, target_alone):
    """K = 8 drafts reach past the longest sequence."""
    configure(llm, scope="attention", group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=8)
    found = token_ids(llm, prompts_near_the_end(llm), greedy(60))
    assert found == target_alone["length"]
    assert [len(ids) for ids in found] == [1, 2, 3, 5, 7, 16]


def test_preemption(llm, target_alone):
    configure(llm, scope="block", group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=5)
    before = metric(llm, "vllm:num_preemptions")
    assert token_ids(llm, mixed_prompts(), greedy(180)) == target_alone[180]
    assert metric(llm, "vllm:num_preemptions") > before


def test_prefix_cache_hits(llm, target_alone):
    configure(llm, scope="attention", group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=5)
    llm.reset_prefix_cache()
    assert token_ids(llm, mixed_prompts(), greedy(40)) == target_alone[40]
    before = metric(llm, "vllm:prefix_cache_hits")
    assert token_ids(llm, mixed_prompts(), greedy(40)) == target_alone[40]
    assert metric(llm, "vllm:prefix_cache_hits") > before


def test_aborts_and_audit(llm, target_alone):
    """Half of the requests are aborted halfway; the others finish as if they were alone, and the pages stay precise."""
    configure(llm, scope="attention", group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=5)
    core, prompts = llm.llm_engine, mixed_prompts()
    for index, prompt in enumerate(prompts):
        core.add_request(f"r{index}", prompt, greedy(60))
    done, pages = {}, []
    for step in range(1000):
        if not core.has_unfinished_requests():
            break
        for out in core.step():
            if out.finished:
                done[out.request_id] = list(out.outputs[0].token_ids)
        if step in (2, 6, 12):
            pages += audit(llm)
        if step == 4:
            core.abort_request([f"r{index}" for index in range(0, 16, 2)])
    assert sorted(done) == sorted(f"r{index}" for index in range(1, 16, 2))
    for name, ids in done.items():
        assert ids[:40] == target_alone[40][int(name[1:])]
    assert len(pages) > 8 and max(request["tokens"] for request in pages) > 32
    assert max(request["largest_difference"] for request in pages) < AUDIT_LIMIT


@pytest.mark.parametrize("hits", [False, True], ids=["cold", "prefix-hits"])
def test_audit_is_clean_mid_flight(llm, hits):
    """Also with chunked prompts, and with pages that other requests calibrated."""
    configure(llm, scope="block", group_sizes=PLANS["1-8-1"], num_speculative_tokens=8)
    if hits:
        token_ids(llm, mixed_prompts(), greedy(4))
    else:
        llm.reset_prefix_cache()
    before = metric(llm, "vllm:prefix_cache_hits")
    assert max(audited(llm, mixed_prompts())) < AUDIT_LIMIT
    assert (metric(llm, "vllm:prefix_cache_hits") > before) or not hits


def test_audit_after_preemption(llm):
    configure(llm, scope="attention", group_sizes=PLANS["1-8-1"], num_speculative_tokens=5)
    before = metric(llm, "vllm:num_preemptions")
    assert max(audited(llm, mixed_prompts(), max_tokens=180, every=7)) < AUDIT_LIMIT
    assert metric(llm, "vllm:num_preemptions") > before


def test_audit_without_calibration(llm, target_alone):
    """The audit can fail: it finds fuzzy K/V that was not calibrated, on every rank. The output is unaffected."""
    llm.reset_prefix_cache()
    configure(llm, scope="attention", group_sizes=PLANS["1-8-1"], num_speculative_tokens=5, calibration="never")
    try:
        assert max(audited(llm, mixed_prompts())) > 100 * AUDIT_LIMIT
        assert token_ids(llm, mixed_prompts(), greedy(40)) == target_alone[40]
    finally:
        configure(llm, calibration="every_round")
        llm.reset_prefix_cache()


def test_counters(llm):
    """Calibration reads accepted + 1 tokens per request; a group is one cache write, one call and its collectives."""
    ranks = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    for scope, mlp_collectives in (("attention", LAYERS), ("block", 4)):
        configure(llm, scope=scope, group_sizes=PLANS["1-4-4-1"], num_speculative_tokens=5)
        token_ids(llm, mixed_prompts(), greedy(40))
        for rank, counted in enumerate(stats(llm)):
            assert counted["calibrated_decode_tokens"] == sum(counted["accepted_at"]) + counted["verified"]
            calibrate, draft = counted["stages"]["calibrate"], counted["stages"]["draft"]
            assert calibrate["passes"] == counted["rounds"] and draft["passes"] == 4 * counted["rounds"]
            own = len(range(rank, LAYERS, ranks))
            groups = 4 if ranks == 1 else 3  # on two ranks each lacks one of the single layers
            assert calibrate["attention_calls"] == calibrate["cache_writes"] == own * calibrate["passes"]
            assert draft["attention_calls"] == draft["cache_writes"] == groups * draft["passes"]
            assert draft["attention_collectives"] == (0 if ranks == 1 else 4 * draft["passes"])
            assert draft["mlp_collectives"] == (0 if ranks == 1 else mlp_collectives * draft["passes"])


@pytest.mark.parametrize("refused", [{"temperature": 0.8, "min_p": 0.1}, {"logit_bias": {5: 1.0}}])
def test_what_vllm_refuses_with_speculation_leaves_the_engine_alive(llm, target_alone, refused):
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        llm.generate(mixed_prompts()[:1], greedy(4, **refused), use_tqdm=False)
    assert token_ids(llm, mixed_prompts()[:2], greedy(40)) == target_alone[40][:2]


def test_bad_rpc_leaves_the_engine_alive(llm, target_alone):
    with pytest.raises(Exception, match="num_speculative_tokens=9"):
        configure(llm, num_speculative_tokens=9)
    with pytest.raises(Exception, match="add up to 9"):
        configure(llm, group_sizes=[9])
    assert token_ids(llm, mixed_prompts()[:2], greedy(40)) == target_alone[40][:2]
