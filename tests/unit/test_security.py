"""What SECURITY.md promises."""

import ast
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers.dynamic_module_utils
from fastapi import FastAPI
from tiny_models import CONFIGS, ROOT, TARGET, easyspec, model_folder
from tune_findings import ABOUT, findings
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.api_server.routers import register_api_routers

from vllm_easyspec import plugin
from vllm_easyspec.cli import main
from vllm_easyspec.tune.report import html_report

PACKAGE = ROOT / "vllm_easyspec"


def calls():
    """Each call in the package: its module, what is called as written, and the call."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node


def test_only_messages_between_own_processes_are_unpickled():
    loaders = ("pickle.load", "pickle.loads", "torch.load", "marshal.loads", "yaml.unsafe_load", "eval", "exec")
    assert {(module, name) for module, name, _ in calls() if name in loaders} == {("ranks.py", "pickle.loads")}
    assert [ast.unparse(node.args[1]) for _, name, node in calls() if name == "yaml.load"] == ["_StrictLoader"]


def test_one_function_writes_the_files_of_users():
    def writes(name, call):
        method = name.rpartition(".")[2]
        modes = [ast.unparse(part) for part in (*call.args, *(keyword.value for keyword in call.keywords))]
        opened = method == "open" and any(mode in ("'w'", "'wb'", "'a'", "'x'") for mode in modes)
        return opened or method in ("write_text", "write_bytes", "save_file")

    found = {module for module, name, call in calls() if writes(name, call)}
    assert found == {"documents.py", "last_words.py"}, "last_words.py: a temporary file of its own"


LIMITED = """
import resource, sys
from pathlib import Path
from vllm_easyspec.documents import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path(sys.argv[1]), "new" * 1000)
except OSError as error:
    print(error.strerror)
"""


def test_a_file_that_cannot_be_finished_stays_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    command = [sys.executable, "-c", LIMITED, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"] and path.read_text() == "old"


def test_the_report_escapes_what_it_shows():
    pytest.importorskip("matplotlib")
    evil = "<script>alert('&')</script>"
    about = json.loads(json.dumps(ABOUT).replace("a/target", evil).replace("a/drafter", evil)) | {"command": evil}
    about["hardware"]["cpu"] = about["versions"]["vllm"] = evil
    found = findings()
    found.unfinished, found.failed = [evil], {"none": evil}
    page = html_report(found, about, f"model: {evil}\n")
    assert page.count("&lt;script&gt;alert(") == 8 and "<script" not in page


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A drafter that brings code of its own, and the file that this code makes."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    made = tmp_path / "made"
    drafter = model_folder(tmp_path / "drafter", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (drafter / "configuration_own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(made)!r}).touch()\nclass OwnConfig(LlamaConfig):\n    model_type = 'llama'\n"
    )
    return drafter, made


@pytest.mark.parametrize("trusted", [False, True])
def test_the_drafters_code_runs_only_where_the_user_trusts_it(with_code, trusted):
    drafter, made = with_code
    plugin.register()
    args = EngineArgs(str(TARGET), speculative_config=easyspec(drafter), trust_remote_code=trusted)
    args.create_engine_config()
    assert made.exists() == trusted


def test_doctor_never_runs_it(with_code, capsys):
    drafter, made = with_code
    assert main(["doctor", str(CONFIGS / "tiny-pair.yaml"), "--drafter", str(drafter)]) == 0
    assert not made.exists()


@pytest.mark.parametrize("development", [False, True])
def test_rpcs_have_a_route_only_in_development_mode(monkeypatch, development):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", str(int(development)))
    app = FastAPI()
    app.state.args = SimpleNamespace()
    register_api_routers(app.state.args, app, ("generate",))
    routes = {route.path for route in app.routes}
    assert "/v1/completions" in routes
    assert ("/collective_rpc" in routes) == development
    assert not any("easyspec" in route for route in routes)
