"""`tools/gpu_check.py`: parts fail, hang, end and run out of time, each on its own; what its checks call a fault."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_check  # noqa: E402
import gpu_checks  # noqa: E402
from gpu_check import Part  # noqa: E402

from vllm_easyspec.bench.processes import alone  # noqa: E402


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


def test_a_hanging_part_is_ended_with_the_processes_it_started(monkeypatch, tmp_path):
    child = tmp_path / "results"  # apart from the results
    pid = tmp_path.parent / f"{tmp_path.name}.pid"
    code = (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    result, found = check(monkeypatch, child, [python("hangs", code, most_s=15), python("good", "pass")])
    assert result == 1
    assert found["hangs"]["outcome"] == "no end after 15 s" and found["good"]["outcome"] == "passed"
    stat = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):  # until it is gone, or a zombie that nobody waits for
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the part's child is alive")


def test_parts_without_time_are_listed_and_a_check_among_them_fails(monkeypatch, tmp_path, capsys):
    long = dict(least_s=1000)
    code, found = check(monkeypatch, tmp_path, [python("figure", "pass", is_check=False, **long)], "--budget", "10")
    assert (code, found) == (0, {})
    assert "figure | 0 | not run: " in capsys.readouterr().out
    code, _ = check(monkeypatch, tmp_path, [python("check", "pass", **long)], "--budget", "10")
    assert code == 1


def test_checks_share_the_gpu_and_figures_have_it_alone(monkeypatch, tmp_path):
    """Two checks that wait for each other's file end only if they run at once."""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    meet = "import pathlib, time; pathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.02)"
    parts = [python("first", meet.format(a, b), shares_gpu=True), python("second", meet.format(b, a), shares_gpu=True)]
    code, found = check(monkeypatch, tmp_path / "results", parts, "--jobs", "2")
    assert code == 0 and all(part["outcome"] == "passed" for part in found.values())
    for part in gpu_check.parts("cuda"):
        assert part.shares_gpu == (part.is_check and part.name != "build")


def test_a_folder_without_tests_is_skipped_not_failed(monkeypatch, tmp_path):
    part = Part("tests-gpu", True, ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "empty")), 0, 60)
    (tmp_path / "empty").mkdir()
    code, found = check(monkeypatch, tmp_path / "results", [part])
    assert (code, found["tests-gpu"]["outcome"]) == (0, "skipped: no such tests")


def test_unknown_parts_are_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        check(monkeypatch, tmp_path, [python("good", "pass")], "--only", "godo")
    assert "--only godo: allowed are good" in capsys.readouterr().err


def test_tokens_a_second_are_compared_batch_by_batch(capsys):
    rates = {"none": 100.0, "draft_model": 150.0, "block": 300.0}
    rows = [{"arm": arm, "batch": 1, "tokens_a_second": rate} for arm, rate in rates.items()]
    gpu_check.print_table([{"part": "engine", "outcome": "passed", "rows": rows}])
    out = capsys.readouterr().out
    assert "block, batch 1: 3.00 times none's" in out and "block, batch 1: 2.00 times draft_model's" in out
    assert "draft_model, batch 1: 1.50 times none's" in out


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
        assert first == "-m" or (ROOT / first).is_file()
    kinds = [part.is_check for part in parts]
    assert kinds == sorted(kinds, reverse=True), "checks come before figures"


def answer(token_ids, gap=1.0):
    return gpu_checks.Answer([], token_ids, [{token: -0.1, -1: -0.1 - gap} for token in token_ids])


def test_the_first_difference_is_judged_by_the_targets_gap():
    found = gpu_checks.first_differences([answer([1, 2, 3], gap=0.25)], [answer([1, 9, 9])])
    assert found == pytest.approx([0.25])
    assert gpu_checks.first_differences([answer([1, 2])], [answer([1, 2])]) == []


ROW = dict(plan="1-4-4-1", differing=1, largest_gap=0.01, allowed_gap=0.02, tokens_a_round=3.0, graphs={"replays": 4})


def test_problems():
    assert gpu_checks.problems([ROW], graphs=True) == []
    assert "output differs where the target is sure" in gpu_checks.problems([ROW | {"largest_gap": 0.02}], False)[0]
    exact = ROW | {"allowed_gap": 0.0, "largest_gap": 0.0}  # float32: even a tie is a difference
    assert "output differs" in gpu_checks.problems([exact], False)[0]
    assert "hardly a draft" in gpu_checks.problems([ROW | {"tokens_a_round": 1.1}], False)[0]
    for graphs in (None, {"replays": 0}):
        assert "no CUDA graph" in gpu_checks.problems([ROW | {"graphs": graphs}], True)[0]
    audited = {"audited": 9, "largest_difference": 1e-6, "allowed": 1e-4}
    assert gpu_checks.problems([audited], False) == []
    assert "pages are not precise" in gpu_checks.problems([audited | {"largest_difference": 1.0}], False)[0]
    assert "pages are not precise" in gpu_checks.problems([audited | {"audited": 0}], False)[0]


def test_an_engine_alone_has_its_own_process_and_its_errors_come_back():
    assert alone(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        alone(divmod, 1, 0)
