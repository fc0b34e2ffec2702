"""`tools/gpu_check.py`: parts fail, hang, end and run out of time, each on its own; what its checks call a fault."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import gpu_check  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_figures  # noqa: E402
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
    parts = [python("hangs", hang(pid), most_s=15), python("good", "pass")]
    result, found = check(monkeypatch, tmp_path / "results", parts)
    assert result == 1
    assert found["hangs"]["outcome"] == "no end after 15 s" and found["good"]["outcome"] == "passed"
    wait_until_gone(int(pid.read_text()))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def writes(monkeypatch, tmp_path, text: str, *then: str, **changes) -> Part:
    """A part that leaves `text` as its result."""
    script = tmp_path / "script.py"
    script.write_text("\n".join(["import pathlib, sys", f"pathlib.Path(sys.argv[-1]).write_text({text!r})", *then]))
    monkeypatch.setattr(gpu_check, "CHECKS", str(script))
    return Part(**(dict(name="part", is_check=True, command=(str(script),), least_s=0, most_s=60) | changes))


@pytest.mark.parametrize("text", ['{"rows": [', "", "[]"])
def test_a_result_that_can_not_be_read_is_no_result(monkeypatch, tmp_path, text):
    """As of a part that was killed while it wrote."""
    part = writes(monkeypatch, tmp_path, text, "raise SystemExit('why')")
    code, found = check(monkeypatch, tmp_path / "results", [part])
    assert code == 1
    assert found["part"]["outcome"] == "failed with exit code 1" and "why" in found["part"]["output"]


def test_a_part_that_is_ended_keeps_its_rows(monkeypatch, tmp_path, capsys):
    part = writes(monkeypatch, tmp_path, '{"rows": [{"plan": 1}]}', "import time; time.sleep(600)", most_s=5)
    code, found = check(monkeypatch, tmp_path / "results", [part])
    assert code == 1
    assert found["part"]["outcome"] == "no end after 5 s" and found["part"]["rows"] == [{"plan": 1}]
    assert "\n    plan 1\n" in capsys.readouterr().out


def test_a_part_says_why_it_is_skipped(monkeypatch, tmp_path):
    part = writes(monkeypatch, tmp_path, '{"skipped": "no xformers"}')
    code, found = check(monkeypatch, tmp_path / "results", [part])
    assert (code, found["part"]["outcome"]) == (0, "skipped: no xformers")


def test_a_check_that_can_not_run_here_is_skipped(monkeypatch, tmp_path):
    file = tmp_path / "result.json"
    monkeypatch.setattr(gpu_checks, "why_unusable", lambda: "no xformers")
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py", "identity", "bfloat16", "--xformers", "--json", str(file)])
    gpu_checks.main()
    found = json.loads(file.read_text())
    assert found["skipped"] == "no xformers" and found["versions"]["torch"]


def test_a_parts_environment_yields_to_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("GIVEN", "the user's")
    code = "import os; print(os.environ['GIVEN'], os.environ['OTHER'])"
    part = python("part", code, environment=(("GIVEN", "the part's"), ("OTHER", "the part's")))
    _, found = check(monkeypatch, tmp_path, [part])
    assert found["part"]["output"] == "the user's the part's\n"


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


@pytest.mark.parametrize(
    "tests, code, outcome",
    [
        ("", 0, "skipped: no such tests"),
        ("@pytest.mark.skip(reason='no GPU')\ndef test_it(): pass", 0, "skipped: each of its tests was skipped"),
        ("@pytest.mark.skip\ndef test_it(): pass\ndef test_that(): pass", 0, "passed"),
        ("def test_it(): assert False", 1, "failed with exit code 1"),
    ],
)
def test_a_part_whose_tests_do_not_run_is_skipped_not_passed(monkeypatch, tmp_path, tests, code, outcome):
    (tmp_path / "test_it.py").write_text(f"import pytest\n{tests}")
    part = Part("tests-gpu", True, ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)), 0, 60)
    result, found = check(monkeypatch, tmp_path / "results", [part])
    assert (result, found["tests-gpu"]["outcome"]) == (code, outcome)


@pytest.mark.parametrize("why, outcome", [(None, "passed"), ("they do not load", "failed with exit code 1")])
def test_a_build_has_passed_when_what_it_built_is_used(monkeypatch, tmp_path, why, outcome):
    (tmp_path / "setup.py").write_text("import os, sys; print(*sys.argv[1:], os.environ['EASYSPEC_NATIVE'])")
    (tmp_path / "vllm_easyspec").mkdir()
    (tmp_path / "vllm_easyspec" / "ops.py").write_text(f"WHY_NOT_NATIVE = {why!r}")
    (tmp_path / "vllm_easyspec" / "__init__.py").touch()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    build = next(part for part in gpu_check.parts("cuda") if part.name == "build")
    _, found = check(monkeypatch, tmp_path / "results", [build])
    assert found["build"]["outcome"] == outcome
    assert found["build"]["output"] == "build_ext --inplace required\n" + (f"{why}\n" if why else "")


@pytest.fixture
def set_up(monkeypatch):
    """setup.py as a module, which builds nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_where_the_environment_says(monkeypatch, tmp_path, set_up, name):
    for variable in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(variable, "")
    torch, compiler = tmp_path / "torch", tmp_path / "cuda" / "bin" / "nvcc"
    for file in (torch / "lib" / "libtorch_cuda.so", compiler):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    assert set_up.nvcc(torch) is None
    monkeypatch.setenv(name, str(compiler.parent if name == "PATH" else compiler.parent.parent))
    assert set_up.nvcc(torch) == str(compiler)
    assert set_up.nvcc(tmp_path) is None and set_up.nvcc(None) is None  # no torch with CUDA there


