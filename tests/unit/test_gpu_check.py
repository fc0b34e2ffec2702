"""`tools/gpu_check.py`: parts fail, hang, end and run out of time, each on its own; what its checks call a fault."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import gpu_check  # noqa: E402
import gpu_checks  # noqa: E402
from gpu_check import Part  # noqa: E402

from vllm_easyspec.bench.processes import in_new_process  # noqa: E402


def python(name: str, code: str, **changes) -> Part:
    return Part(**(dict(name=name, is_check=True, command=("-c", code), least_s=0, most_s=60) | changes))


def check(monkeypatch, tmp_path, parts, *arguments: str) -> tuple[int, dict[str, dict]]:
    """The exit code, and what was written for each part."""
    monkeypatch.setattr(gpu_check, "parts", lambda device: parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--results", str(tmp_path), *arguments])
    code = gpu_check.main()
    return code, {file.stem.removeprefix("cpu-rehearsal-"): json.loads(file.read_text()) for file in tmp_path.iterdir()}


def test_a_failing_part_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    parts = [python("bad", "print('why'); raise SystemExit(3)"), python("good", "pass")]
    code, found = check(monkeypatch, tmp_path, parts)
    assert code == 1
    assert found["bad"]["outcome"] == "failed with exit code 3" and "why" in found["bad"]["output"]
    assert found["good"]["outcome"] == "passed"
    assert "why" in capsys.readouterr().out


def test_a_figure_that_fails_is_no_failed_check(monkeypatch, tmp_path):
    code, found = check(monkeypatch, tmp_path, [python("figure", "raise SystemExit(1)", is_check=False)])
    assert (code, found["figure"]["outcome"]) == (0, "failed with exit code 1")


def hang(pid: Path) -> str:
    """Code that starts a process, says which, and hangs with it."""
    return (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )


def wait_until_gone(pid: int) -> None:
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # until it is gone, or a zombie that nobody waits for
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the part's child is alive")


def test_a_hanging_part_is_ended_with_the_processes_it_started(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    parts = [python("hangs", hang(pid), most_s=3), python("good", "pass")]
    result, found = check(monkeypatch, tmp_path / "results", parts)
    assert result == 1
    assert found["hangs"]["outcome"] == "no end after 3 s" and found["good"]["outcome"] == "passed"
    wait_until_gone(int(pid.read_text()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_parts_that_run_and_the_table_still_comes(tmp_path, number, code):
    pids = [tmp_path / "first", tmp_path / "second"]
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_check; from gpu_check import Part\n"
        "def part(name, code, shared): return Part(name, True, ('-c', code), 0, 300, shares_gpu=shared)\n"
        "parts = [part('done', 'pass', False)]\n"
        f"parts += [part('hangs', {hang(pids[0])!r}, True), part('hangs-too', {hang(pids[1])!r}, True)]\n"
        "parts += [part('waits', 'pass', True)]\n"
        "gpu_check.parts = lambda device: parts\n"
        f"sys.argv += ['--device', 'cpu', '--jobs', '2', '--results', {str(tmp_path / 'results')!r}]\n"
        "sys.exit(gpu_check.main())"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and what they start, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for _ in range(1200):
            if all(pid.exists() and pid.read_text() for pid in pids):
                break
            assert run.poll() is None
            time.sleep(0.1)
        run.send_signal(number)
        printed, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == code
    for pid in pids:
        wait_until_gone(int(pid.read_text()))
    table = printed[printed.index("part | seconds | outcome") :].splitlines()
    outcomes = {row.split(" | ")[0]: row.split(" | ")[2] for row in table[1:]}
    stopped = f"stopped by {number.name}"
    assert outcomes == {
        "done": "passed",
        "hangs": stopped,
        "hangs-too": stopped,
        "waits": f"not run: {stopped}",
    }
    assert json.loads((tmp_path / "results" / "cpu-rehearsal-hangs.json").read_text())["outcome"] == stopped


def test_engines_start_together_and_measure_in_turn(monkeypatch, tmp_path):
    """Beside a check, and none before it has ended; a part that fails to start has no turn."""
    log = tmp_path / "log"
    script = tmp_path / "engine.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "turn = pathlib.Path(sys.argv[sys.argv.index('--turn') + 1])\n"
        f"def say(what): open({str(log)!r}, 'a').write(f'{{what}} {{sys.argv[1]}}\\n')\n"
        "if sys.argv[1] == 'bad': raise SystemExit(1)\n"
        "say('starts'); turn.with_suffix('.ready').touch()\n"
        "while not turn.with_suffix('.go').exists(): time.sleep(0.01)\n"
        "say('begins'); time.sleep(0.3); say('ends')\n"
    )
    check_code = f"import time; time.sleep(2); open({str(log)!r}, 'a').write('checked\\n')"
    monkeypatch.setattr(gpu_check, "device_gib", lambda device: 5)
    parts = [python("check", check_code, shares_gpu=True)]
    parts += [
        Part(name, False, (str(script), name), 0, 60, gib=gib)
        for name, gib in (("a", 2), ("bad", 1), ("b", 2), ("c", 9))
    ]
    code, found = check(monkeypatch, tmp_path / "results", parts)
    assert code == 0 and found["bad"]["outcome"] == "failed with exit code 1"
    lines = log.read_text().splitlines()
    assert sorted(lines[:2]) == ["starts a", "starts b"]
    assert lines[2:] == ["checked", "begins a", "ends a", "begins b", "ends b", "starts c", "begins c", "ends c"]


def test_parts_without_time_are_listed_and_a_check_among_them_fails(monkeypatch, tmp_path, capsys):
    long = dict(least_s=1000)
    code, found = check(monkeypatch, tmp_path, [python("figure", "pass", is_check=False, **long)], "--budget", "10")
    assert (code, found) == (0, {})
    assert "figure | 0 | not run: " in capsys.readouterr().out
    code, _ = check(monkeypatch, tmp_path, [python("check", "pass", **long)], "--budget", "10")
    assert code == 1


def test_unknown_parts_are_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        check(monkeypatch, tmp_path, [python("good", "pass")], "--only", "godo")
    assert "--only godo: allowed are good" in capsys.readouterr().err


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this host has a GPU")
def test_without_a_gpu_it_says_so_and_succeeds():
    done = subprocess.run([sys.executable, "tools/gpu_check.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("gpu-check: this host has no CUDA device")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_have_names_of_their_own_and_commands_that_exist(device):
    parts = gpu_check.parts(device)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        first = part.command[0]
        assert first in ("-m", "-c") or (ROOT / first).is_file()
    kinds = [part.is_check for part in parts]
    assert kinds == sorted(kinds, reverse=True), "checks come before figures"


def answer(token_ids, gap=1.0):
    return gpu_checks.Answer([], token_ids, [{token: -0.1, -1: -0.1 - gap} for token in token_ids])


def test_the_first_difference_is_judged_by_the_targets_gap():
    found = gpu_checks.first_differences([answer([1, 2, 3], gap=0.25)], [answer([1, 9, 9])])
    assert found == pytest.approx([0.25])
    assert gpu_checks.first_differences([answer([1, 2])], [answer([1, 2])]) == []


ROW = dict(plan="1-4-4-1", differing=1, largest_gap=0.01, allowed_gap=0.02, tokens_a_round=3.0, rounds=40)
ROW["graphs"] = {"replays": 75, "eager_rounds": 0}


def test_problems():
    assert gpu_checks.problems([ROW], graphs=True) == []
    assert "output differs where the target is sure" in gpu_checks.problems([ROW | {"largest_gap": 0.02}], False)[0]
    exact = ROW | {"allowed_gap": 0.0, "largest_gap": 0.0}  # float32: even a tie is a difference
    assert "output differs" in gpu_checks.problems([exact], False)[0]
    assert "hardly a draft" in gpu_checks.problems([ROW | {"tokens_a_round": 1.1}], False)[0]
    # 35 replays of calibrations are none of drafting.
    eager = ROW | {"graphs": {"replays": 35, "eager_rounds": 40}}
    assert gpu_checks.problems([eager], False) == []
    (wrong,) = gpu_checks.problems([eager], True)
    assert wrong.startswith("40 of 40 rounds drafted without a CUDA graph")
    (wrong,) = gpu_checks.problems([ROW | {"graphs": {"replays": 40, "eager_rounds": 0}}], True)
    assert wrong.startswith("no calibration came from a CUDA graph")
    audited = {"audited": 9, "largest_difference": 1e-6, "allowed": 1e-4}
    assert gpu_checks.problems([audited], False) == []
    assert "pages are not precise" in gpu_checks.problems([audited | {"largest_difference": 1.0}], False)[0]
    assert "pages are not precise" in gpu_checks.problems([audited | {"audited": 0}], False)[0]


def test_an_engine_alone_has_its_own_process_and_its_errors_come_back():
    assert in_new_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_new_process(divmod, 1, 0)
