"""The supported drafter families, and the shape of a drafter from its Hugging Face configuration."""

from dataclasses import dataclass
from typing import Any

from vllm_easyspec.drafter.quantized_checkpoint import unsupported

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, 3.3 and models of that shape",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3 (dense)",
}

SUPPORTED_ROPE_TYPES = {"default", "linear", "dynamic", "llama3", "yarn"}


class UnsupportedDrafterError(ValueError):
    """easyspec can't run this kind of drafter. The message lists the kinds that it can run."""


@dataclass(frozen=True)
class DrafterShape:
    """Sizes and switches of a dense decoder-only drafter. Sizes are whole-model, not per rank."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    sliding_window: int | None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def attention_parameters(self) -> int:
        """Parameters of one layer's attention, its norms included."""
        qkv = self.q_size + 2 * self.kv_size
        biases = (qkv if self.qkv_bias else 0) + (self.hidden_size if self.o_bias else 0)
        return self.hidden_size * (qkv + self.q_size + 1) + biases + (2 * self.head_dim if self.qk_norm else 0)

    def mlp_parameters(self) -> int:
        """Parameters of one layer's MLP, its norm included."""
        biases = 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        return 3 * self.hidden_size * self.intermediate_size + self.hidden_size + biases

    def embedding_parameters(self) -> int:
        """Parameters of the embedding and the LM head (one matrix where they are tied)."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @classmethod
    def from_hf_config(cls, config: Any) -> "DrafterShape":
        """Read a `transformers` configuration object. Raises `UnsupportedDrafterError`."""
        architectures = list(getattr(config, "architectures", None) or [])
        architecture = next((name for name in architectures if name in SUPPORTED_ARCHITECTURES), None)
        if architecture is None:
            raise UnsupportedDrafterError(
                f"architectures={architectures} is not a drafter that easyspec can run. Supported are "
                + ", ".join(f"{name} ({models})" for name, models in SUPPORTED_ARCHITECTURES.items())
                + ". Choose such a drafter, or use vLLM's own method: draft_model"
            )
        _refuse_variants(config, architecture)
        family = architecture.removesuffix("ForCausalLM")
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            architecture=architecture,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=_rope_parameters(config),
            qkv_bias=True if family == "Qwen2" else attention_bias and family != "Mistral",
            o_bias=attention_bias if family in ("Llama", "Qwen3") else False,
            mlp_bias=bool(getattr(config, "mlp_bias", False)) if family == "Llama" else False,
            qk_norm=family == "Qwen3",
            tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            sliding_window=_sliding_window(config, architecture),
        )


def _refuse_variants(config: Any, architecture: str) -> None:
    """Refuse checkpoints of a supported class that compute something other than its plain form."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and (reason := unsupported(quantization)):
        raise UnsupportedDrafterError(
            f"quantization_config in a drafter of class {architecture}: {reason}. Use the drafter's unquantized "
            "checkpoint; quantization: int8_per_channel_weight_only quantizes it when it is loaded"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedDrafterError(
            f"hidden_act={activation!r} in a drafter of class {architecture}: only 'silu' is supported"
        )
    rope_type = _rope_parameters(config).get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES or getattr(config, "dual_chunk_attention_config", None):
        raise UnsupportedDrafterError(
            f"rope_type={rope_type!r} in a drafter of class {architecture}: supported are "
            f"{', '.join(sorted(SUPPORTED_ROPE_TYPES))}, without dual-chunk attention"
        )


def _rope_parameters(config: Any) -> dict[str, Any]:
    """`rope_parameters` for vLLM's `get_rope`, also from configurations older than that field."""
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return parameters


def _sliding_window(config: Any, architecture: str) -> int | None:
    """The sliding window of all layers, or None. Raises `UnsupportedDrafterError` if layers differ."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise UnsupportedDrafterError(
            f"layer_types={sorted(kinds)} in a drafter of class {architecture}: one paged-attention call serves a "
            "whole group, so all layers must share one window. Choose a drafter without mixed windows"
        )
    return window