def test_unknown_parts_are_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        check(monkeypatch, tmp_path, [python("good", "pass")], "--only", "godo")
    assert "--only godo: allowed are good" in capsys.readouterr().err


def test_two_commands_run_every_part_once(monkeypatch, tmp_path):
    names = [part.name for part in gpu_check.parts("cuda")]
    assert set(gpu_check.FIRST) < set(names)
    parts = [python(name, "pass") for name in ("build", "xformers", "engine-easyspec")]
    ran = [set(check(monkeypatch, tmp_path / each, parts, "--set", each)[1]) for each in ("first", "rest")]
    assert ran == [{"build", "engine-easyspec"}, {"xformers"}]


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
        assert first in ("-m", "-c") or (ROOT / first).is_file()
    kinds = [part.is_check for part in parts]
    assert kinds == sorted(kinds, reverse=True), "checks come before figures"


def answer(token_ids, gap=1.0):
    return gpu_checks.Answer([], token_ids, [{token: -0.1, -1: -0.1 - gap} for token in token_ids])


def test_the_first_difference_is_judged_by_the_targets_gap():
    found = gpu_checks.first_differences([answer([1, 2, 3], gap=0.25)], [answer([1, 9, 9])])
    assert found == pytest.approx([0.25])
    assert gpu_checks.first_differences([answer([1, 2])], [answer([1, 2])]) == []


class RecordingEngine:
    def __init__(self):
        self.calls = []

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, kwargs))


def test_a_plan_is_captured_after_it_is_swapped():
    """For every batch from the whole one to a last request: answers end at different times."""
    llm = RecordingEngine()
    gpu_checks.use(llm, "block", [1, 8, 1])
    gpu_figures.use(llm, dict(scope="block", group_sizes=[1, 8, 1]), 8)
    assert llm.calls == [
        ("easyspec_configure", {"scope": "block", "group_sizes": [1, 8, 1]}),
        ("easyspec_capture", {"batch_sizes": list(range(1, 17)), "num_speculative_tokens": [5]}),
        ("easyspec_configure", {"scope": "block", "group_sizes": [1, 8, 1]}),
        ("easyspec_capture", {"batch_sizes": list(range(1, 9)), "num_speculative_tokens": [5]}),
    ]


def test_figures_of_plans_that_drafted_eagerly_are_named():
    row = {"arm": "block", "batch": 8}
    graphed = {"captured": 20, "replays": 80, "eager_rounds": 0}
    without = {"captured": 0, "replays": 0, "eager_rounds": 40}  # a CPU
    assert gpu_figures.drafted_eagerly([row, row | {"graphs": graphed}, row | {"graphs": without}]) == []
    eager = row | {"graphs": graphed | {"eager_rounds": 3}}
    assert gpu_figures.drafted_eagerly([eager]) == ["block, batch 8: 3 rounds drafted without a CUDA graph"]


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
