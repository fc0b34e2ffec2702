"""`vllm-easyspec bench` before and after it measures: arms, their order, errors, rows, table, plots."""

import json
import re
import sys
from pathlib import Path

import pytest
from tiny_models import CONFIGS, DRAFTER, HF_CONFIGS, TARGET, easyspec
from vllm.engine.arg_utils import EngineArgs

from vllm_easyspec.bench import BenchmarkError, engine, plot, results
from vllm_easyspec.bench.engine import Measured, Workload, visiting_order
from vllm_easyspec.bench.llm import Engine
from vllm_easyspec.bench.serving import Answer, Level
from vllm_easyspec.cli import main
from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.errors import ConfigError

TINY = str(CONFIGS / "tiny-pair.yaml")


def bench(capsys, *arguments) -> str:
    """The one line on standard error of a run that fails."""
    code = main(["bench", "engine", "--model", str(TARGET), "--config", TINY, *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith("vllm-easyspec bench: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl can't be read"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model", HF_CONFIGS / "nothing"], "nothing"),
        (["--json", "no/such/folder.json"], "there is no folder no/such. Make it"),
        (["--plot", "figure.gift"], "--plot figure.gift has the ending '.gift'. Allowed are"),
        (["--engine", "{"], "--engine { is not JSON"),
        (["--engine", "[1]"], "--engine [1] is not a mapping"),
        (["--engine", '{"speculative_config": {}}'], "holds speculative_config, which the benchmark sets itself"),
        (["--input-tokens", 2000, "--output-tokens", 49], "are 2049 tokens, and .* has 2048 positions. Lower"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    err = bench(capsys, *arguments)
    assert message in err or re.search(message, err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baselines", "none,eagle"], "argument --baselines: eagle is none of none, draft_model, precise"),
        (["--concurrency", "4,0"], "argument --concurrency: 0 is less than 1"),
        (["--turns", "0"], "argument --turns: 0 is less than 1"),
    ],
)
def test_values_that_an_option_does_not_take(capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench(capsys, *arguments)
    assert message in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot x.svg needs matplotlib" in (err := bench(capsys, "--plot", "x.svg"))
    assert "Install vllm-easyspec[bench], or leave --plot out" in err


def test_arms():
    config = EasySpecConfig.parse(
        easyspec(
            draft_sample_method="greedy",
            calibration="never",
            lookahead=str(DRAFTER / "lookahead.safetensors"),
            layer_parallel={"scope": "block", "plan": "1-8-1", "mlp": "tensor"},
        )
    )
    arms = engine.speculative_configs(config, ["precise", "none", "draft_model"])
    assert list(arms) == ["none", "draft_model", "precise", "easyspec"]
    vllms_own = {"model": str(DRAFTER), "num_speculative_tokens": 4, "draft_sample_method": "greedy"}
    assert arms["none"] is None
    assert arms["draft_model"] == vllms_own | {"method": "draft_model"}
    assert EasySpecConfig.parse(arms["easyspec"]) == config
    precise = EasySpecConfig.parse(arms["precise"])
    assert precise.layer_parallel.draft_plan(10).is_precise and precise.layer_parallel.mlp == "tensor"
    assert (precise.lookahead, precise.calibration) == (None, "never")
    assert {name: getattr(precise, name) for name in vllms_own} == vllms_own
    assert list(engine.speculative_configs(config, [])) == ["easyspec"]


def test_turns_go_forward_and_backward():
    assert "".join(visiting_order("abc", 3)) == "abccbaabc"


def test_a_level_repeats_prompts_to_fill_its_slots():
    workload = Workload([[1], [2], [3]], [1, 4], output_tokens=8, requests=4)
    assert workload.level(1) == [[1], [2], [3], [1]]
    assert workload.level(4) == [[1], [2], [3], [1], [2], [3], [1], [2]]


def test_random_prompts_stay_in_both_vocabularies():
    target, drafter = (str(HF_CONFIGS / name) for name in ("Qwen2.5-72B-Instruct", "Qwen2.5-0.5B-Instruct"))
    (prompt,) = engine.load_prompts(None, target, drafter, 1, 200_000)
    assert 151_900 < max(prompt) < 151_936
    assert [len(prompt) for prompt in engine.load_prompts(None, target, drafter, 3, None)] == [256] * 3


def test_longest_sequence_leaves_room_for_drafts():
    assert engine.longest_sequence(str(TARGET), [[1], [1] * 100], 20, drafts=5) == 125
    assert engine.longest_sequence(str(TARGET), [[1] * 2000], 47, drafts=5) == 2048


def measured(*outputs: list[int], **speculation) -> Measured:
    """One request a turn."""
    levels = [Level([Answer(0.0, [0.1, 0.3], tokens)], 0.4) for tokens in outputs]
    nothing = {"drafts": 0, "accepted_at": [], "draft": None, "verify": None}
    return Measured(levels, [nothing | speculation for _ in outputs])


def result_of(results, checked=True, dtype="float32") -> dict:
    arm = {"dtype": dtype, "compilation_mode": "NONE", "cudagraph_mode": "NONE"}
    speculator = {"speculator": "Speculator", "speculator_compiled": True, "speculator_graphs": 0}
    arms = {name: arm if name == "none" else arm | speculator for name, _ in results}
    return {"arms": arms, "notes": ["A note."], "rows": engine._rows(results, checked)}


RESULTS = {
    ("none", 1): measured([1, 2, 3], [1, 2, 3]),
    ("draft_model", 1): measured([1, 2, 3], [1, 2, 3], drafts=10, accepted_at=[8, 4], draft=3.0, verify=1.0),
    ("easyspec", 1): measured(
        [1, 2, 3], [1, 9, 3], drafts=10, accepted_at=[5, 0], draft=1.0, verify=1.0, calibrate=0.25
    ),
}


def test_rows():
    none, draft_model, ours = engine._rows(RESULTS, checked=True)
    assert (none["lossless"], none["acceptance"], none["draft_share"]) == (True, None, None)
    assert (draft_model["lossless"], draft_model["acceptance"]) == (True, [0.8, 0.4])
    assert (draft_model["tokens_a_round"], draft_model["draft_share"], draft_model["calibrate_ms"]) == (2.2, 0.75, None)
    assert (ours["calibrate_ms"], ours["draft_ms"], ours["digest"]) == (0.25, 1.0, none["digest"])


def test_a_different_output_is_not_lossless():
    result = result_of(RESULTS)
    ours = result["rows"][-1]
    assert ours["lossless"] is False
    assert ours["outputs_by_turn"][1]["first_difference"] == {"request": 0, "position": 1, "expected": 2, "found": 9}
    assert engine.lossy_arms(result) == ["easyspec"]
    told = (
        "easyspec, concurrency 1, turn 2: 1 of 1 outputs differ from the target's own, first request 0 at token 1: 9 in"
    )
    assert told in engine.describe(result)
    assert engine.lossy_arms(result_of(RESULTS, dtype="bfloat16")) == [], (
        "16 bits may flip near-ties: told, not refused"
    )


@pytest.mark.parametrize(
    "results", [RESULTS, {key: RESULTS[key] for key in [("easyspec", 1)]}], ids=["synthetic", "alone"]
)
def test_unchecked_outputs_are_not_called_lossless(results):
    rows = result_of(results, checked=results is not RESULTS)["rows"]
    assert {row["lossless"] for row in rows} == {None}
    assert {row["outputs_by_turn"] for row in rows} == {None}


def test_table():
    lines = engine.describe(result_of(RESULTS)).splitlines()
    assert [cell.strip() for cell in lines[1].split("|")][:4] == ["none", "1", "7.5", "100.00"]
    assert [cell.strip() for cell in lines[3].split("|")][-6:] == ["1.50", "0.50 0.00", "1.00", "1.00", "0.50", "1/2"]
    assert (
        "draft_model: compilation NONE, CUDA graphs NONE, float32; Speculator's drafter compiled, no CUDA" in lines[6]
    )
    assert lines[-1] == "A note."


@pytest.mark.parametrize(
    ("end", "told"), [(KeyboardInterrupt(), "interrupted"), (BenchmarkError("no engine"), "no engine")]
)
def test_an_early_end_keeps_what_was_measured(capsys, monkeypatch, tmp_path, end, told):
    def run(model, configs, workload, arguments, turns, keep, say):
        keep(result_of({("none", 1): RESULTS["none", 1]}))
        raise end

    monkeypatch.setattr(engine, "run", run)
    kept, drawn = tmp_path / "result.json", tmp_path / "result.svg"
    options = ["--model", str(TARGET), "--config", TINY, "--json", str(kept), "--plot", str(drawn)]
    assert main(["bench", "engine", *options]) == 1
    out, err = capsys.readouterr()
    assert f"error: {told} ({kept} holds what was measured until then)" in err and out.startswith("arm ")
    result = json.loads(kept.read_text())
    assert result["rows"][0]["tokens_a_second"] == 7.5
    assert {"command", "commit", "versions", "hardware", "settings", "arms", "notes"} <= set(result)
    assert result["settings"]["concurrency"] == [1, 4, 16, 64] and "json" not in result["settings"]
    assert "tokens per second" in drawn.read_text()


def test_lossy_float32_run_fails_and_keeps_its_result(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "run", lambda *arguments: arguments[-2](result_of(RESULTS)))
    kept = tmp_path / "result.json"
    assert main(["bench", "engine", "--model", str(TARGET), "--config", TINY, "--json", str(kept)]) == 1
    assert "error: in float32 outputs of easyspec differ from the target's own" in capsys.readouterr().err
    assert json.loads(kept.read_text())["rows"][-1]["lossless"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plans", "1-8-1", "1-4-4"], "--plans=1-4-4: the group sizes add up to 9"),
        (["--json", "no/such/folder.json"], "there is no folder no/such. Make it"),
        (["--drafter", "./nowhere"], "./nowhere"),
        (["--context", "256,2020"], "--context 2020 is more than 2016, for which the drafter has room"),
        (["--json", str(CONFIGS)], "can't be written: it is a folder"),
    ],
)
def test_bad_input_of_draft_step_is_one_line(capsys, arguments, message):
    assert main(["bench", "draft-step", "--drafter", str(DRAFTER), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_draft_step_plot(tmp_path):
    rows = [
        {"scope": scope, "plan": plan, "ranks": 2, "batch": batch, "context": 256, "speedup": 1.25}
        for batch in (1, 8)
        for scope in ("attention", "block")
        for plan in ("1-4-4-1", "1-8-1")
    ]
    drawings = []
    for name in ("a.svg", "b.svg"):
        plot.draft_step(rows, tmp_path / name)
        drawings.append((tmp_path / name).read_text())
    assert drawings[0] == drawings[1], "the same rows give the same file"
    assert drawings[0].count("1.25") == 8 and "batch 8, context 256" in drawings[0] and "1-8-1" in drawings[0]
    plot.draft_step(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_result_file_is_never_half_written(tmp_path):
    path = tmp_path / "result.json"
    results.write(path, {"rows": [1]})
    with pytest.raises(TypeError):
        results.write(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    results.write(None, {})


def test_paths_below_the_current_folder_are_told_from_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert results.from_here(str(tmp_path / "a" / "b")) == str(Path("a/b"))
    assert results.from_here("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("vllm_easyspec/cli.py", "vllm-easyspec"),
        (".venv/bin/vllm-easyspec", "vllm-easyspec"),
        ("benchmarks/rounds.py", "benchmarks/rounds.py"),
        ("/elsewhere/script.py", "script.py"),
    ],
)
def test_command_as_a_shell_takes_it(monkeypatch, program, name):
    monkeypatch.setattr("sys.argv", [str(results.ROOT / program), "bench", "--config", "a b.yaml"])
    assert results.surroundings()["command"] == f"{name} bench --config 'a b.yaml'"


def test_several_engines_are_not_measured_at_once():
    with pytest.raises(ConfigError, match="data_parallel_size=2 is not allowed here: .*Remove it"):
        Engine(EngineArgs(model=str(TARGET), data_parallel_size=2))
