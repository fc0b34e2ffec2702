"""`vllm-easyspec bench engine` on real engines."""

import json
import os
import subprocess
import sys

import pytest
from engines import ROOT, TARGET, mixed_prompts

pytestmark = pytest.mark.engine
DRAFTS = 5
OUTPUT_TOKENS = 32


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The finished command and its JSON: three arms, two levels, one turn."""
    folder = tmp_path_factory.mktemp("bench")
    prompts = [json.dumps({"prompt": prompt}) for prompt in mixed_prompts()[:3]]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    command = [sys.executable, "-m", "vllm_easyspec.cli", "bench", "engine", "--model", str(TARGET)]
    command += [
        "--config",
        str(ROOT / "configs" / "tiny-pair.yaml"),
        "--baselines",
        "none,precise",
        "--dtype",
        "float32",
    ]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--concurrency", "1,2", "--requests", "3", "--turns", "1"]
    command += ["--output-tokens", str(OUTPUT_TOKENS), "--json", str(folder / "result.json")]
    command += ["--engine", json.dumps({"kv_cache_memory_bytes": 1 << 27, "enforce_eager": True})]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "result.json").read_text())


def test_rows_of_all_arms_and_levels(done):
    rows = done[1]["rows"]
    found = [(row["arm"], row["concurrency"], row["requests"]) for row in rows]
    assert found == [(arm, *level) for arm in ("none", "precise", "easyspec") for level in ((1, 3), (2, 4))]
    for row in rows:
        assert row["tokens_a_second"] > 0 and len(row["tokens_a_second_by_turn"]) == 1
        for latency in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert 0 < row[latency]["median"] <= row[latency]["p99"]


def test_outputs_are_the_targets_own(done):
    for row in done[1]["rows"]:
        assert row["lossless"] is True
        assert row["outputs_by_turn"] == [{"equal": row["requests"], "of": row["requests"], "first_difference": None}]
    for concurrency in (1, 2):
        assert len({row["digest"] for row in done[1]["rows"] if row["concurrency"] == concurrency}) == 1


def test_acceptance_is_plausible(done):
    for row in done[1]["rows"]:
        if row["arm"] == "none":
            assert {row[key] for key in ("acceptance", "tokens_a_round", "draft_ms", "verify_ms", "draft_share")} == {
                None
            }
            continue
        acceptance = row["acceptance"]
        assert len(acceptance) == DRAFTS and acceptance == sorted(acceptance, reverse=True)
        assert 0.3 < acceptance[0] <= 1
        assert row["tokens_a_round"] == pytest.approx(1 + sum(acceptance), abs=1e-3)
        assert 0 < row["calibrate_ms"] < row["draft_ms"]
        assert row["draft_share"] == pytest.approx(row["draft_ms"] / (row["draft_ms"] + row["verify_ms"]), abs=1e-3)


def test_surroundings_and_resolved_engines(done):
    result = done[1]
    assert result["command"].startswith("vllm-easyspec bench engine --model ")
    assert result["settings"]["output_tokens"] == OUTPUT_TOKENS and result["versions"]["vllm"]
    assert result["arms"]["none"]["speculative_config"] is None
    assert "speculator" not in result["arms"]["none"]
    for name in ("precise", "easyspec"):
        arm = result["arms"][name]
        assert arm["speculative_config"]["num_speculative_tokens"] == DRAFTS
        assert (arm["dtype"], arm["speculator"]) == ("float32", "EasySpecSpeculator")
    assert result["arms"]["precise"]["speculative_config"]["layer_parallel"]["group_size"] == 1


def test_table_says_how_each_arm_ran(done):
    out = done[0].stdout
    assert len([line for line in out.splitlines() if line.startswith(("none ", "precise ", "easyspec "))]) == 6
    assert "easyspec: compilation NONE, CUDA graphs NONE, float32; EasySpecSpeculator's drafter not compiled" in out
    if result_is_from_a_cpu(done[1]):
        assert "say little about a GPU's" in out and any("say little" in note for note in done[1]["notes"])


def result_is_from_a_cpu(result) -> bool:
    return result["hardware"]["gpu"] is None
