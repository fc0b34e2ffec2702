"""The drafter in real tensor-parallel processes against `transformers` and a plain implementation of the method,
float32.

The ranks are started once for each rank count and run all cases; the tests check the results.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from drafter_cases import CASES, CONTINUATIONS, PROMPTS, SCOPES, STEPS, Case, CaseResult, make_checkpoint, run_cases
from reference import DenseRequest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
TOLERANCE = 1e-4
RANK_COUNTS = sorted({ranks for case in CASES for ranks in case.ranks})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, dict[str, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("drafters")
    return folder, {case.name: make_checkpoint(case, folder / case.name) for case in CASES}


@pytest.fixture(scope="module")
def broken_checkpoints(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Copies of one checkpoint, each with one tensor too few, too many, of another shape or not finite."""
    source, folder = checkpoints[0] / "qwen3", tmp_path_factory.mktemp("broken")

    def broken(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        copy = shutil.copytree(source, folder / name)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return {
        "missing": broken("missing", lambda tensors: tensors.pop("model.layers.4.self_attn.q_norm.weight")),
        "unknown": broken(
            "unknown", lambda tensors: tensors.update({"model.layers.2.mlp.router.weight": torch.ones(2)})
        ),
        "headless": broken("headless", lambda tensors: tensors.pop("lm_head.weight")),
        # One number, which would fill a whole norm.
        "shape": broken("shape", lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)})),
        "nan": broken("nan", lambda tensors: tensors["model.layers.3.mlp.down_proj.weight"][5, 7].fill_(torch.nan)),
        "infinity": broken("infinity", lambda tensors: tensors["model.embed_tokens.weight"][2, 0].fill_(torch.inf)),
    }


@pytest.fixture(scope="module")
def run_at(checkpoints, broken_checkpoints):
    """From a rank count to what `run_cases` gave on each rank."""
    folder, _ = checkpoints

    @cache
    def run(num_ranks: int) -> list[tuple[dict[str, CaseResult], list[str]]]:
        cases = [case for case in CASES if num_ranks in case.ranks]
        broken = list(map(str, broken_checkpoints.values())) if num_ranks == 1 else []
        return run_ranks(num_ranks, run_cases, str(folder), cases, broken, timeout_s=500)

    return run


@pytest.fixture(scope="module")
def results_at(run_at):
    """From a rank count to each rank's results, by case."""
    return lambda num_ranks: [results for results, _ in run_at(num_ranks)]


@pytest.fixture(scope="module")
def expected(checkpoints):
    """From a case to the results of `transformers` and of the plain implementation."""
    _, models = checkpoints

    @cache
    def compute(name: str) -> "Expected":
        return Expected(next(case for case in CASES if case.name == name), models[name])

    return compute


class Expected:
    def __init__(self, case: Case, model: PreTrainedModel):
        lengths = [len(prompt) for prompt in PROMPTS]
        with torch.no_grad():
            logits = [
                model(torch.tensor([prompt + more])).logits[0].numpy()
                for prompt, more in zip(PROMPTS, CONTINUATIONS, strict=True)
            ]
        self.prefill = np.concatenate([rows[:length] for rows, length in zip(logits, lengths, strict=True)])
        self.recalibrated = np.concatenate([rows[length:] for rows, length in zip(logits, lengths, strict=True)])
        self.steps = [
            np.stack([rows[length + step] for rows, length in zip(logits, lengths, strict=True)])
            for step in range(len(STEPS))
        ]
        window = model.config.sliding_window if hasattr(model.config, "sliding_window") else None
        requests = [DenseRequest(model, window) for _ in PROMPTS]
        for request, prompt in zip(requests, PROMPTS, strict=True):
            request.read(prompt, [1] * case.config.num_hidden_layers, "attention")
        self.fuzzy = {}
        for group_sizes in case.plans:
            for scope in SCOPES:
                for request, length in zip(requests, lengths, strict=True):
                    request.rewind(length)
                self.fuzzy[group_sizes, scope] = [
                    np.concatenate([r.read(ids, group_sizes, scope) for r, ids in zip(requests, step, strict=True)])
                    for step in STEPS
                ]


RUNS = [
    pytest.param(case, ranks, id=f"{case.name}-{ranks}")
    for ranks in RANK_COUNTS
    for case in CASES
    if ranks in case.ranks
]
on_every_case = pytest.mark.parametrize(("case", "ranks"), RUNS)


def assert_close(actual: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(actual) == len(wanted)
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=0, atol=TOLERANCE)


