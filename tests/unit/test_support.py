"""Settings of an engine that easyspec refuses by name, and those that it must not refuse."""

import copy
from types import SimpleNamespace

import pytest
from tiny_models import HF_CONFIGS, TARGET, easyspec
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_easyspec import support
from vllm_easyspec.errors import ConfigError


@pytest.fixture(scope="module")
def plain():
    load_general_plugins()
    return EngineArgs(model=str(TARGET), max_model_len=256, speculative_config=easyspec()).create_engine_config()


def changed(config, path, value):
    """A copy with one attribute replaced; read-only properties of ModelConfig are overlaid."""
    config = copy.copy(config)
    *owners, name = path.split(".")
    holder = config
    for owner in owners:
        setattr(holder, owner, copy.copy(getattr(holder, owner)))
        holder = getattr(holder, owner)
    setattr(holder, name, value)
    return config


REFUSED = {
    "parallel_config.pipeline_parallel_size": (2, "pipeline_parallel_size=2 .*Use --tensor-parallel-size"),
    "parallel_config.decode_context_parallel_size": (2, "decode_context_parallel_size=2 .*Remove it"),
    "parallel_config.prefill_context_parallel_size": (2, "prefill_context_parallel_size=2 .*Remove it"),
    "cache_config.kv_offloading_size": (1.0, "kv_offloading_size=1.0 .*Remove it"),
    "cache_config.cache_dtype": ("fp8", "kv_cache_dtype='fp8' .*--kv-cache-dtype auto"),
    "parallel_config.enable_dbo": (True, "enable_dbo=True .*Remove it"),
}


@pytest.mark.parametrize("path", REFUSED)
def test_refused_by_name(plain, path):
    value, message = REFUSED[path]
    with pytest.raises(ConfigError, match=message) as error:
        support.check_engine(changed(plain, path, value))
    assert "is not supported with method: easyspec" in str(error.value)


def test_data_parallelism_is_for_dense_targets(plain, monkeypatch):
    several = changed(plain, "parallel_config.data_parallel_size", 2)
    support.check_engine(several)
    monkeypatch.setattr(type(plain.model_config), "is_moe", True)
    support.check_engine(plain)
    with pytest.raises(ConfigError, match="data_parallel_size=2 is not supported .*Start one engine per replica"):
        support.check_engine(several)


def test_connectors_are_refused(plain):
    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(ConfigError, match="kv_transfer_config='ExampleConnector' .*Remove it"):
        support.check_engine(changed(plain, "kv_transfer_config", connector))


@pytest.mark.parametrize("of", ["speculative_config.attention_backend", "attention_config.backend"])
def test_attention_backends(plain, of, monkeypatch):
    monkeypatch.setattr(support, "why_no_xformers", lambda: "it is not installed")
    for name in ("FLASHINFER", "FLEX_ATTENTION"):
        with pytest.raises(ConfigError, match=f"attention_backend='{name}' .*one of CPU_ATTN, FLASH_ATTN, TRITON_ATTN"):
            support.check_engine(changed(plain, of, AttentionBackendEnum[name]))
    for name in support.ATTENTION_BACKENDS:
        support.check_engine(changed(plain, of, AttentionBackendEnum[name]))


def test_a_backend_that_xformers_stands_in_for_is_not_refused(plain, monkeypatch):
    config = changed(plain, "attention_config.backend", AttentionBackendEnum.FLASHINFER)
    monkeypatch.setattr(support, "why_no_xformers", lambda: None)
    support.check_engine(config)
    options = config.additional_config["easyspec"] | {"grouped_attention": "backend"}
    with pytest.raises(ConfigError, match="attention_backend='FLASHINFER' is not supported"):
        support.check_engine(changed(config, "additional_config", {"easyspec": options}))


def test_the_drafters_own_attention_backend_is_what_counts(plain):
    config = changed(plain, "attention_config.backend", AttentionBackendEnum.FLASHINFER)
    support.check_engine(changed(config, "speculative_config.attention_backend", AttentionBackendEnum.TRITON_ATTN))


def test_the_attention_backend_that_vllm_chose():
    for name in support.ATTENTION_BACKENDS:
        support.check_attention_backend(name)
    with pytest.raises(ConfigError, match="attention_backend='FLASHINFER' .*attention_backend: TRITON_ATTN"):
        support.check_attention_backend("FLASHINFER")
    support.check_attention_backend("XFORMERS", "xformers")
    with pytest.raises(
        ConfigError, match=r"grouped_attention='xformers' needs a CUDA device; .* CPU_ATTN\..*: backend"
    ):
        support.check_attention_backend("CPU_ATTN", "xformers")


@pytest.mark.parametrize("layout", ["BLHNC", "BLNHC", "BHLNC"])
def test_layouts_with_the_layers_inside_a_block_are_refused(plain, monkeypatch, layout):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with pytest.raises(ConfigError, match=f"VLLM_KV_CACHE_LAYOUT='{layout}' .*Unset it"):
        support.check_engine(plain)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "NHD", "HND"])
