"""tools/check_seams.py on the installed vLLM, and on a copy of it in which a seam of each kind was changed."""

import importlib.util
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vllm_easyspec.versions import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
SPECULATOR = "v1/worker/gpu/spec_decode/speculator.py"


# What was changed, in which file, and what must be reported.
CHANGES = {
    "import": (
        "v1/worker/gpu/model_runner.py",
        "class GPUModelRunner(",
        "class ModelRunner(",
        "there is no vllm.v1.worker.gpu.model_runner.GPUModelRunner [vllm_easyspec/audit.py]",
    ),
    "field": (
        "v1/worker/gpu/input_batch.py",
        "    is_prefilling_np:",
        "    is_prefilling_cpu:",
        "vllm.v1.worker.gpu.input_batch:InputBatch has no is_prefilling_np [vllm_easyspec/batch.py]",
    ),
    "attribute": (
        SPECULATOR,
        "self.draft_tokens = torch.zeros(",
        "self.drafts = torch.zeros(",
        "DraftModelSpeculator has no draft_tokens [vllm_easyspec/speculator.py]",
    ),
    "keyword": (
        "model_executor/layers/rotary_embedding/__init__.py",
        "    rope_parameters: dict",
        "    rope_scaling: dict",
        "rotary_embedding:get_rope takes (head_size, max_position, is_neox_style, rope_scaling,",
    ),
    "order": (
        "v1/attention/backends/flash_attn.py",
        "        kv_cache: torch.Tensor,\n        slot_mapping: torch.Tensor,",
        "        slot_mapping: torch.Tensor,\n        kv_cache: torch.Tensor,",
        "FlashAttentionImpl.do_kv_cache_update takes (layer, key, value, slot_mapping, kv_cache), and we give",
    ),
    "new required field": (
        "v1/attention/backend.py",
        "    num_reqs: int\n",
        "    num_reqs: int\n    num_rows: int\n",
        "CommonAttentionMetadata takes (query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_rows,",
    ),
    "new optional parameter of a function that we replace": (
        "engine/arg_utils.py",
        "        target_parallel_config: ParallelConfig,\n    ) -> SpeculativeConfig",
        "        target_parallel_config: ParallelConfig,\n        more: int = 0,\n    ) -> SpeculativeConfig",
        "create_speculative_config takes (target_model_config, target_parallel_config, more), and we give",
    ),
    "new optional parameter of a method that we override": (
        SPECULATOR,
        "        num_speculative_tokens: int | None = None,\n",
        "        num_speculative_tokens: int | None = None,\n        more: int = 0,\n",
        "num_speculative_tokens, more), and EasySpecSpeculator's takes (self, input_batch, ",
    ),
    "overridden name is gone": (
        "config/speculative.py",
        "verify_equal_vocab_size_if_draft_model",
        "verify_vocabularies",
        "has no verify_equal_vocab_size_if_draft_model, and EasySpecSpeculativeConfig has to override",
    ),
    "new abstract method": (
        "model_executor/layers/attention_layer_base.py",
        "    @abstractmethod\n    def get_attn_backend(",
        "    @abstractmethod\n    def must_have(self): ...\n\n    @abstractmethod\n    def get_attn_backend(",
        "our DrafterAttention has no must_have, and DrafterAttention has to override",
    ),
    "new name that is ours": (
        "v1/worker/gpu_worker.py",
        "    def init_device(self):",
        "    def speculator(self): ...\n\n    def init_device(self):",
        "vllm.v1.worker.gpu_worker:Worker has speculator, which SpeculativeWorker would replace by accident",
    ),
    "text": (
        "engine/arg_utils.py",
        '"--speculative-config"',
        '"--speculation"',
        'vllm/engine/arg_utils.py does not say "--speculative-config" [vllm_easyspec/compat.py]',
    ),
    "kernel": (
        "v1/worker/gpu/input_batch.py",
        "def _post_update_kernel(\n",
        "def _post_update_kernel(\n    more_ptr,\n",
        "note: vllm.v1.worker.gpu.input_batch._post_update_kernel has other parameters than post_update",
    ),
}