@on_every_case
def test_precise_logits_are_those_of_transformers(case, ranks, results_at, expected):
    result, wanted = results_at(ranks)[0][case.name], expected(case.name)
    assert_close(result.prefill.logits, [wanted.prefill])
    assert_close(result.precise_steps.logits, wanted.steps)
    assert (result.top_tokens == wanted.prefill.argmax(-1)).all()


@on_every_case
def test_fuzzy_steps_are_those_of_the_plain_writing(case, ranks, results_at, expected):
    result, wanted = results_at(ranks)[0][case.name], expected(case.name)
    assert result.fuzzy.keys() == wanted.fuzzy.keys()
    for key, steps in result.fuzzy.items():
        assert_close(steps.logits, wanted.fuzzy[key])


@on_every_case
def test_fuzzy_steps_differ_from_precise_ones_and_the_scopes_from_each_other(case, ranks, results_at):
    """Otherwise the tests above would prove nothing."""
    result = results_at(ranks)[0][case.name]
    for group_sizes in case.plans:
        attention, block = (result.fuzzy[group_sizes, scope].logits for scope in SCOPES)
        for step, precise in enumerate(result.precise_steps.logits):
            for one, other in ((attention[step], precise), (block[step], precise), (attention[step], block[step])):
                assert np.abs(one - other).max() > 100 * TOLERANCE


@on_every_case
def test_a_precise_pass_overwrites_fuzzy_kv(case, ranks, results_at, expected):
    result = results_at(ranks)[0][case.name]
    assert_close(result.recalibrated.logits, [expected(case.name).recalibrated])


@on_every_case
def test_all_ranks_hold_the_same_bits(case, ranks, results_at):
    first, *others = (result[case.name] for result in results_at(ranks))
    for other in others:
        assert (first.top_tokens == other.top_tokens).all()
        for mine, theirs in zip(_passes(first), _passes(other), strict=True):
            for a, b in zip(mine.logits + mine.hidden, theirs.logits + theirs.hidden, strict=True):
                assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _passes(result: CaseResult):
    return [
        result.prefill,
        result.precise_steps,
        *result.fuzzy.values(),
        result.recalibrated,
    ]


@on_every_case
def test_calls_and_collectives_of_a_fuzzy_step(case, ranks, results_at):
    for rank, results in enumerate(results_at(ranks)):
        for (group_sizes, scope), steps in results[case.name].fuzzy.items():
            ends = np.cumsum(group_sizes)
            groups = [range(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]
            local_groups = sum(any(layer % ranks == rank for layer in group) for group in groups)
            mlps = {"attention": sum(group_sizes), "block": len(groups)}[scope]
            tensor_parallel = ranks > 1 and case.mlp == "tensor"
            per_step = {
                "passes": 1,
                "attention_calls": local_groups,
                "cache_writes": local_groups,
                "attention_collectives": len(groups) if ranks > 1 else 0,
                "mlp_collectives": mlps if tensor_parallel else 0,
            }
            assert steps.counters == {name: count * len(STEPS) for name, count in per_step.items()}


@on_every_case
def test_a_layer_has_pages_on_one_rank_only(case, ranks, results_at):
    blocks = 1 + len(PROMPTS) * 128 // case.block_size
    for rank, results in enumerate(results_at(ranks)):
        layers = [layer for layer in range(case.config.num_hidden_layers) if layer % ranks == rank]
        assert results[case.name].pages == len(layers) * blocks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing",
            "the drafter's checkpoint lacks 1 tensors of a Qwen3ForCausalLM, among them "
            "['layers.4.self_attn.q_norm.weight']. Check that all of its files are there",
        ),
        (
            "unknown",
            "the drafter's checkpoint holds 'model.layers.2.mlp.router.weight', which a Qwen3ForCausalLM doesn't have",
        ),
        (
            "headless",
            "the drafter's checkpoint lacks 1 tensors of a Qwen3ForCausalLM, among them ['lm_head.weight']. "
            "Check that all of its files are there",
        ),
        (
            "shape",
            "the drafter's checkpoint holds 'model.norm.weight' of shape [1], but its config.json asks for [48]. "
            "Check that both are of one model",
        ),
        (
            "nan",
            "the drafter's checkpoint holds NaN or infinity: in what became w_down[3] on rank 0. Get its files "
            "again, or serve without --speculative-config",
        ),
        (
            "infinity",
            "the drafter's checkpoint holds NaN or infinity: in what became embed_tokens.weight[0] on rank 0. Get its "
            "files again, or serve without --speculative-config",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(name, message, run_at, broken_checkpoints):
    _, errors = run_at(1)[0]
    assert dict(zip(broken_checkpoints, errors, strict=True))[name] == message
