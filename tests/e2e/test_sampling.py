"""The distribution of sampled tokens is the target's own, however drafts are chosen, also beyond the drafter's context.

A vocabulary of 24 tokens, so that the target's exact probability of every pair of second and third tokens can be
computed with `transformers` and compared with thousands of seeded draws (chi-square). The second and third tokens are
the first that drafts can decide.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import configure, easyspec, engine, stats
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams

pytestmark = pytest.mark.engine
VOCAB = 24
DRAFTER_CONTEXT = 24
DRAWS = 3000
PROMPTS = {
    "room": [3, 1, 4, 1, 5, 9],
    "runs-out": [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, DRAFTER_CONTEXT - 2)],
    "full": [int(t) for t in np.random.default_rng(1).integers(0, VOCAB, DRAFTER_CONTEXT + 8)],
}


def save_random_llama(folder: Path, layers: int, seed: int) -> LlamaForCausalLM:
    """A model whose next-token distributions are neither flat nor certain."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        model.lm_head.weight.mul_(2.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    target = save_random_llama(folder / "target", layers=2, seed=1)
    drafter = save_random_llama(folder / "drafter", layers=6, seed=2)
    return folder, target, drafter


@torch.no_grad()
def pair_probabilities(
    model: LlamaForCausalLM, prompt: list[int], top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """P(second token, third token) after `prompt`, `[VOCAB, VOCAB]`, by enumeration of the first two tokens."""

    def next_probabilities(sequences: torch.Tensor) -> torch.Tensor:
        logits = model(sequences).logits[:, -1].double()
        if top_k is not None:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        probabilities = logits.softmax(-1)
        if top_p is not None:  # the likeliest tokens up to the first that reaches top_p
            ordered, order = probabilities.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return probabilities / probabilities.sum(-1, keepdim=True)

    every = torch.arange(VOCAB)
    start = torch.tensor(prompt)
    first = next_probabilities(start[None])[0]
    one = torch.cat([start.expand(VOCAB, -1), every[:, None]], 1)
    second = next_probabilities(one)
    two = torch.cat([one.repeat_interleave(VOCAB, 0), every.repeat(VOCAB)[:, None]], 1)
    third = next_probabilities(two).view(VOCAB, VOCAB, VOCAB)
    return torch.einsum("a,ab,abc->bc", first, second, third).numpy()


def p_value(draws: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square of pairs `[draws, 2]` against `[VOCAB, VOCAB]`; cells with an expectation below 5 are merged."""
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (draws[:, 0], draws[:, 1]), 1)
    expected = probabilities * len(draws)
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    assert len(wanted) > 20, "too few cells for a test with power"
    return float(chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


DRAFTED = 14  # tokens of the 24, where only a part may be drafted
DRAFTS = {
    "probabilistic": {"draft_sample_method": "probabilistic"},
    "probabilistic-from-a-part": {"draft_sample_method": "probabilistic", "draft_vocabulary": DRAFTED},
    "greedy": {"draft_sample_method": "greedy"},
}


@pytest.fixture(scope="module", params=DRAFTS)
def llm(request, pair):
    folder, _, _ = pair
    config = easyspec(
        folder / "drafter",
        num_speculative_tokens=3,
        **DRAFTS[request.param],
        max_model_len=DRAFTER_CONTEXT,
        layer_parallel={"group_sizes": [1, 4, 1]},
    )
    sizes = dict(max_model_len=64, max_num_seqs=64, max_num_batched_tokens=512, num_gpu_blocks_override=256)
    with engine(folder / "target", speculative_config=config, skip_tokenizer_init=True, **sizes) as llm:
        yield llm


def draw(llm, prompt: list[int], draws: int = DRAWS, **changes) -> np.ndarray:
    """Second and third tokens of seeded requests, `[draws, 2]`."""
    params = [
        SamplingParams(temperature=1.0, max_tokens=4, seed=seed, detokenize=False, ignore_eos=True, **changes)
        for seed in range(draws)
    ]
    outs = llm.generate([{"prompt_token_ids": prompt}] * draws, params, use_tqdm=False)
    return np.array([out.outputs[0].token_ids[1:3] for out in outs])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_distribution_is_the_targets(llm, pair, prompt):
    _, target, drafter = pair
    stats(llm, reset=True)
    draws = draw(llm, PROMPTS[prompt])
    accepted = stats(llm)[0]["accepted_at"]
    assert p_value(draws, pair_probabilities(target, PROMPTS[prompt])) > 1e-3
    assert p_value(draws, pair_probabilities(drafter, PROMPTS[prompt])) < 1e-6, "the test has no power"
    if prompt == "room":
        assert accepted[0] > 0.1 * DRAWS, "drafts must take part"


@pytest.mark.parametrize("limit", [{"top_k": 6}, {"top_p": 0.8}], ids=["top-k", "top-p"])
def test_top_k_and_top_p(llm, pair, limit):
    _, target, _ = pair
    draws = draw(llm, PROMPTS["room"], **limit)
    allowed = pair_probabilities(target, PROMPTS["room"], **limit)
    assert (allowed == 0).any()
    assert (allowed[draws[:, 0], draws[:, 1]] > 0).all()
    assert p_value(draws, allowed) > 1e-3


def test_k_changed_in_flight(llm, pair):
    """Drafts that are not yet tested when K is lowered are tested against their own logits."""
    _, target, _ = pair
    core = llm.llm_engine
    for seed in range(DRAWS):
        params = SamplingParams(temperature=1.0, max_tokens=4, seed=seed, detokenize=False, ignore_eos=True)
        core.add_request(str(seed), {"prompt_token_ids": PROMPTS["room"]}, params)
    draws, step = [], 0
    try:
        while core.has_unfinished_requests():
            draws += [out.outputs[0].token_ids[1:3] for out in core.step() if out.finished]
            step += 1
            configure(llm, num_speculative_tokens=1 if step % 2 else 3)
    finally:
        configure(llm, restore=True)
    assert p_value(np.array(draws), pair_probabilities(target, PROMPTS["room"])) > 1e-3


def test_seeds_repeat(llm):
    first, second = draw(llm, PROMPTS["room"], draws=200), draw(llm, PROMPTS["room"], draws=200)
    assert (first == second).all()
