"""A drafter with new weights computes what one that was loaded with them computes, or keeps its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_cases import CASES, PROMPTS, Case, make_checkpoint
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config

from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.update import ReceivedWeights, read_weights
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
OPTIONS = [
    {},
    {"quantization": "int8_per_channel_weight_only"},
    {"draft_vocabulary": 33, "quantization": "fp8_per_channel"},
]
CASE_NAMES = ("qwen3", "llama_biases_yarn_tied")  # an untied head, and one that is tied to the embedding


def open_drafter(folder: str, options: dict[str, Any]) -> EnginelessDrafter:
    return EnginelessDrafter(folder, RuntimeOptions(**options), max_num_reqs=len(PROMPTS), max_len=128)


@torch.inference_mode()
def computed(drafter: EnginelessDrafter) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all prompts, and the arg-max that drafting takes."""
    drafter.rewind([0] * len(PROMPTS))
    hidden = drafter.read(PROMPTS)
    return drafter.logits(hidden), drafter.model.get_top_tokens(hidden)


def addresses(drafter: EnginelessDrafter) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in drafter.model.named_parameters()}


def replace_weights(drafter: EnginelessDrafter, folder: Path) -> None:
    config = drafter.config
    model_config = copy.copy(config.model_config)
    model_config.model = str(folder)
    with set_current_vllm_config(config):
        drafter.model.replace_weights(read_weights(model_config, config.load_config, drafter.model.shape))


def in_chunks(drafter: EnginelessDrafter, tensors: dict[str, torch.Tensor]) -> None:
    """As a transfer engine brings them: one by one, in a buffer that is used again."""
    received = ReceivedWeights()
    buffer = torch.empty(max((tensor.numel() for tensor in tensors.values()), default=0))
    for name in sorted(tensors, reverse=True):
        view = buffer[: tensors[name].numel()].view_as(tensors[name]).copy_(tensors[name])
        received.load_weights([(name, view)])
    with set_current_vllm_config(drafter.config):
        drafter.model.replace_weights(received.tensors.items())


def check_case(folder: Path) -> None:
    old, new = folder / "old", folder / "new"
    for options in OPTIONS:
        first, expected = open_drafter(str(old), options), computed(open_drafter(str(new), options))
        present, places = computed(first), addresses(first)
        assert not torch.equal(present[0], expected[0])
        tensors = load_file(new / "model.safetensors")
        for broken, message in broken_updates(tensors):
            with pytest.raises(ValueError, match=f"keeps its present weights: .*{message}"):
                in_chunks(first, broken)
            assert all(map(torch.equal, computed(first), present))
        replace_weights(first, new)
        assert all(map(torch.equal, computed(first), expected))
        replace_weights(first, old)
        assert all(map(torch.equal, computed(first), present))
        in_chunks(first, tensors)
        assert all(map(torch.equal, computed(first), expected))
        assert addresses(first) == places, "graphs hold the addresses"


def broken_updates(tensors: dict[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], str]]:
    name = "model.layers.1.mlp.down_proj.weight"
    lacking = {key: tensor for key, tensor in tensors.items() if key != name}
    not_a_number = tensors[name].clone()
    not_a_number[-1, -1] = torch.nan  # in the last rank's part only
    return [
        (lacking, "lacks 1 tensors"),
        (tensors | {name: tensors[name].t().contiguous()}, "of shape"),
        (tensors | {name: not_a_number}, "NaN or infinity"),
        ({}, "lacks"),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    for case in CASES:
        if case.name in CASE_NAMES:
            make_checkpoint(case, root / case.name / "old")
            nudge(case, root / case.name)
    return root


def nudge(case: Case, folder: Path) -> None:
    make_checkpoint(case, folder / "new")
    tensors = load_file(folder / "new" / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    changed = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(changed, folder / "new" / "model.safetensors", {"format": "pt"})


def test_new_weights(root):
    run_ranks(2, check_all, str(root))


def check_all(root: str) -> None:
    for name in CASE_NAMES:
        check_case(Path(root) / name)
    check_other_shapes(Path(root))


def check_other_shapes(root: Path) -> None:
    drafter = open_drafter(str(root / "qwen3" / "old"), {})
    present = computed(drafter)
    refused = (("llama_biases_yarn_tied/new", "architecture='LlamaForCausalLM' in"), ("nowhere", "can't be read"))
    for folder, message in refused:
        with pytest.raises(ValueError, match=f"keeps its present weights: .*{message}"):
            replace_weights(drafter, root / folder)
        assert all(map(torch.equal, computed(drafter), present))
