"""The entry point: what it registers, when it refuses, and that it changes nothing where easyspec is not asked for."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
from tiny_models import DRAFTER, ROOT, TARGET, easyspec, model_folder
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from vllm_easyspec import compat, plugin
from vllm_easyspec.versions import Support, UnsupportedVllmError, require_supported

IMPORTED_EVERYWHERE = {
    "vllm_easyspec",
    "vllm_easyspec.plugin",
    "vllm_easyspec.versions",
    "vllm_easyspec.compat",
    "vllm_easyspec.support",
    "vllm_easyspec.config",
    "vllm_easyspec.drafter",
    "vllm_easyspec.documents",
    "vllm_easyspec.drafter.plan",
    "vllm_easyspec.drafter.quantized_checkpoint",
    "vllm_easyspec.errors",
    "vllm_easyspec.last_words",
    "vllm_easyspec.round_reports",
    "vllm_easyspec.drafter.vocabulary",
    "vllm_easyspec.drafter.architectures",
}
PATCHED = ("add_cli_args", "create_engine_config", "create_speculative_config")


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A new process, because plugins are loaded once per process."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_entry_point_is_ours():
    (entry,) = (point for point in metadata.entry_points(group="vllm.general_plugins") if point.name == "easyspec")
    assert entry.load() is plugin.register


def test_register_may_be_called_in_every_process_and_again():
    load_general_plugins()
    plugin.register()
    before = [getattr(EngineArgs, name) for name in PATCHED]
    plugin.register()
    assert compat.apply() is False
    assert [getattr(EngineArgs, name) for name in PATCHED] == before
    assert all(compat.is_patched(name) for name in PATCHED)
    assert plugin.DRAFTER_ARCHITECTURE in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize("name", PATCHED)
def test_a_second_patch_is_refused(name):
    plugin.register()
    with pytest.raises(RuntimeError, match=f"EngineArgs.{name} is patched already"):
        compat._patch(name, lambda original: original)
    assert not hasattr(getattr(EngineArgs, name)._easyspec_original, "_easyspec_original"), "wrapped twice"


# Prints what a user of vLLM without easyspec can see: the arguments, and the engine configurations made of them.
WITHOUT_EASYSPEC = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
seen = {"options": sorted(parser._option_string_actions)}
ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
draft = {"method": "draft_model", "model": sys.argv[2], "num_speculative_tokens": 2}
written = {
    "none": [],
    "empty": ["--speculative-config", ""],
    "ngram": ["-sc", json.dumps(ngram)],
    "dotted": ["--speculative-config.method", "ngram", "--speculative-config.num_speculative_tokens", "3"],
    "flags": ["--spec-method", "draft_model", "--spec-model", sys.argv[2], "--spec-tokens", "2"],
}
for name, arguments in written.items():
    parsed = parser.parse_args(["--model", sys.argv[1], "--max-model-len", "256", *arguments])
    args = AsyncEngineArgs.from_cli_args(parsed)
    config = args.create_engine_config()
    seen[name] = [parsed.speculative_config, args.worker_cls, args.additional_config, config.compute_hash()]
    seen[name] += [repr(config.speculative_config), str(config).replace(config.instance_id, "")]
for name, value in {"ngram": ngram, "draft": draft}.items():
    args = EngineArgs(model=sys.argv[1], max_model_len=256, speculative_config=dict(value))
    config = args.create_engine_config()
    seen["LLM " + name] = [config.compute_hash(), type(config.speculative_config).__name__, args.worker_cls]
    seen["LLM " + name] += [config.speculative_config.method, config.parallel_config.worker_cls]
for wrong in ({"method": "magic"}, {"method": "ngram", "nonsense": 1}, {"method": "draft_model", "model": sys.argv[3],
              "num_speculative_tokens": 2}):
    try:
        EngineArgs(model=sys.argv[1], max_model_len=256, speculative_config=wrong).create_engine_config()
    except Exception as error:
        seen[str(wrong)] = type(error).__name__ + str(error)[:150]
from vllm.engine import arg_utils
patched = hasattr(arg_utils.EngineArgs.create_engine_config, "_easyspec_original")
ours = sorted(name for name in sys.modules if name.startswith("vllm_easyspec"))
print(json.dumps([patched, ours, seen]))
"""


def test_installed_but_unused_it_changes_nothing(tmp_path):
    """The same answers with the plugin loaded and with vLLM told to leave it out."""
    smaller = model_folder(tmp_path / "smaller", vocab_size=448)
    results = []
    for allowed in ({}, {"VLLM_PLUGINS": "triton_interpreter"}):
        done = run_python(WITHOUT_EASYSPEC, str(TARGET), str(DRAFTER), str(smaller), **allowed)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (patched, ours, with_plugin), (patched_too, ours_too, without_plugin) = results
    assert patched and not patched_too
    assert with_plugin == without_plugin
    assert not ours_too
    assert set(ours) <= IMPORTED_EVERYWHERE, "it is imported in every vLLM process, so it must stay small"
    assert "same vocabulary size" in str(with_plugin), "vLLM's own vocabulary check still holds for its own method"


@pytest.mark.parametrize(
    ("version", "support"),
    [
        ("0.32.0", Support.TESTED),
        ("0.32.1+cu130", Support.TESTED),
        ("0.33.0", Support.CHECKED),
        ("0.33.1.dev7+g1234567", Support.CHECKED),
        ("0.31.2", Support.UNSUPPORTED),
        ("0.34.0", Support.UNSUPPORTED),
        ("1.32.0", Support.UNSUPPORTED),
        ("dev", Support.UNSUPPORTED),
    ],
)
def test_versions(version, support):
    assert Support.of(version) is support
    if support is Support.UNSUPPORTED:
        with pytest.raises(UnsupportedVllmError, match=f"needs vLLM >=0.32,<0.34, but vLLM {version} is installed"):
            require_supported(version)
    else:
        require_supported(version)


OTHER_VERSION = """
import json, sys
import vllm.version
vllm.version.__version__ = sys.argv[1]
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))
ngram = {"method": "ngram", "num_speculative_tokens": 3}
config = EngineArgs(model=sys.argv[2], max_model_len=256, speculative_config=ngram).create_engine_config()
print(config.speculative_config, hasattr(EngineArgs.create_speculative_config, "_easyspec_original"))
try:
    EngineArgs(model=sys.argv[2], speculative_config=json.loads(sys.argv[3])).create_engine_config()
except RuntimeError as error:
    print(type(error).__name__, error)
parser.parse_args(["--speculative-config", sys.argv[3]])
"""


def test_a_vllm_without_our_seams_still_starts(monkeypatch):
    import vllm.version

    import vllm_easyspec

    plugin.register()
    monkeypatch.delattr(vllm_easyspec, "compat")
    monkeypatch.setitem(sys.modules, "vllm_easyspec.compat", None)
    with pytest.raises(ImportError):
        plugin.register()
    monkeypatch.setattr(vllm.version, "__version__", "0.9.0")
    plugin.register()


def test_another_vllm_is_left_alone_until_easyspec_is_asked_for():
    done = run_python(OTHER_VERSION, "0.31.0", str(TARGET), json.dumps(easyspec()))
    unused, refused = done.stdout.splitlines()[-2:]
    assert unused == "SpeculativeConfig(method='ngram', model=None, num_spec_tokens=3) False"
    message = "method: easyspec needs vLLM >=0.32,<0.34, but vLLM 0.31.0 is installed. Install such a vLLM"
    assert refused.startswith(f"UnsupportedVllmError {message}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"vllm serve: error: argument --speculative-config/-sc: {message}")
    assert "Traceback" not in done.stderr
