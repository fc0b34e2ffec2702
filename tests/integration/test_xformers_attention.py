"""xformers' paged attention against plain attention, and as the drafter's backend, in Triton's interpreter."""

import importlib.metadata
import math
import os

import numpy as np
import pytest
import torch
from drafter_cases import CASES, make_checkpoint
from test_triton_attention import NEXT, PROMPTS
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter import xformers_attention
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.drafter.xformers_attention import HEAD_SIZES, Runs, XFormersBackend, paged_attention, why_unusable
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.ranks import run_ranks

os.environ["XFORMERS_ENABLE_TRITON"] = "1"  # without it xformers requires a CUDA device before it imports its kernel

CASE = next(case for case in CASES if case.name == "llama3_rope")
needs_xformers = pytest.mark.skipif(why_unusable() is not None, reason=f"xformers: {why_unusable()}")


@pytest.mark.parametrize("lens", [[1, 1, 1], [6, 6], [3, 40, 1, 17], [0, 5, 0], [16]])
def test_runs_bring_every_query_back_and_show_it_the_keys_up_to_itself(lens):
    starts = np.concatenate([[0], np.cumsum(lens)])
    runs = Runs.cut(starts, max(lens), torch.device("cpu"))
    assert runs.width <= 16 and len(runs.sequence) & (len(runs.sequence) - 1) == 0
    assert runs.take[runs.back].tolist() == list(range(sum(lens)))
    seq_lens = np.array([100 + length for length in lens])  # 100 keys before the queries
    for sequence, length in enumerate(lens):
        for offset in range(length):
            row = int(runs.back[starts[sequence] + offset])
            run, place = divmod(row, runs.width)
            assert runs.sequence[run] == sequence
            keys = seq_lens[sequence] - int(runs.unseen[run]) - (runs.width - 1 - place)
            assert keys == 100 + offset + 1


