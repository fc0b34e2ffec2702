"""The time budget, and errors of `vllm-easyspec tune` that need no engine."""

import pytest

from vllm_easyspec.cli import main
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.tune.planner import Point
from vllm_easyspec.tune.progress import Progress
from vllm_easyspec.tune.requests import WARM_ROUNDS, AskedEngine, TunedEngine, Window
from vllm_easyspec.tune.trials import Observation, Trials, confirmed, in_turn


class Clock(Progress):
    """Time passes when it is told to."""

    seconds = 0.0

    def now(self) -> float:
        return self.began + self.seconds


def run(progress: Clock, phase: str, items: int, each: float, **more) -> int:
    done = 0
    for _ in progress.within(phase, range(items), **more):
        progress.seconds += each
        done += 1
    return done


def test_without_a_budget_all_is_done():
    progress = Clock(None)
    assert [run(progress, phase, 10, 100.0) for phase in ("score", "compare")] == [10, 10]
    assert progress.unfinished == []


def test_the_budget_is_shared_out():
    """Shares of 92 percent: score 7, acceptance 20, times 20, confirm 15, climb 10, compare 20."""
    progress = Clock(1000.0)
    progress.seconds = 80.0  # the engine has started; 920 seconds are left
    assert run(progress, "score", 10, 1.0) == 10  # leaves 60 of its 70 seconds to the others
    assert run(progress, "acceptance", 10, 50.0) == 4  # 910 * 20 / 85 = 214 seconds
    assert run(progress, "times", 3, 400.0) == 1, "at least one"
    assert run(progress, "confirm", 3, 100.0, minimum=0, first_takes=200.0) == 0, "310 * 15 / 45 seconds"
    assert run(progress, "compare", 3, 100.0, minimum=0, first_takes=150.0) == 3
    assert progress.seconds <= 1000.0
    assert progress.unfinished == [
        "acceptance: time for 4 of 10 only",
        "times: time for 1 of 3 only",
        "confirm: time for 0 of 3 only",
    ]


def test_the_bar_ends_at_its_end():
    progress = Clock(None)
    for phase in ("score", "acceptance", "times", "confirm", "climb", "compare"):
        run(progress, phase, 3, 1.0)
        assert progress.bar.desc == phase
    assert progress.bar.n == pytest.approx(progress.bar.total)


class Recorded(TunedEngine):
    """An engine whose rounds all draft 5 tokens, whatever it is told."""

    def __init__(self):
        self.num_drafts_by_batch_size = [8] * 4
        self.generated = {"a": 1, "b": 1}
        self.calls: list[tuple] = []

    def rpc(self, method, **arguments):
        self.calls.append((method, arguments))
        return {"rounds_by_plan": [{"num_speculative_tokens": 5, "rounds": 9}], "stage_ms": {"draft": None}}

    def run_rounds(self, rounds: int) -> Window:
        self.calls.append(("run_rounds", rounds))
        return Window(tokens=3 * rounds, request_rounds=rounds, seconds=0.01 * rounds, rounds=rounds)


def test_a_point_is_set_then_warmed_up_then_counted_anew():
    engine, plan = Recorded(), DraftPlan((2, 2), "block")
    window, stats = engine.measure(Point(plan, 5), lambda: engine.run_rounds(7))
    assert engine.num_drafts_by_batch_size == [5] * 4
    assert engine.calls == [
        ("easyspec_configure", {"scope": "block", "plan": "2-2"}),
        ("easyspec_capture", {"batch_sizes": [2], "num_speculative_tokens": [5]}),
        ("run_rounds", WARM_ROUNDS),
        ("easyspec_stats", {"reset": True}),
        ("run_rounds", 7),
        ("easyspec_stats", {}),
    ]
    assert window.wall_ms == pytest.approx(10) and Observation.of(window, stats).stage_ms == {"draft": 0.0}
    with pytest.raises(RuntimeError, match=r"were to draft 3 tokens, and drafted \[5\]"):
        engine.measure(Point(plan, 3), lambda: engine.run_rounds(7))


