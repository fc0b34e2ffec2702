"""Engines whose drafter is quantized, when it is loaded or as a checkpoint: the output is the target's, pages precise.

"Precise" is what the same quantized drafter computes, since the audit recomputes pages with its weights.
"""

import pytest
import torch
from engines import DRAFTER, assert_precise_mid_flight, assert_same_output_by_many_drafts, easyspec, engine
from tiny_targets import gptq, int8

from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.packing import QUANTIZATIONS
from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def llm(request, target_alone):
    config = easyspec(quantization="int8_per_channel_weight_only", layer_parallel={"mlp": "tensor"})
    with engine(speculative_config=config, tensor_parallel_size=request.param) as llm:
        yield llm


def dtypes_and_logits(quantization: str | None) -> tuple[set[torch.dtype], torch.Tensor]:
    """Of the drafter's matrices, and what it makes of a few tokens."""
    drafter = EnginelessDrafter(DRAFTER, RuntimeOptions(quantization=quantization))
    model = drafter.model
    matrices = [model.wqkv, model.wo, model.w_gate_up, model.w_down, model.head.lm_head.weight]
    return {matrix.dtype for matrix in matrices}, drafter.logits(drafter.read([list(range(40, 60))]))


def test_all_matrices_are_quantized_and_the_drafter_nearly_the_same():
    _, exact = run_ranks(1, dtypes_and_logits, None)[0]
    for name, dtype in QUANTIZATIONS.items():
        dtypes, logits = run_ranks(1, dtypes_and_logits, name)[0]
        assert dtypes == {dtype}
        assert 0 < (logits - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_output_is_the_targets(llm, target_alone, scope):
    assert_same_output_by_many_drafts(llm, target_alone[60], scope)


def test_audit_is_clean_mid_flight(llm):
    assert_precise_mid_flight(llm)


@pytest.mark.parametrize("checkpoint", [int8, gptq], ids=["int8", "gptq"])
def test_a_quantized_checkpoint(checkpoint, target_alone, tmp_path):
    with engine(speculative_config=easyspec(checkpoint(tmp_path / "drafter", like=DRAFTER))) as llm:
        assert_same_output_by_many_drafts(llm, target_alone[60], "attention")
        assert_precise_mid_flight(llm)
