"""`vllm-easyspec tune` on the tiny pair: its YAML serves, its figures hang together, and Ctrl-C keeps what is known."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engines import DRAFTER, ROOT, TARGET, mixed_prompts

from vllm_easyspec.config import EasySpecConfig

pytestmark = pytest.mark.engine


def command(folder: Path, *arguments: str) -> list[str]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in mixed_prompts()))
    (folder / "untuned.yaml").write_text(f"method: easyspec\nmodel: {DRAFTER}\nnum_speculative_tokens: 3\n")
    given = ["--model", str(TARGET), "--config", "untuned.yaml", "--prompts", "prompts.jsonl", "-o", "tuned.yaml"]
    given += ["--report", "tuned.html", "--json", "tuned.json", "--max-drafts", "4", "--plans", "2", *arguments]
    engine = ["--", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"]
    return [sys.executable, "-m", "vllm_easyspec.cli", "tune", *given, *engine]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder after a small run: two batch sizes, two plans beside the untuned and the precise one."""
    folder = tmp_path_factory.mktemp("tune")
    sizes = "--batch-sizes 8,3 --new-tokens 24 --rounds 2 --turns 1 --prompt-tokens 100 --baselines none".split()
    # One thread: where other work shares the cores, threads that wait for one another take many times as long.
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
    done = subprocess.run(
        command(folder, *sizes), cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_the_tuned_file_is_a_configuration(tuned):
    config = EasySpecConfig.parse(tuned / "tuned.yaml")
    found = json.loads((tuned / "tuned.json").read_text())
    assert config.model == str(DRAFTER) and 1 <= config.num_speculative_tokens <= 4
    assert config.num_speculative_tokens == max(1, *(row["num_speculative_tokens"] for row in found["chosen"]))
    assert [row["batch_size"] for row in found["chosen"]] == [3, 8]
    assert "# Tuned by: " in (tuned / "tuned.yaml").read_text()
    assert "Written: tuned.yaml, tuned.html" in (tuned / "stdout").read_text()


def test_the_tuned_file_served_and_was_compared(tuned):
    found = json.loads((tuned / "tuned.json").read_text())
    assert found["failed"] == {} and found["unfinished"] == []
    assert set(found["wall_clock"]) == {"tuned", "none"}
    assert all(rate > 0 for arm in found["wall_clock"].values() for rate in arm.values())


def test_what_was_measured(tuned):
    found = json.loads((tuned / "tuned.json").read_text())
    assert found["same_answers"] is True, "float32: lossless under every plan"
    plans = found["plans"]
    assert [plan["group_sizes"] for plan in plans[:2]] == [[1, 4, 4, 1], [1] * 10]
    assert len({(plan["scope"], *plan["group_sizes"]) for plan in plans}) == 4
    for plan in plans:
        assert len(plan["acceptance"]) == 4 and 0.3 < plan["acceptance"][0] < 1
        assert plan["acceptance"] == sorted(plan["acceptance"], reverse=True)
    assert all(0 < plan["score"] < 1 for plan in plans[2:])
    assert set(found["correction_by_k"]) == {"0", "1", "2", "4"}
    assert all(0.7 < ratio < 1.5 for ratio in found["correction_by_k"].values())
    for times in found["times"]:
        assert set(times["calibrate_ms"]) == set(times["verify_ms"]) == {"0", "1", "2", "4"}
        by_k = times["calibrate_ms"]
        assert by_k.pop("0") == 0 < min(by_k.values()), "K = 0 pauses the drafter"
        assert len(times["steps"]) == 4
    for row in found["confirmed"]:
        assert 1 <= row["tokens_a_round"] <= 1 + row["num_speculative_tokens"]
        rate = 1e3 * row["batch_size"] * row["tokens_a_round"]
        assert row["stage_rate"] == pytest.approx(rate / sum(row["stage_ms"].values()))
        assert row["wall_rate"] == pytest.approx(rate / row["wall_ms"])
    confirmed = [
        {row["num_speculative_tokens"] for row in found["confirmed"] if row["batch_size"] == b} for b in (3, 8)
    ]
    assert all({0, 3} <= drafts for drafts in confirmed), "no drafts, and the untuned K, at each batch size"


def test_report(tuned):
    assert (tuned / "tuned.html").read_text().count("<svg") == 3, "plans, stages of a round, engines"


def test_two_configurations_in_turn(tmp_path):
    """What ends the demo."""
    out = tmp_path / "compared.json"
    options = ["--batch-sizes", "2", "--turns", "1", "--json", str(out)]
    done = subprocess.run([sys.executable, ROOT / "examples" / "compare.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["batch_size"] == 2 and row["stages"] > 0 < row["wall_clock"]
    assert row["untuned"]["point"] != row["tuned"]["point"] and row["tuned"]["tokens_a_round"] > 1
    told = float(re.search(r"tuned over untuned: ([0-9.]+) of the stages", done.stdout)[1])
    assert told == pytest.approx(row["stages"], abs=0.0056), "each rounded by itself"


def test_interrupted(tmp_path):
    """Ctrl-C, which reaches all processes of the run, once there is something to choose from."""
    many = "--batch-sizes 2 --new-tokens 8 --rounds 4 --turns 1000 --prompt-tokens 40 --time-budget 3000".split()
    arguments = command(tmp_path, *many)
    with open(tmp_path / "stderr", "w+b") as log:
        run = subprocess.Popen(
            arguments,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            # A shell's background jobs, and what they start, ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            while log_so_far(tmp_path).count(b"\rtimes") < 3:  # the bar shows two sweeps at least
                assert run.poll() is None, log_so_far(tmp_path)[-3000:].decode()
                try:
                    run.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
            os.killpg(run.pid, signal.SIGINT)
            out, _ = run.communicate(timeout=120)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, log_so_far(tmp_path)[-3000:].decode()
    assert "Not finished: times: interrupted" in out.decode()
    assert "# Not finished: times: interrupted" in (tmp_path / "tuned.yaml").read_text()
    assert EasySpecConfig.parse(tmp_path / "tuned.yaml").num_speculative_tokens >= 1
    assert "Not finished: " in (tmp_path / "tuned.html").read_text()
    assert json.loads((tmp_path / "tuned.json").read_text())["confirmed"] == []


def log_so_far(folder: Path) -> bytes:
    return (folder / "stderr").read_bytes()