def test_trials_are_the_same_for_every_point_and_go_through_all_prompts():
    prompts = [{"prompt_token_ids": [number] * number} for number in range(1, 8)]
    trials = Trials(prompts, largest=4, max_drafts=3, tokens=16)
    assert trials.longest == 7 + 1 + (4 + WARM_ROUNDS + 16) * 4
    assert [len(trials.numbers(size, 0)) for size in (1, 4, 15, 64)] == [15, 4, 1, 1]
    assert list(trials.numbers(4, 2)) == [8, 9, 10, 11]
    taken = [prompt["prompt_token_ids"][0] for trial in trials.numbers(4, 0) for prompt in trials.batch(4, trial)]
    assert taken == [1 + index % 7 for index in range(16)]
    assert list(in_turn("abc", 0)) == list("abc") and list(in_turn("abc", 1)) == list("cba")


WRONG = {
    "no folder for the result": (["-o", "nowhere/tuned.yaml"], "can't be written: there is no folder nowhere"),
    "no prompts": (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl can't be read"),
    "K": (["--max-drafts", "2"], "max_drafts=2 is not allowed. Give at least 3"),
    "the result in the configuration's place": (["-o", "untuned.yaml"], "-o untuned.yaml is the untuned configuration"),
    "ranks after --": (["--", "-tp", "2"], r"--tensor-parallel-size is not allowed after --. Give tune's own --tens"),
    "batch size after --": (["--", "--max-num-seqs", "2"], "--max-num-seqs is not allowed .* own --batch-sizes"),
    "a speculative configuration": (["--", "--speculative-config", "{}"], "tune tries its own. Give --config"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_of_the_command(tmp_path, monkeypatch, capsys, changes, message):
    import re

    from tiny_models import DRAFTER

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n')
    (tmp_path / "untuned.yaml").write_text(f"method: easyspec\nmodel: {DRAFTER}\nnum_speculative_tokens: 3\n")
    given = ["--model", str(DRAFTER), "--config", "untuned.yaml", "--prompts", "prompts.jsonl", "-o", "tuned.yaml"]
    assert main(["tune", *given, *changes]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vllm-easyspec tune: error: ") and re.search(message, error)


def test_numbers_have_a_least_value(capsys):
    needed = ["--model", "a", "--config", "b", "--prompts", "c", "-o", "d"]
    with pytest.raises(SystemExit):
        main(["tune", *needed, "--new-tokens", "7"])
    assert "argument --new-tokens: 7 is less than 8" in capsys.readouterr().err


class Scripted(AskedEngine):
    """Requests that gain what a script says, round by round."""

    def __init__(self, **gains: list[int]):
        self.gains = gains
        self.generated = {name: 1 for name in gains}

    def _step(self) -> None:
        for name, gains in self.gains.items():
            self.generated[name] += gains.pop(0)


def test_requests_count_until_they_have_written_enough():
    engine = Scripted(quick=[4, 5, 5, 5], slow=[1, 2, 2, 1], late=[0, 3, 3, 9])
    window = engine.run_tokens(6)
    assert window.rounds == 4 and window.tokens == 18
    assert window.request_rounds == pytest.approx((1 + 2 / 5) + 4 + 3)
    observed = Observation(window, {"draft": 2.0})
    assert confirmed(3, [(observed, observed)]).tokens_a_round == pytest.approx(18 / 8.4)


def test_slow_minutes_of_the_machine_cancel():
    """The point takes 0.8 times as long as the reference; two of five trials are three times as slow."""

    def observed(slowness: float, ms: float) -> Observation:
        window = Window(tokens=20, request_rounds=10, seconds=0.01 * slowness * (ms + 1), rounds=10)
        return Observation(window, {"draft": 0.25 * slowness * ms, "verify": 0.75 * slowness * ms})

    seen = [(observed(slowness, 8), observed(slowness, 10)) for slowness in (1, 3, 1.1, 3, 1)]
    found = confirmed(4, seen)
    assert found.stage_ms == {"draft": pytest.approx(0.25 * 8.8), "verify": pytest.approx(0.75 * 8.8)}
    assert found.stage_rate == pytest.approx(4e3 * 2 / 8.8)
    assert found.wall_ms == pytest.approx(1.1 * 11 * 9 / 11) and found.wall_rate == pytest.approx(4e3 * 2 / 9.9)
