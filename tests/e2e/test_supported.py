"""Targets, drafters and engine settings that the support table calls tested: lossless, with precise pages.

Each target is asked alone first. What is refused by name is in tests/unit/test_support.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_targets
import torch
from engines import (
    AUDIT_LIMIT,
    TARGET,
    assert_precise,
    assert_some_accepted,
    audited,
    easyspec,
    engine,
    greedy,
    mixed_prompts,
    stats,
    token_ids,
)
from vllm import LLM
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


# ---- mixture of experts; a drafter with a sliding window; logprobs of prompts ----


def prompt_logprobs(llm: LLM) -> list[list[dict[int, float]]]:
    outputs = llm.generate(mixed_prompts()[:4], greedy(8, prompt_logprobs=2), use_tqdm=False)
    return [
        [{token: seen.logprob for token, seen in (one or {}).items()} for one in o.prompt_logprobs] for o in outputs
    ]


@pytest.fixture(scope="module")
def experts(folder):
    """Answers of a Mixtral alone, and the Mixtral with a drafter that looks back no further than its window."""
    target = tiny_targets.mixtral(folder / "mixtral")
    drafter = tiny_targets.windowed(folder / "windowed-drafter")
    with engine(target) as llm:
        expected = {"ids": token_ids(llm, mixed_prompts(), greedy(40)), "prompts": prompt_logprobs(llm)}
    with engine(target, speculative_config=easyspec(drafter, num_speculative_tokens=4)) as llm:
        yield expected, llm


def test_mixture_of_experts_and_a_drafter_with_a_window(experts):
    expected, llm = experts
    prompts = mixed_prompts()
    assert token_ids(llm, prompts, greedy(40)) == expected["ids"]
    assert_some_accepted(llm)
    longest = max(len(llm.get_tokenizer().encode(prompt)) for prompt in prompts)
    assert longest + 40 > tiny_targets.WINDOW
    assert_precise(llm, prompts)


def test_prompt_logprobs(experts):
    expected, llm = experts
    for ours, theirs in zip(prompt_logprobs(llm), expected["prompts"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


# ---- a quantized target with a sliding window; the longest context left to vLLM ----


def test_quantized_target_with_a_window_and_an_automatic_context_length(folder):
    """The drafter has no window of its own, and must not take the target's."""
    target = tiny_targets.int8(folder / "int8", tiny_targets.windowed(folder / "windowed-target", TARGET))
    one_group = dict(disable_hybrid_kv_cache_manager=True)
    small_cache = dict(max_model_len=-1, kv_cache_memory_bytes=6 << 20, num_gpu_blocks_override=None)
    prompts = mixed_prompts()[:12:2]

    def answers(llm: LLM, longest: int) -> list[list[int]]:
        return token_ids(llm, prompts, greedy(40)) + token_ids(llm, prompts[-1:], greedy(longest))

    with engine(target, speculative_config=easyspec(num_speculative_tokens=4), **one_group, **small_cache) as llm:
        longest = llm.llm_engine.vllm_config.model_config.max_model_len
        assert 300 < longest < 2048, "the cache should be what limits it"
        ours = answers(llm, longest)
        assert_some_accepted(llm)
        assert_precise(llm, prompts)
        prompt_len = len(llm.get_tokenizer().encode(prompts[-1]))
    with engine(target, max_model_len=longest, **one_group) as llm:
        assert ours == answers(llm, longest)
    assert prompt_len + len(ours[-1]) == longest, "the last answer should end where the context does"


# ---- a multimodal target ----


def sounds(count: int) -> list[tuple[np.ndarray, int]]:
    random = np.random.default_rng(0)
    lengths = random.integers(5_000, 16_000, count)
    return [(random.normal(0, 0.3, length).astype(np.float32), tiny_targets.SAMPLING_RATE) for length in lengths]


def test_multimodal_target(folder):
    """Half of the prompts contain audio, of which the drafter reads only the placeholders."""
    target = tiny_targets.qwen2_audio(folder / "audio")
    sound, begin, end = tiny_targets.AUDIO_TOKENS
    texts = mixed_prompts()
    heard: list[Any] = [
        {"prompt": f"{text}{begin}{sound}{end}return ", "multi_modal_data": {"audio": [one]}}
        for text, one in zip(texts[::2], sounds(8), strict=True)
    ]
    prompts = heard + texts[1::2]
    with engine(target, limit_mm_per_prompt={"audio": 1}) as llm:
        expected = token_ids(llm, prompts, greedy(40))
        silent = token_ids(llm, [f"{text}return " for text in texts[::2]], greedy(40))
    assert silent != expected[:8]
    config = easyspec(num_speculative_tokens=4)
    with engine(target, limit_mm_per_prompt={"audio": 1}, speculative_config=config) as llm:
        assert token_ids(llm, prompts, greedy(40)) == expected
        assert_some_accepted(llm)
        assert_precise(llm, prompts)