@needs_xformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("by_head", [False, True], ids=["token-by-token", "head-by-head"])
@pytest.mark.parametrize(("page_size", "heads", "width"), [(16, 4, 1), (32, 2, 8), (48, 4, 16)])
def test_paged_attention_is_attention(dtype, by_head, page_size, heads, width):
    _compare(dtype, by_head, page_size, heads, width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_xformers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_head", [False, True], ids=["token-by-token", "head-by-head"])
@pytest.mark.parametrize(("page_size", "heads", "width", "size"), [(16, 8, 1, 64), (32, 14, 8, 64), (64, 8, 16, 128)])
def test_paged_attention_on_a_gpu(dtype, by_head, page_size, heads, width, size):
    with torch.device("cuda"):
        _compare(dtype, by_head, page_size, heads, width, size)


def _compare(dtype, by_head, page_size, heads, width, size=32) -> None:
    """The error is at most twice that of plain attention in the same precision."""
    torch.manual_seed(0)
    pages, kv_heads, sequences = 16, 2, 4
    shape = (pages, kv_heads, page_size, 2 * size) if by_head else (pages, page_size, kv_heads, 2 * size)
    cache = torch.randn(shape, dtype=dtype)
    keys, values = (cache if by_head else cache.transpose(1, 2)).split(size, dim=-1)
    table = torch.randperm(pages).view(sequences, -1).int()
    seq_lens = torch.tensor([width, 4 * page_size, page_size + 1 + width, 2 * page_size], dtype=torch.int32)
    query = torch.randn(sequences * width, heads, size, dtype=dtype)
    out = paged_attention(query, keys, values, table, seq_lens, width, 1 / math.sqrt(size))
    exact, same_precision = (_attention(query, keys, values, table, seq_lens, width, t) for t in (torch.float64, dtype))
    error = (out.double() - exact).abs().max()
    assert exact.abs().max() > 0.5
    assert error <= 2 * (same_precision.double() - exact).abs().max()


def _attention(query, keys, values, table, seq_lens, width, dtype) -> torch.Tensor:
    """Plain attention in `dtype`."""
    out = []
    for sequence, length in enumerate(seq_lens.tolist()):
        k, v = (t[table[sequence].long()].transpose(0, 1).flatten(1, 2)[:, :length].to(dtype) for t in (keys, values))
        q = query.unflatten(0, (-1, width))[sequence].transpose(0, 1).to(dtype)
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        visible = torch.arange(length) <= torch.arange(length - width, length).unsqueeze(1)
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def observe(folder: str) -> dict[str, list[np.ndarray]]:
    """On a rank: hidden states of the prompts, of a fuzzy step and of another precise pass, by attention."""
    os.environ["XFORMERS_ENABLE_TRITON"] = "1"
    # vLLM's CPU platform has one backend only, whatever is asked for.
    CpuPlatform.get_attn_backend_cls = classmethod(
        lambda cls, selected, *_, **__: (selected or AttentionBackendEnum.CPU_ATTN).get_path()
    )
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # sizes tiles of Triton's kernels
    seen = {}
    for attention, name in (("backend", "CPU_ATTN"), ("xformers", "XFORMERS")):
        options = RuntimeOptions(grouped_attention=attention)
        drafter = EnginelessDrafter(folder, options, max_num_reqs=3, max_len=96, block_size=CASE.block_size)
        assert {layer.attn_backend.get_name() for layer in drafter.pages.layers} == {name}
        fuzzy = DraftPlan(CASE.plans[0])
        hidden = [drafter.read(PROMPTS), drafter.read(NEXT, fuzzy), drafter.read([[5, 6, 7], [9], [2, 2]])]
        seen[attention] = [states.numpy() for states in hidden]
    return seen


@needs_xformers
@pytest.mark.engine
def test_the_drafter_on_xformers_gives_what_cpu_attention_gives(tmp_path):
    make_checkpoint(CASE, tmp_path)
    (seen,) = run_ranks(1, observe, str(tmp_path))
    for cpu, xformers in zip(seen["backend"], seen["xformers"], strict=True):
        assert np.abs(cpu).max() > 0.1
        np.testing.assert_allclose(xformers, cpu, atol=1e-4, rtol=1e-4)


def test_what_xformers_cannot_do_is_named():
    def reasons(**changes):
        asked = dict(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, use_mla=False)
        asked |= dict(has_sink=False, use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False)
        asked |= dict(device_capability=xformers_capability(9), attn_type="decoder")
        return XFormersBackend.validate_configuration(**(asked | changes))

    assert reasons() == [] and all(reasons(head_size=size) == [] for size in HEAD_SIZES if size >= 32)
    assert reasons(head_size=80) == ["head_size not supported"]
    assert reasons(dtype=torch.float32) == ["dtype not supported"]
    assert reasons(has_sliding_window=True) == ["sliding window not supported"]
    assert reasons(device_capability=xformers_capability(7)) == ["compute capability not supported"]


def xformers_capability(major: int):
    from vllm.platforms.interface import DeviceCapability

    return DeviceCapability(major, 0)


def test_pages_in_another_order_are_refused():
    pages = torch.zeros(4, 3, 2, 16, 32).transpose(1, 2)[:, :, 0]
    with pytest.raises(ValueError, match="xformers can't read K/V pages with strides .* grouped_attention: backend"):
        xformers_attention._rows(pages, 1)


def test_a_missing_package_is_one_clear_error(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"'xformers' can't be used: the package xformers is not installed. Run pip"):
        xformers_attention.choose(None, "xformers")


def test_a_triton_without_block_pointers_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.35")
    monkeypatch.setattr("triton.__version__", "3.9.0")
    with pytest.raises(ConfigError, match="which Triton 3.9.0 no longer has. Install triton<3.9, or write"):
        xformers_attention.choose(None, "xformers")


@pytest.mark.parametrize(
    ("chosen", "usable", "expected"), [("FLASHINFER", False, None), ("FLASHINFER", True, "XFORMERS")]
)
def test_auto_takes_xformers_where_the_backend_cannot(monkeypatch, chosen, usable, expected):
    monkeypatch.setattr(xformers_attention, "_vllms_choice", lambda config: chosen)
    monkeypatch.setattr(xformers_attention, "why_unusable", lambda: None if usable else "missing")
    from vllm.config import VllmConfig

    if expected is None:
        with pytest.raises(ConfigError, match="attention_backend='FLASHINFER' is not supported"):
            xformers_attention.choose(VllmConfig(), "auto")
    else:
        assert xformers_attention.choose(VllmConfig(), "auto").attention_config.backend.name == expected


def test_auto_keeps_a_backend_that_serves(monkeypatch):
    config = object()
    monkeypatch.setattr(xformers_attention, "_vllms_choice", lambda config: "FLASH_ATTN")
    assert xformers_attention.choose(config, "auto") is config