def test_layouts_one_layer_after_another_pass(plain, monkeypatch, layout):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    support.check_engine(plain)


def test_pooling_models_are_refused():
    args = EngineArgs(model=str(TARGET), max_model_len=256, runner="pooling", speculative_config=easyspec())
    with pytest.raises(ConfigError, match="runner='pooling' .*Remove the speculative configuration"):
        args.create_engine_config()


def test_vllm_itself_refuses_watermarks():
    args = EngineArgs(
        model=str(TARGET),
        max_model_len=256,
        watermark_config={"algorithm": "dual_key_gumbel", "key": 1},
        speculative_config=easyspec(draft_sample_method="probabilistic"),
    )
    with pytest.raises(ValueError, match="Watermarking supports only autoregressive"):
        args.create_engine_config()


@pytest.mark.parametrize("kind", ["is_hybrid", "is_attention_free", "is_encoder_decoder"])
def test_targets_with_cache_groups_of_their_own_are_refused(plain, kind):
    kinds = {"is_hybrid": False, "is_attention_free": False, "is_encoder_decoder": False, kind: True}
    model = SimpleNamespace(model="some/target", **kinds)
    config = changed(plain, "cache_config", plain.cache_config)
    refusals = [refusal for refusal in support.REFUSALS if refusal.setting == "model"]
    stand_in = SimpleNamespace(model_config=model, cache_config=config.cache_config)
    (hit,) = (refusal for refusal in refusals if refusal.applies(stand_in))
    assert "model='some/target' is not supported" in hit.message(stand_in)


def window(**fields):
    """A target's `ModelConfig` as far as windows go."""
    text = SimpleNamespace(**fields)
    return SimpleNamespace(hf_text_config=text, get_sliding_window=lambda: getattr(text, "sliding_window", None))


@pytest.mark.parametrize(
    ("model", "local"),
    [
        (window(), False),
        (window(sliding_window=4096), True),
        (window(sliding_window=4096, layer_types=["full_attention"] * 4), False),
        (window(sliding_window=4096, layer_types=["full_attention", "sliding_attention"]), True),
        (window(layer_types=["full_attention", "chunked_attention"]), True),
        (window(attention_chunk_size=8192), True),
    ],
)
def test_local_attention_is_seen(model, local):
    assert support.has_local_attention(model) is local


def test_sliding_window_targets_need_one_cache_group(plain):
    config = changed(plain, "model_config.hf_text_config", copy.copy(plain.model_config.hf_text_config))
    config.model_config.hf_text_config.layer_types = ["sliding_attention", "full_attention"] * 3
    with pytest.raises(ConfigError, match="disable_hybrid_kv_cache_manager=False .*--disable-hybrid-kv-cache-manager"):
        support.check_engine(config)
    support.check_engine(changed(config, "scheduler_config.disable_hybrid_kv_cache_manager", True))


@pytest.mark.parametrize("target", ["Llama-3.3-70B-Instruct", "Qwen2.5-72B-Instruct", "Qwen3-32B"])
@pytest.mark.parametrize(
    "arguments", [{}, {"enable_lora": True}, {"enable_prefix_caching": False}, {"cpu_offload_gb": 1.0}]
)
def test_published_targets_pass(plain, target, arguments):
    drafters = {"Llama": "Llama-3.2-1B-Instruct", "Qwen2": "Qwen2.5-0.5B-Instruct", "Qwen3": "Qwen3-0.6B"}
    drafter = HF_CONFIGS / drafters[target[:5]]
    args = EngineArgs(
        model=str(HF_CONFIGS / target),
        max_model_len=2048,
        skip_tokenizer_init=True,
        speculative_config=easyspec(drafter),
        **arguments,
    )
    assert args.create_engine_config().speculative_config.method == "draft_model"


def test_a_machine_without_triton_is_told_so(plain, monkeypatch):
    import vllm.config.vllm
    import vllm.triton_utils

    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", False)
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match="would use V1: Triton is missing or has no active backend. Install it"):
        support.check_engine(plain)


def test_vocabularies():
    assert support.check_vocabulary(512, 512, lambda: None) == "512 tokens in both"
    accepted = support.check_vocabulary(151936, 152064, lambda: 151665)
    assert accepted == "151936 of the target's 152064, the rest is padding (the tokenizer has 151665 token ids)"
    assert "no tokenizer to ask" in support.check_vocabulary(151936, 152064, lambda: None)
    assert "no tokenizer to ask" in support.check_vocabulary(151936, 152064, lambda: 1), "an empty tokenizer is none"
    with pytest.raises(ConfigError, match="the target's tokenizer has 128256 token ids"):
        support.check_vocabulary(128000, 128256, lambda: 128256)
