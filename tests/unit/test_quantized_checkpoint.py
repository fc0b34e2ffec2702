"""Quantized checkpoints are read as the weights that they stand for, in every supported format."""

import json

import pytest
import torch
from tiny_models import easyspec, model_folder

from vllm_easyspec.cli import main
from vllm_easyspec.drafter.quantized_checkpoint import decompressed, unsupported

INPUTS, OUTPUTS, GROUP = 64, 32, 16
LAYER = "model.layers.0.mlp.up_proj"
OTHERS = {
    "model.norm.weight": torch.ones(4),
    "model.embed_tokens.weight": torch.ones(8, 4),
    f"{LAYER}.bias": torch.arange(float(OUTPUTS)),
}


def random_levels(lowest: int, highest: int, *shape: int) -> torch.Tensor:
    return torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_scales(*shape: int) -> torch.Tensor:
    return 0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(1))


def packed(levels: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """`[rows, columns]` of unsigned levels to `[rows, columns / values] int32`; value i of each in bits `order[i]`."""
    values = 32 // bits
    order = order or range(values)
    words = torch.zeros(levels.shape[0], levels.shape[1] // values, dtype=torch.int64)
    for slot, value in enumerate(order):
        words |= levels[:, value::values] << (bits * slot)
    return (words - (words >= 2**31).long() * 2**32).int()


def compressed_tensors(form: str, weights: dict, activations: dict | None = None) -> dict:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }


def int8():
    levels, scales = random_levels(-127, 127, OUTPUTS, INPUTS), random_scales(OUTPUTS, 1)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = compressed_tensors("int-quantized", weights, tokens)
    return config, {"weight": levels.to(torch.int8), "weight_scale": scales}, levels * scales


def fp8_per_tensor():
    levels, scale = (random_levels(-100, 100, OUTPUTS, INPUTS) / 8).to(torch.float8_e4m3fn), torch.tensor([0.25])
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    config = compressed_tensors("float-quantized", weights, weights | {"dynamic": False})
    return config, {"weight": levels, "weight_scale": scale, "input_scale": scale}, levels.float() * 0.25


def int4_in_groups():
    levels, scales = random_levels(0, 15, OUTPUTS, INPUTS), random_scales(OUTPUTS, INPUTS // GROUP)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    tensors = {
        "weight_packed": packed(levels, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
    }
    return compressed_tensors("pack-quantized", weights), tensors, (levels - 8) * scales.repeat_interleave(GROUP, 1)


def awq():
    """The order of values in a word is AutoAWQ's."""
    levels, zeros = random_levels(0, 15, INPUTS, OUTPUTS), random_levels(0, 15, INPUTS // GROUP, OUTPUTS)
    scales, order = random_scales(INPUTS // GROUP, OUTPUTS), [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": packed(levels, 4, order), "qzeros": packed(zeros, 4, order), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return config, tensors, ((levels - spread(zeros)) * spread(scales)).t()


def spread(groups: torch.Tensor) -> torch.Tensor:
    return groups.repeat_interleave(GROUP, 0)


def gptq(bits: int, version: str = "gptq"):
    """With inputs out of order, as `desc_act` leaves them. Version 1 stores zero points less one."""
    most, groups = 2**bits - 1, INPUTS // GROUP
    levels, zeros = random_levels(0, most, INPUTS, OUTPUTS), random_levels(1, most, groups, OUTPUTS)
    scales = random_scales(groups, OUTPUTS)
    of_input = torch.arange(INPUTS)[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(0))] // GROUP
    tensors = {
        "qweight": packed(levels.t(), bits).t().contiguous(),
        "qzeros": packed(zeros - int(version == "gptq"), bits),
        "scales": scales,
        "g_idx": of_input.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": True, "checkpoint_format": version}
    return config, tensors, ((levels - zeros[of_input]) * scales[of_input]).t()


def fp8():
    """As vLLM's and transformers' own method stores it, without blocks."""
    levels, scale = (random_levels(-100, 100, OUTPUTS, INPUTS) / 8).to(torch.float8_e4m3fn), torch.tensor(0.25)
    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    return config, {"weight": levels, "weight_scale": scale, "input_scale": scale}, levels.float() * 0.25


def fp8_in_blocks():
    levels, scales = (random_levels(-100, 100, OUTPUTS, INPUTS) / 8).to(torch.float8_e4m3fn), random_scales(2, 4)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    spread_scales = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return config, {"weight": levels, "weight_scale_inv": scales}, levels.float() * spread_scales


@pytest.mark.parametrize(
    "made",
    [int8(), fp8_per_tensor(), int4_in_groups(), awq(), gptq(4), gptq(8), gptq(4, "gptq_v2"), fp8(), fp8_in_blocks()],
    ids=["int8", "fp8 of tensors", "int4", "awq", "gptq", "gptq 8 bits", "gptq version 2", "fp8", "fp8 in blocks"],
)
class TestFormat:
    def test_its_weights(self, made):
        config, tensors, expected = made
        assert unsupported(config) is None
        stored = OTHERS | {f"{LAYER}.{part}": tensor for part, tensor in tensors.items()}
        read = dict(decompressed(stored.items(), config))
        assert read.keys() == {*OTHERS, f"{LAYER}.weight"}
        assert torch.allclose(read[f"{LAYER}.weight"].float(), expected.float(), rtol=1e-6)
        for name, tensor in OTHERS.items():
            assert read[name] is tensor

    def test_a_missing_part_is_named(self, made):
        config, tensors, _ = made
        first, *rest = tensors
        stored = {f"{LAYER}.{part}": tensors[part] for part in rest}
        with pytest.raises(ValueError, match="lacks") as error:
            dict(decompressed(stored.items(), config))
        assert repr(first) in str(error.value) and LAYER in str(error.value)


def test_an_unquantized_head_is_left_alone():
    config, tensors, _ = gptq(4)
    stored = {f"{LAYER}.{part}": tensor for part, tensor in tensors.items()} | {"lm_head.weight": torch.ones(2, 2)}
    assert dict(decompressed(stored.items(), config))["lm_head.weight"] is stored["lm_head.weight"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': supported are compressed-tensors, awq"),
        ({}, "quant_method=None: supported are"),
        (compressed_tensors("nvfp4-pack-quantized", {}), "format='nvfp4-pack-quantized': supported are int-quantized"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ other than 4 bits of version 'gemm'"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of bits=3"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm_head": {}}}, "rules by layer"),
    ],
)
def test_other_formats_are_refused(tmp_path, config, reason, capsys):
    assert reason in (unsupported(config) or "")
    folder = model_folder(tmp_path / "drafter", quantization_config=config)
    assert main(["doctor", json.dumps(easyspec(folder))]) == 1
    error = capsys.readouterr().err
    assert reason in error and "unquantized checkpoint" in error and error.count("\n") == 1