@pytest.fixture(scope="module")
def check_seams():
    spec = importlib.util.spec_from_file_location("check_seams", ROOT / "tools" / "check_seams.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_seams"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed():
    return Path(importlib.util.find_spec("vllm").origin).parents[1]


@pytest.fixture(scope="module")
def changed(installed, tmp_path_factory):
    """A folder with links to vLLM's Python files, and the files that `CHANGES` changes."""
    folder = tmp_path_factory.mktemp("site-packages")

    def not_python(path, names):
        return [name for name in names if not name.endswith(".py") and not os.path.isdir(os.path.join(path, name))]

    shutil.copytree(installed / "vllm", folder / "vllm", ignore=not_python, copy_function=os.symlink)
    for path, old, new, _ in CHANGES.values():
        file = folder / "vllm" / path
        text = file.read_text()
        assert old in text
        file.unlink()
        file.write_text(text.replace(old, new))
    return folder


@pytest.fixture(scope="module")
def reported(check_seams, changed):
    return check_seams.check_all(changed)[1]


def test_installed_vllm_has_every_seam(check_seams, installed):
    count, mismatches = check_seams.check_all(installed)
    assert mismatches == []
    assert count > 150


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_seam_is_reported(reported, change):
    expected = CHANGES[change][-1]
    assert any(expected in mismatch for mismatch in reported), reported


def test_no_other_seam_is_reported(reported):
    expected = [change[-1] for change in CHANGES.values()]
    side_effects = [
        "GPUModelRunner",  # the renamed class, in the table too
        "CPUWorker has speculator",  # inherited
        "config/speculative.py does not say",  # the renamed method is called there
    ]
    assert [m for m in reported if not any(part in m for part in expected + side_effects)] == []


def test_exit_code_and_summary(check_seams, installed, changed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_seams.py", str(installed)])
    assert check_seams.main() == 0
    assert capsys.readouterr().out.endswith("seams checked, 0 mismatches\n")
    monkeypatch.setattr(sys, "argv", ["check_seams.py", str(changed)])
    assert check_seams.main() == 1


def test_a_folder_without_vllm_is_refused(check_seams, tmp_path):
    with pytest.raises(SystemExit, match="contains no package vllm. Give the folder that contains vllm/"):
        check_seams.check_all(tmp_path)


def listed_names(kinds):
    """Attributes and functions of vLLM that one of our files relies on, from its part of the table."""
    for names in kinds.get("has", {}).values():
        yield from names.split()
    for call in kinds.get("takes", []) + kinds.get("stands_for", []):
        name = re.split(r"[:.]", (call if isinstance(call, str) else call[0]).partition("(")[0])[-1]
        if name != "forward":  # a module's is called without its name
            yield name


def test_each_of_our_files_uses_what_is_listed_for_it():
    unused = []
    for ours, kinds in tomllib.loads((ROOT / "tools" / "seams.toml").read_text()).items():
        used = set(re.findall(r"\w+", (ROOT / ours).read_text()))
        unused += [f"{ours}: {name}" for name in listed_names(kinds) if name not in used]
    assert not unused


def test_forms_for_several_versions_are_still_needed():
    """The table has them because 0.32 and 0.33 differ. Without 0.32 they must go, and the code behind them too."""
    table = tomllib.loads((ROOT / "tools" / "seams.toml").read_text())
    alternatives = [calls for kinds in table.values() for calls in kinds.get("takes", []) if isinstance(calls, list)]
    optional = [
        name
        for kinds in table.values()
        for places in kinds.get("overrides", {}).values()
        for names in places.values()
        for name in names.split()
        if name.endswith("?")
    ]
    assert "0.32.0" in SpecifierSet(SUPPORTED) or not (alternatives or optional), "keep only the newer forms"