# ---- LoRA, embeddings as prompts, reloaded weights, K by batch size ----

BY_BATCH_SIZE = [[1, 4, 5], [5, 10, 2], [11, 16, 0]]  # first and last batch size, K


def few_at_a_time(llm: LLM, adapters: Sequence[LoRARequest | None] = (None,) * 16) -> list[list[int]]:
    """Four prompts in flight, so that K is 5."""
    answers, prompts = [], mixed_prompts()
    for start in range(0, len(prompts), 4):
        now = slice(start, start + 4)
        outputs = llm.generate(prompts[now], greedy(40), use_tqdm=False, lora_request=list(adapters[now]))
        answers += [list(out.outputs[0].token_ids) for out in outputs]
    return answers


def embedded_prompts() -> list[Any]:
    """Prompts that are no tokens' embeddings, though not far from them."""
    embeddings = tiny_targets.embeddings().float()
    generator = torch.Generator().manual_seed(5)
    prompts = []
    for length in (5, 40, 70):
        tokens = torch.randint(3, len(embeddings), (length,), generator=generator)
        prompts.append({"prompt_embeds": embeddings[tokens] + 0.01 * torch.randn(length, embeddings.shape[1])})
    return prompts


def reload(llm: LLM, target: Any) -> None:
    llm.reset_prefix_cache()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(target)})


@pytest.fixture(scope="module")
def adapted(folder):
    """What the target answers alone, under each name, and the same engine with a drafter."""
    adapter = LoRARequest("adapter", 1, str(tiny_targets.adapter(folder / "adapter")))
    nudged = tiny_targets.nudged(folder / "nudged")
    mixed = [adapter, None] * 8
    embedded = embedded_prompts()

    def reloaded(llm: LLM) -> list[list[int]]:
        reload(llm, nudged)
        try:
            return few_at_a_time(llm)
        finally:
            reload(llm, TARGET)

    asked = {
        "plain": few_at_a_time,
        "adapter": lambda llm: few_at_a_time(llm, [adapter] * 16),
        "mixed": lambda llm: few_at_a_time(llm, mixed),
        "embedded": lambda llm: token_ids(llm, embedded + mixed_prompts()[:1], greedy(30)),
        "reloaded": reloaded,
    }
    # vLLM's CPU kernels give requests without an adapter that of the last slot, which must be empty then.
    slots = dict(enable_lora=True, max_lora_rank=8, max_loras=2)
    arguments = slots | dict(enable_prompt_embeds=True, kv_sharing_fast_prefill=True)
    with engine(**arguments) as llm:
        expected = {name: ask(llm) for name, ask in asked.items()}
    config = easyspec(num_speculative_tokens=5, num_speculative_tokens_per_batch_size=BY_BATCH_SIZE)
    with engine(speculative_config=config, **arguments) as llm:
        yield asked, expected, llm


@pytest.mark.parametrize("name", ["plain", "adapter", "mixed", "embedded", "reloaded"])
def test_lora_embeddings_and_reloaded_weights(adapted, name):
    asked, expected, llm = adapted
    if name in ("adapter", "mixed", "reloaded"):
        assert expected[name] != expected["plain"]
    stats(llm, reset=True)
    assert asked[name](llm) == expected[name]
    counted = stats(llm)[0]
    assert counted["verified"] > 0 < counted["accepted_at"][4], "drafts of all positions must take part"


def test_k_by_batch_size(adapted):
    """K is 0 while all 16 run, then 2, then 5 as requests end; the pages stay precise."""
    _, _expected, llm = adapted
    stats(llm, reset=True)
    lengths = [24] * 8 + [48] * 5 + [96] * 3
    assert max(audited(llm, mixed_prompts(), lengths)) < AUDIT_LIMIT
    counted = stats(llm)[0]
    assert counted["accepted_at"][0] > counted["accepted_at"][1] > 0 < counted["accepted_at"][4]
    assert 0 < counted["verified"] < sum(lengths) - 16 - sum(counted["accepted_at"]), "not every token was drafted for"
