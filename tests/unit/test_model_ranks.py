"""The arithmetic of `benchmarks/model_ranks.py`, on a drafter whose times are worked out by hand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_easyspec.drafter.placement import MlpPlacement
from vllm_easyspec.drafter.plan import DraftPlan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import model_ranks as model

# 1 byte a microsecond; the shortest kernel takes 10 us.
SLOW = model.Hardware(bandwidth=1e6, kernel_us=10, tensor_flops=1e6, link=1e6)
SHAPE = replace(
    model.read_shape("Qwen3-0.6B"),
    num_layers=4,
    hidden_size=10,
    intermediate_size=20,
    num_heads=2,
    num_kv_heads=1,
    head_dim=5,
    vocab_size=100,
)
PRECISE = DraftPlan.precise(4)
ATTENTION, BLOCK = DraftPlan((1, 2, 1), "attention"), DraftPlan((1, 2, 1), "block")


def drafter(ranks: int, mlp: MlpPlacement = MlpPlacement.TENSOR) -> model.Model:
    return model.Model(SHAPE, ranks, batch=1, context=3, hardware=SLOW, mlp=mlp)


def test_one_rank():
    # Products of 10 x 20 and 10 x 10 numbers of 2 bytes, keys and values of 3 x 2 x 5 numbers, two fixed kernels.
    attention = 400 + 60 + 200 + 20
    # Gate and up 10 x 40, down 20 x 10, norm and SwiGLU.
    mlp = 800 + 400 + 20
    ends = 30 + 2 * 100 * 10
    assert drafter(1).step(PRECISE) == 4 * (attention + mlp) + ends
    assert drafter(1).tensor_parallel_step() == 4 * (attention + mlp) + ends
    # Two layers side by side read twice the bytes and save the fixed kernels of one.
    assert drafter(1).step(ATTENTION) == 4 * (attention + mlp) + ends - 20
    assert drafter(1).step(BLOCK) == 4 * (attention + mlp) + ends - 40


def test_two_ranks():
    small = 3.7  # every all-reduce here is below 512 bytes
    attention = 400 + 60 + 200 + 20 + 20 + small  # whole on one rank, and the two kernels around its collective
    mlp = 400 + 200 + 20 + small
    ends = 30 + 1000 + 2 * small
    assert drafter(2).step(PRECISE) == pytest.approx(4 * (attention + mlp) + ends)
    # The group's two attentions take the time of one, with one collective.
    assert drafter(2).step(ATTENTION) == pytest.approx(3 * attention + 4 * mlp + ends)
    block = 3 * attention + 2 * mlp + (800 + 400 + 20 + small) + ends
    assert drafter(2).step(BLOCK) == pytest.approx(block)
    tensor = 200 + 30 + 100 + 20 + small
    assert drafter(2).tensor_parallel_step() == pytest.approx(4 * (tensor + mlp) + ends)


def test_replicated_mlps_read_everything_and_have_no_collective():
    tensor, whole = drafter(2), drafter(2, MlpPlacement.REPLICATE)
    assert whole.mlps(1) == 800 + 400 + 20
    assert whole.tensor_parallel_step() == tensor.tensor_parallel_step()


def test_heads_that_ranks_do_not_divide_have_no_tensor_parallel_step():
    assert drafter(4).tensor_parallel_step() is None
    assert drafter(4).step(ATTENTION) > 0


def test_all_reduce_between_the_tables_sizes():
    assert model.all_reduce_us(1, 1, SLOW) == 0
    assert model.all_reduce_us(100, 8, SLOW) == 5.9
    assert model.all_reduce_us((512 + 4096) / 2, 2, SLOW) == pytest.approx((3.7 + 3.9) / 2)
    assert model.all_reduce_us(1048576, 4, SLOW) == 31.1
    assert model.all_reduce_us(1048576 + 7, 4, SLOW) == pytest.approx(31.1 + 7)


def test_a_prompts_attention_is_on_one_rank():
    ours, cut = model.prompt_ms(drafter(1), tokens=10)
    products, scores, mlp = 2 * 10 * 10 * 30, 2 * 10 * 10 * 10, 6 * 10 * 10 * 20
    assert ours == cut == pytest.approx(1e3 * 4 * (products + scores + mlp) / 1e6)
    ours, cut = model.prompt_ms(drafter(2), tokens=10)
    reduced = 2 * 3.7e-6
    assert ours == pytest.approx(1e3 * 4 * ((products + scores + mlp / 2) / 1e6 + reduced))
    assert cut == pytest.approx(1e3 * 4 * ((products + scores + mlp) / 2 / 1e6 + reduced))


def test_the_fit_reproduces_the_measured_step():
    shape, plan = model.read_shape("Qwen2.5-0.5B-Instruct"), DraftPlan.precise(24)
    fitted = model.fitted(model.H200, shape, {"bandwidth_tb_s": 4.0, "step_ms": 0.9, "batch": 1})
    assert fitted.bandwidth == 4e12 and 0.5 < fitted.kernel_us < 20
    assert model.make(shape, 1, 1, 256, fitted).step(plan) == pytest.approx(900, rel=1e-3)
    with pytest.raises(ValueError, match="a precise step of 0.01 ms is shorter than its bytes take"):
        model.fitted(model.H200, shape, {"bandwidth_tb_s": 4.0, "step_ms": 0.01, "batch": 1})
