"""`vllm serve` with a bad configuration, in a real process: one line, exit code 2, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import TARGET, easyspec

pytestmark = pytest.mark.engine
BAD = {
    "broken YAML": ("method: easyspec\nmodel: [\n", "is not valid YAML: line 3, column 1"),
    "unknown key": (
        json.dumps(easyspec(layer_parallel={"group_sise": 2})),
        "unknown key 'layer_parallel.group_sise' with value 2. Did you mean 'group_size'?",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_one_line_and_exit_code_2(tmp_path, text, message):
    path = tmp_path / "easyspec.yaml"
    path.write_text(text)
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "serve", TARGET, "--speculative-config", path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert errors[0].startswith("vllm serve: error: argument --speculative-config/-sc: ") and message in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
