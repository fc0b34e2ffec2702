"""The drafter's operators against slow oracles."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vllm_easyspec.ops import group_rms_norm, shift_block_table, shift_slots, silu_and_mul


def slots_by_loops(slots: list[int], num_layers: int, layer_stride: int) -> list[int]:
    return [-1 if slot < 0 else slot + layer * layer_stride for layer in range(num_layers) for slot in slots]


def tables_by_loops(table: list[list[int]], num_layers: int, num_blocks: int) -> list[list[int]]:
    return [[block + layer * num_blocks for block in row] for layer in range(num_layers) for row in table]


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_shifted_slots_equal_the_oracle_and_padding_stays(num_layers, tokens):
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randint(0, 13 * 32, (tokens,), generator=generator)
    slots[torch.rand(tokens, generator=generator) < 0.4] = -1
    shifted = shift_slots(slots, num_layers, 13 * 32)
    assert shifted.tolist() == slots_by_loops(slots.tolist(), num_layers, 13 * 32)


def test_padding_alone_stays_padding():
    assert shift_slots(torch.full((3,), -1), 4, 32).tolist() == [-1] * 12


def test_slots_do_not_overflow_32_bits():
    # 80 layers of 5 million blocks of 16 tokens: the last slots are past 2**32.
    slots, stride = [-1, 0, 79_999_999], 5_000_000 * 16
    shifted = shift_slots(torch.tensor(slots), 80, stride)
    assert shifted.dtype == torch.int64
    assert shifted.max() > 2**32
    assert shifted.tolist() == slots_by_loops(slots, 80, stride)


@pytest.mark.parametrize(("reqs", "width", "num_layers"), [(1, 1, 1), (3, 5, 4), (16, 2, 7)])
def test_shifted_block_tables_equal_the_oracle(reqs, width, num_layers):
    table = torch.randint(0, 29, (reqs, width), dtype=torch.int32)
    shifted = shift_block_table(table, num_layers, 29)
    assert shifted.dtype == torch.int32  # as attention kernels read it
    assert shifted.is_contiguous()
    assert shifted.tolist() == tables_by_loops(table.tolist(), num_layers, 29)


def test_block_tables_hold_page_numbers_up_to_32_bits():
    num_blocks = (2**31 - 1) // 80
    table = [[0, num_blocks - 1]]
    shifted = shift_block_table(torch.tensor(table, dtype=torch.int32), 80, num_blocks)
    assert shifted.tolist() == tables_by_loops(table, 80, num_blocks)


def test_a_sliced_block_table_is_shifted_alike():
    """vLLM hands out rows of a wider buffer."""
    table = torch.arange(60, dtype=torch.int32).view(6, 10)[1:4, :7]
    assert shift_block_table(table, 3, 100).tolist() == tables_by_loops(table.tolist(), 3, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input a layer"])
def test_group_rms_norm_is_as_exact_as_the_families_own(dtype, shared):
    torch.manual_seed(0)
    layers, tokens, hidden, eps = 3, 5, 48, 1e-5
    x = 3 * torch.randn(*([] if shared else [layers]), tokens, hidden).to(dtype)
    weights = (1 + 0.3 * torch.randn(layers, hidden)).to(dtype)
    normed = group_rms_norm(x, weights, eps)
    assert normed.shape == (layers, tokens, hidden) and normed.dtype == dtype
    for layer in range(layers):
        own = (x if shared else x[layer]).double()
        exact = own / (own.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[layer].double()
        norm = LlamaRMSNorm(hidden, eps)
        norm.weight.data = weights[layer]
        families = norm(own.to(dtype)).detach()
        assert (normed[layer] - exact).abs().max() <= 2 * (families - exact).abs().max()


@pytest.mark.parametrize("shape", [(2,), (5, 14), (3, 4, 96)])
def test_silu_and_mul_takes_gates_first(shape):
    torch.manual_seed(0)
    gate_up = torch.randn(shape)
    half = shape[-1] // 2
    gate, up = gate_up[..., :half].double(), gate_up[..., half:].double()
    torch.testing.assert_close(silu_and_mul(gate_up), (gate / (1 + torch.exp(-gate)) * up).float())
