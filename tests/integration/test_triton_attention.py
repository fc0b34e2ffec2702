"""The drafter on vLLM's Triton attention backend, whose kernels run in Triton's interpreter on a CPU.

In place of a GPU: the backend's own metadata builder and kernels, on real pages, in float32.
"""

import numpy as np
import pytest
import torch
from drafter_cases import CASES, Case, make_checkpoint
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.ranks import run_ranks

pytestmark = pytest.mark.engine
CHOSEN = {case.name: case for case in CASES if case.name in ("llama3_rope", "mistral_window")}
PROMPTS = [[7, 3, 91, 15, 2, 88, 64] * 5, [4, 4, 9], [21, 55] * 20]  # on both sides of a block's end
NEXT = [[17], [30], [66]]


def _use(backend: AttentionBackendEnum) -> None:
    """vLLM's CPU platform has one backend only, whatever is asked for."""
    selector._cached_get_attn_backend.cache_clear()
    CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *_, **__: backend.get_path())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # sizes a tile of Triton's cache write


def observe(folder: str, case: Case) -> dict[str, list[np.ndarray]]:
    """On a rank: hidden states of the prompts, then of a fuzzy step, by backend."""
    seen: dict[str, list[np.ndarray]] = {}
    for name in ("CPU_ATTN", "TRITON_ATTN"):
        _use(AttentionBackendEnum[name])
        drafter = EnginelessDrafter(folder, max_num_reqs=3, max_len=96, block_size=case.block_size)
        assert {layer.attn_backend.get_name() for layer in drafter.pages.layers} == {name}
        hidden = [drafter.read(PROMPTS), drafter.read(NEXT, DraftPlan(case.plans[0]))]
        seen[name] = [states.numpy() for states in hidden]
    return seen


@pytest.mark.parametrize("name", CHOSEN)
def test_the_triton_backend_gives_what_cpu_attention_gives(name, tmp_path):
    make_checkpoint(CHOSEN[name], tmp_path)
    (seen,) = run_ranks(1, observe, str(tmp_path), CHOSEN[name])
    for cpu, triton in zip(seen["CPU_ATTN"], seen["TRITON_ATTN"], strict=True):
        assert np.abs(cpu).max() > 0.1
        np.testing.assert_allclose(triton, cpu, atol=1e-4, rtol=1e-4)
