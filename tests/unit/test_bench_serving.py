"""The client of `bench engine` and its statistics."""

import random
from types import SimpleNamespace

import pytest

from vllm_easyspec.bench.serving import Answer, Level, compare, serve, spread, summary


def answers_like_an_engines(count: int) -> list[Answer]:
    rng = random.Random(1)
    answers = []
    for _ in range(count):
        now = rng.uniform(0, 5)
        answer = Answer(now)
        for _ in range(rng.randrange(2, 30)):
            now += rng.uniform(0.001, 0.1)
            answer.arrivals.append(now)
            answer.tokens += range(rng.randrange(1, 6))
        answers.append(answer)
    return answers


def test_figures_equal_those_of_vllms_own_benchmark():
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    answers = answers_like_an_engines(40)
    outputs = [
        RequestFuncOutput(
            success=True,
            start_time=answer.submitted,
            latency=answer.arrivals[-1] - answer.submitted,
            ttft=answer.ttft,
            itl=answer.itls,
            output_tokens=len(answer.tokens),
        )
        for answer in answers
    ]
    theirs, _ = calculate_metrics([], outputs, 12.5, None, [99], {})
    ours = summary([Level(answers, 12.5)])
    assert ours["tokens_a_second"] == pytest.approx(theirs.output_throughput, abs=0.01)
    for name in ("ttft", "tpot", "itl"):
        assert ours[f"{name}_ms"]["median"] == pytest.approx(getattr(theirs, f"median_{name}_ms"), abs=1e-3)
        assert ours[f"{name}_ms"]["p99"] == pytest.approx(getattr(theirs, f"percentiles_{name}_ms")[0][1], abs=1e-3)


def test_turns_are_pooled_and_their_throughput_told_apart():
    answers = answers_like_an_engines(10)
    tokens = sum(len(answer.tokens) for answer in answers)
    figures = summary([Level(answers, tokens / 100), Level(answers, tokens / 300), Level(answers, tokens / 110)])
    assert figures["tokens_a_second_by_turn"] == [100, 300, 110]
    assert (figures["tokens_a_second"], figures["requests"]) == (110, 30)


def test_answers_of_one_token_have_no_time_per_token():
    answer = Answer(1.0, [1.5], [7])
    figures = summary([Level([answer], 0.5)])
    assert figures["ttft_ms"] == {"median": 500.0, "p99": 500.0}
    assert figures["tpot_ms"] == figures["itl_ms"] == spread([]) == {"median": None, "p99": None}


class ScriptedEngine:
    """Answers each request with chunks of 3 and 1 tokens, one request a step, the oldest first."""

    def __init__(self):
        self.running, self.most = {}, 0

    def add_request(self, name, prompt, params):
        assert name not in self.running
        assert params.ignore_eos and params.temperature == 0 and params.max_tokens == 4
        self.running[name] = [prompt["prompt_token_ids"] * 3, [9]]
        self.most = max(self.most, len(self.running))

    def step(self):
        name, chunks = next(iter(self.running.items()))
        tokens = chunks.pop(0)
        if not chunks:
            del self.running[name]
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tokens)], finished=not chunks)]


@pytest.mark.parametrize("concurrency", [1, 2, 5, 9])
def test_client_keeps_the_concurrency_and_all_tokens(concurrency):
    engine = ScriptedEngine()
    level = serve(engine, [[token] for token in range(5)], concurrency, 4)
    assert engine.most == min(concurrency, 5) and not engine.running
    assert level.outputs == [[token] * 3 + [9] for token in range(5)]
    for answer in level.answers:
        assert answer.submitted <= answer.arrivals[0] <= answer.arrivals[1] and len(answer.itls) == 1
        assert answer.tpot == pytest.approx(answer.itls[0] / 3)


def test_equal_outputs():
    assert compare([[1, 2], [3]], [[1, 2], [3]]) == {"equal": 2, "of": 2, "first_difference": None}


@pytest.mark.parametrize(
    ("found", "equal", "difference"),
    [
        ([[1, 2, 3], [4, 9, 6]], 1, {"request": 1, "position": 1, "expected": 5, "found": 9}),
        ([[7, 2, 3], [4, 9, 6]], 0, {"request": 0, "position": 0, "expected": 1, "found": 7}),
        ([[1, 2], [4, 5, 6]], 1, {"request": 0, "position": 2, "expected": 3, "found": None}),
        ([[1, 2, 3], [4, 5, 6, 8]], 1, {"request": 1, "position": 3, "expected": None, "found": 8}),
    ],
)
def test_different_outputs(found, equal, difference):
    assert compare([[1, 2, 3], [4, 5, 6]], found) == {"equal": equal, "of": 2, "first_difference": difference}


def test_another_number_of_outputs_is_no_comparison():
    with pytest.raises(ValueError, match="1 outputs can't be compared with 2"):
        compare([[1], [2]], [[1]])
