"""Async scheduling, adaptive verification, Ray and sleep mode, which vLLM lacks on a CPU, by a plugin of the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import AUDIT_LIMIT

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def expected(target_alone) -> list[list[int]]:
    return target_alone[40]


def run_engine(platform: str, fields: dict | None = None, **arguments) -> dict:
    return in_a_process(platform, "one_engine.py", json.dumps(arguments), json.dumps(fields or {}))


def in_a_process(platform: str, script: str, *arguments: str) -> dict:
    paths = [str(HERE / "platforms"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"EASYSPEC_TEST_PLATFORM": platform, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, expected: list[list[int]]) -> None:
    assert found["greedy"] == expected
    assert found["stats"][0]["accepted_at"][0] > 0
    assert len(found["audited"]) > 8
    assert max(request["largest_difference"] for request in found["audited"]) < AUDIT_LIMIT


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def asynchronous(request) -> tuple[int, dict]:
    """The number of ranks, and what was found with them."""
    return request.param, run_engine("async", tensor_parallel_size=request.param)


def test_async_scheduling(expected, asynchronous):
    _, found = asynchronous
    assert found["async_scheduling"] is True
    check(found, expected)


def test_adaptive_verification(expected, asynchronous):
    """The same drafts, of which the target is given fewer."""
    ranks, all_verified = asynchronous
    found = run_engine("adaptive", {"enable_adaptive_verification": True}, tensor_parallel_size=ranks)
    check(found, expected)
    accepted = [one["stats"][0]["accepted_at"] for one in (found, all_verified)]
    assert accepted[0][1] < accepted[1][1] / 2


@pytest.fixture
def ray_head():
    """A real Ray head on this machine, with two places for ranks."""
    ray = str(Path(sys.executable).parent / "ray")
    environment = os.environ | {
        "EASYSPEC_TEST_PLATFORM": "ray",
        "PYTHONPATH": str(HERE / "platforms") + os.pathsep + str(HERE),
        "OMP_NUM_THREADS": "1",  # vLLM binds its own processes to cores, not Ray's
        "RAY_worker_niceness": "0",
    }
    resources = json.dumps({"easyspec_rank": 2})
    command = [ray, "start", "--head", "--port=0", "--num-cpus=4", f"--resources={resources}"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    yield
    subprocess.run([ray, "stop", "--force"], check=True, capture_output=True, timeout=120)


def test_ray(expected, ray_head):
    found = run_engine("ray", tensor_parallel_size=2, distributed_executor_backend="ray")
    assert found["executor"] == "ray"
    check(found, expected)


def test_sleep_and_wake_up(expected):
    """With an allocator that pretends (`simulated_sleep.py`): the drafter and its maps are whole again afterwards."""
    found = in_a_process("sleeping", "sleeping_engine.py")
    for level in ("level 1", "level 2"):
        assert {"wqkv", "embed_tokens.weight", "lookahead.attention_1_up"} <= set(found[level]["lost"]), "were asleep"
    for what, seen in found.items():
        assert seen["greedy"] == expected, what
        assert len(seen["audited"]) > 8, what
        assert max(request["largest_difference"] for request in seen["audited"]) < AUDIT_LIMIT, what
        if "kept" not in what:
            assert seen["accepted_at"] == found["awake"]["accepted_at"], what
