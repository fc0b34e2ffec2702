"""`vllm-easyspec doctor` and `schema`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import CONFIGS, DRAFTER, HF_CONFIGS, TARGET, easyspec, model_folder
from transformers import AutoConfig
from vllm.transformers_utils.config import get_config

from vllm_easyspec import support
from vllm_easyspec.cli import main
from vllm_easyspec.doctor import rank_memory
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.placement import LayerPlacement, MlpPlacement

TINY = str(CONFIGS / "tiny-pair.yaml")


def doctor(capsys, *arguments):
    """Exit code, the report's lines by their first word, and standard error."""
    code = main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, {re.match(r"\w+( \d+)?", line)[0]: line for line in out.splitlines()}, err


def test_a_sound_pair(capsys):
    code, report, err = doctor(capsys, TINY, "--model", TARGET, "--tensor-parallel-size", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM, 10 layers, 4 heads, 2 K/V heads of 32" in report["drafter"]
    assert "1-4-4-1, scope attention: 14 sequential sublayers, the precise pass has 20" in report["plan"]
    assert "layers 0, 2, 4, 6, 8;" in report["rank 0"] and "layers 1, 3, 5, 7, 9;" in report["rank 1"]
    assert "K/V 1280 bytes per token" in report["rank 0"], "5 layers x K and V x 2 heads x 32 x 2 bytes"
    assert "512 tokens in both" in report["vocabulary"]
    assert re.search(r"vllm 0\.\d+.*torch .*python .*vllm-easyspec ", report["versions"])


def test_plans_by_batch_size(capsys, tmp_path):
    path = tmp_path / "table.yaml"
    table = [{"up_to": 4, "scope": "block", "plan": "1-8-1", "num_speculative_tokens": 2}, {"group_size": 2}]
    path.write_text(yaml.safe_dump(easyspec(layer_parallel={"by_batch_size": table})))
    assert main(["doctor", str(path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("by batch")]
    assert lines == [
        "by batch    up to 4: 1-8-1, scope block, K=2",
        "by batch    beyond: 1-2-2-2-2-1, scope attention, K=4",
    ]


def test_more_ranks_than_layers(capsys):
    code, report, _ = doctor(capsys, TINY, "-tp", 16)
    assert code == 0
    assert "attention of layers none;" in report["rank 15"] and "K/V 0 bytes per token" in report["rank 15"]


def test_the_command_is_installed():
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm-easyspec"), "doctor", TINY, "--model", TARGET, "-tp", "2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "512 tokens in both" in done.stdout


WITHOUT_VLLM = """
import sys
from vllm_easyspec.cli import main
from vllm_easyspec.versions import vllm_version
code, version = main(["doctor", *sys.argv[1:]]), vllm_version()
print(sorted(name for name in sys.modules if name.split(".")[0] == "vllm"))
import vllm.version
print(code, version == vllm.version.__version__)
"""


def test_a_folder_is_checked_without_importing_vllm():
    command = [sys.executable, "-c", WITHOUT_VLLM, TINY, "--device", "cpu", "-tp", "2"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-2:] == ["[]", "0 True"], "importing vLLM takes longer than all of doctor"


@pytest.mark.parametrize("folder", [*sorted(HF_CONFIGS.iterdir()), DRAFTER, TARGET], ids=lambda folder: folder.name)
def test_it_reads_a_folder_as_vllm_does(folder):
    assert support._is_plain(folder)
    ours, theirs = support.read_hf_config(str(folder), None), get_config(folder, trust_remote_code=False)
    assert ours.to_dict() == theirs.to_dict()
    assert DrafterShape.from_hf_config(ours) == DrafterShape.from_hf_config(theirs)


@pytest.mark.parametrize(
    "changes",
    [{"auto_map": {}}, {"quantization_config": {"quant_method": "gptq"}}, {"model_type": "phi"}, {"model_type": None}],
    ids=str,
)
def test_it_leaves_other_folders_to_vllm(tmp_path, changes):
    assert support._is_plain(model_folder(tmp_path / "plain"))
    assert not support._is_plain(model_folder(tmp_path / "other", **changes))


@pytest.mark.parametrize("name", ["hf_quant_config.json", "params.json"])
def test_it_leaves_a_folder_with_other_files_to_vllm(tmp_path, name):
    folder = model_folder(tmp_path / "model")
    (folder / name).write_text("{}")
    assert not support._is_plain(folder)


def test_a_line_and_exit_code_1_for_what_cannot_work(capsys, tmp_path):
    larger = model_folder(tmp_path / "larger", vocab_size=1024)
    phi = model_folder(tmp_path / "phi", architectures=["PhiForCausalLM"], model_type="phi")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(easyspec(layer_parallel={"plan": "1-4-4"})))
    for arguments, message in [
        (["nowhere.yaml"], "speculative_config='nowhere.yaml' can't be read"),
        ([json.dumps(easyspec(num_speculative_tokens=0))], "num_speculative_tokens=0 is not allowed"),
        ([json.dumps({"method": "ngram"})], "method='ngram' is not easyspec"),
        ([json.dumps(easyspec(tmp_path / "none"))], "does not exist. Give the drafter's folder"),
        ([wrong], "layer_parallel.plan=1-4-4: the group sizes add up to 9, but the drafter has 10 layers"),
        ([TINY, "--drafter", phi], "architectures=['PhiForCausalLM'] is not a drafter that easyspec can run"),
        ([TINY, "--drafter", larger, "--model", TARGET], "vocab_size=1024, the target's vocab_size=512"),
        ([TINY, "--model", tmp_path], f"model='{tmp_path}' can't be read"),
        ([TINY, "-tp", "0"], "tensor_parallel_size=0 is not allowed"),
    ]:
        code, report, err = doctor(capsys, *arguments)
        assert code == 1 and not report
        assert err.startswith("vllm-easyspec doctor: error: ") and message in err
        assert err.count("\n") == 1


def test_another_vllm(capsys, monkeypatch):
    import vllm.version

    monkeypatch.setattr(vllm.version, "__version__", "0.31.0")
    code, _, err = doctor(capsys, TINY)
    assert code == 1 and "needs vLLM >=0.32,<0.34, but vLLM 0.31.0 is installed" in err


@pytest.mark.parametrize("mlp", MlpPlacement)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_hold_the_drafter_once(ranks, mlp):
    """Attention, K/V, embedding and tensor-parallel MLPs add up to one drafter; norms and replicas are on all ranks."""
    shape = DrafterShape.from_hf_config(AutoConfig.from_pretrained(DRAFTER))
    placement = LayerPlacement(shape.num_layers, ranks)
    memories = [rank_memory(shape, placement, mlp, rank, itemsize=2) for rank in range(ranks)]
    assert sum(memory.attention for memory in memories) == 2 * shape.num_layers * shape.attention_parameters()
    assert sum(memory.kv_per_token for memory in memories) == 2 * 2 * shape.num_layers * shape.kv_size
    final_norms = 2 * shape.hidden_size * ranks
    assert sum(memory.embedding for memory in memories) == 2 * shape.embedding_parameters() + final_norms
    mlps = 2 * shape.num_layers * shape.mlp_parameters()
    norms = 2 * shape.num_layers * shape.hidden_size
    copies = mlps * ranks if mlp is MlpPlacement.REPLICATE else mlps + norms * (ranks - 1)
    assert sum(memory.mlp for memory in memories) == copies


@pytest.mark.parametrize("rank", [0, 1])
def test_the_count_is_what_a_worker_reports(rank):
    """A live engine's two ranks logged these for the tiny pair in float32, MLPs replicated."""
    shape = DrafterShape.from_hf_config(AutoConfig.from_pretrained(DRAFTER))
    memory = rank_memory(shape, LayerPlacement(shape.num_layers, 2), MlpPlacement.REPLICATE, rank, itemsize=4)
    assert (memory.weights, memory.kv_per_token) == (7_020_544, 2_560)


def test_schema(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"method", "model", "num_speculative_tokens"}
    assert all("description" in field for field in schema["properties"].values())
