"""`DrafterShape`: what is read from published `config.json` files, and what is refused."""

import pytest
from tiny_models import DRAFTER, HF_CONFIGS, model_folder
from transformers import AutoConfig

from vllm_easyspec.drafter.architectures import SUPPORTED_ARCHITECTURES, DrafterShape, UnsupportedDrafterError

# Parameters of the checkpoints, in millions, as their model cards and safetensors headers give them.
PUBLISHED_MILLIONS = {
    "Llama-3.2-1B-Instruct": 1236,
    "Llama-3.1-8B-Instruct": 8030,
    "Llama-3.3-70B-Instruct": 70554,
    "Qwen2.5-0.5B-Instruct": 494,
    "Qwen2.5-1.5B-Instruct": 1544,
    "Qwen2.5-7B-Instruct": 7616,
    "Qwen2.5-72B-Instruct": 72706,
    "Qwen2.5-Coder-0.5B-Instruct": 494,
    "Qwen2.5-Coder-1.5B-Instruct": 1544,
    "Qwen2.5-Coder-32B-Instruct": 32764,
    "Qwen3-0.6B": 596,
    "Qwen3-1.7B": 1721,
    "Qwen3-32B": 32762,
}


def shape_of(path) -> DrafterShape:
    return DrafterShape.from_hf_config(AutoConfig.from_pretrained(path))


def test_every_fixture_is_counted():
    assert {path.name for path in HF_CONFIGS.iterdir()} == set(PUBLISHED_MILLIONS)


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(name):
    shape = shape_of(HF_CONFIGS / name)
    layers = shape.num_layers * (shape.attention_parameters() + shape.mlp_parameters())
    total = layers + shape.embedding_parameters() + shape.hidden_size
    assert round(total / 1e6) == PUBLISHED_MILLIONS[name]


def test_switches_of_the_families():
    llama, qwen2, qwen3 = (
        shape_of(HF_CONFIGS / name) for name in ("Llama-3.2-1B-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen3-0.6B")
    )
    assert (llama.qkv_bias, llama.qk_norm, llama.tied_embeddings) == (False, False, True)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert llama.rope_parameters["rope_type"] == "llama3" and llama.rope_parameters["factor"] == 32.0
    assert qwen2.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert qwen2.sliding_window is None, "use_sliding_window: false"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Supported are LlamaForCausalLM"),
        ({"architectures": None}, r"architectures=\[\]"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method.*unquantized checkpoint"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "factor": 2.0}},
            "rope_type='longrope'.*supported are",
        ),
    ],
)
def test_variants_are_refused(tmp_path, changes, message):
    config = AutoConfig.from_pretrained(model_folder(tmp_path / "drafter"))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedDrafterError, match=message):
        DrafterShape.from_hf_config(config)


def test_mixed_windows_are_refused_and_one_window_is_kept():
    config = AutoConfig.from_pretrained(HF_CONFIGS / "Qwen2.5-0.5B-Instruct")
    config.use_sliding_window, config.sliding_window = True, 4096
    config.layer_types = ["full_attention"] * 12 + ["sliding_attention"] * 12
    with pytest.raises(UnsupportedDrafterError, match="all layers must share one window"):
        DrafterShape.from_hf_config(config)
    config.layer_types = ["sliding_attention"] * 24
    assert DrafterShape.from_hf_config(config).sliding_window == 4096


def test_the_refusal_lists_what_is_supported():
    config = AutoConfig.from_pretrained(DRAFTER)
    config.architectures = ["MixtralForCausalLM"]
    with pytest.raises(UnsupportedDrafterError) as refusal:
        DrafterShape.from_hf_config(config)
    assert all(name in str(refusal.value) for name in SUPPORTED_ARCHITECTURES)
