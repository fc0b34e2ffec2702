"""Targets of many kinds, made from the trained tiny pair, so that the drafter's guesses are often right.

Each function writes a checkpoint into a new folder and returns the folder.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from engines import DRAFTER, TARGET
from safetensors.torch import load_file, save_file

WINDOW = 48  # tokens; shorter than most of `engines.mixed_prompts` with their answers

Tensors = dict[str, torch.Tensor]


def _read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TARGET / name, folder)
    return folder


def _noise(like: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=generator) * (size * like.float().std())
    return noise.to(like.dtype)


def mixtral(folder: Path, experts: int = 4) -> Path:
    """A Mixtral whose experts are the dense target's MLPs, each with noise of its own."""
    config, dense = _read(TARGET)
    generator = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for name, tensor in dense.items():
        layer, is_mlp, projection = name.partition(".mlp.")
        if not is_mlp:
            tensors[name] = tensor
            continue
        moe = f"{layer}.block_sparse_moe"
        expert_name = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}[projection]
        for expert in range(experts):
            noisy = tensor + _noise(tensor, 0.1, generator)
            tensors[f"{moe}.experts.{expert}.{expert_name}.weight"] = noisy
        tensors[f"{moe}.gate.weight"] = torch.randn(experts, config["hidden_size"], generator=generator).bfloat16()
    changes = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    return _write(folder, config | changes, tensors)


def windowed(folder: Path, like: Path = DRAFTER, window: int = WINDOW) -> Path:
    """The same weights as a Mistral whose layers all look back `window` tokens."""
    config, tensors = _read(like)
    changes = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return _write(folder, config | changes, tensors)


def int8(folder: Path, like: Path = TARGET) -> Path:
    """Weights and activations in 8 bits (compressed-tensors): a scale per row of weights and one per token."""

    def stored(layer: str, weight: torch.Tensor) -> Tensors:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        levels = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return {f"{layer}.weight": levels, f"{layer}.weight_scale": scale}

    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits | {"strategy": "channel", "dynamic": False},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
            }
        },
    }
    return _write_quantized(folder, like, quantization, stored)


def gptq(folder: Path, like: Path = DRAFTER, group: int = 64) -> Path:
    """Weights in 8 bits as GPTQ stores them: packed along the inputs, with a scale and a zero point for each group."""

    def stored(layer: str, weight: torch.Tensor) -> Tensors:
        groups = weight.t().unflatten(0, (-1, group))
        scales = groups.abs().amax(dim=1) / 127
        levels = ((groups / scales.unsqueeze(1)).round() + 128).flatten(0, 1).to(torch.uint8)
        return {
            f"{layer}.qweight": levels.t().contiguous().view(torch.int32).t().contiguous(),
            f"{layer}.qzeros": torch.full_like(scales, 127, dtype=torch.uint8).view(torch.int32),
            f"{layer}.scales": scales,
            f"{layer}.g_idx": torch.arange(len(levels), dtype=torch.int32) // group,
        }

    quantization = {"quant_method": "gptq", "bits": 8, "group_size": group, "desc_act": False, "sym": True}
    return _write_quantized(folder, like, quantization, stored)


def _write_quantized(
    folder: Path, like: Path, quantization: dict[str, Any], stored: Callable[[str, torch.Tensor], Tensors]
) -> Path:
    """`like` with its projections as `stored` gives them, by the layer's name and float32 weight."""
    config, dense = _read(like)
    tensors: Tensors = {}
    for name, tensor in dense.items():
        is_projection = name.endswith("_proj.weight")
        tensors |= stored(name.removesuffix(".weight"), tensor.float()) if is_projection else {name: tensor}
    return _write(folder, config | {"quantization_config": quantization}, tensors)


def nudged(folder: Path, like: Path = TARGET) -> Path:
    """The same model with other weights: what a later step of training might give."""
    config, tensors = _read(like)
    generator = torch.Generator().manual_seed(2)
    changed = {name: tensor + _noise(tensor, 0.2, generator) for name, tensor in tensors.items()}
    return _write(folder, config, changed)


def of_another_tokenizer(folder: Path, dropped: int = 32) -> Path:
    """The drafter with its tokens in another order, and without the last ones."""
    config, tensors = _read(DRAFTER)
    kept = config["vocab_size"] - dropped
    new = torch.randperm(kept, generator=torch.Generator().manual_seed(6)).tolist()  # of each old id
    rows = torch.empty(kept, dtype=torch.long)
    rows[new] = torch.arange(kept)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][rows]
    ids = {f"{name}_token_id": new[config[f"{name}_token_id"]] for name in ("bos", "eos")}
    _write(folder, config | {"vocab_size": kept} | ids, tensors)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index < kept}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for token in tokenizer["added_tokens"]:
        token["id"] = new[token["id"]]
    path.write_text(json.dumps(tokenizer))
    return folder


def embeddings() -> torch.Tensor:
    """The target's, `[vocabulary, hidden]`."""
    return _read(TARGET)[1]["model.embed_tokens.weight"]


def _adapted(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of the target's projections that the adapter changes."""
    hidden, head = config["hidden_size"], config["head_dim"]
    sizes = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            yield f"model.layers.{layer}.self_attn.{name}", hidden, size
    yield "lm_head", hidden, config["vocab_size"]


def adapter(folder: Path, rank: int = 8) -> Path:
    """A random LoRA adapter for the target, strong enough to change its answers."""
    config, _ = _read(TARGET)
    generator = torch.Generator().manual_seed(3)
    tensors: Tensors = {}
    for name, inputs, outputs in _adapted(config):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "bias": "none",
        "base_model_name_or_path": str(TARGET),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
SAMPLING_RATE = 16_000  # a second of sound is 25 tokens


def qwen2_audio(folder: Path) -> Path:
    """The target with a random encoder of sound before it, in the architecture of Qwen2-Audio."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config, trained = _read(TARGET)
    text = config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = f"model.layers.{layer}.self_attn.{name}"
            trained[f"{projection}.bias"] = torch.zeros(trained[f"{projection}.weight"].shape[0], dtype=torch.bfloat16)
    encoder = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 80,
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
    }
    audio_token, *_ = audio_ids = [config["vocab_size"] - 1 - index for index in range(len(AUDIO_TOKENS))]
    whole = Qwen2AudioConfig(audio_config=encoder, text_config=text, audio_token_index=audio_token)
    torch.manual_seed(4)
    random = Qwen2AudioForConditionalGeneration(whole).state_dict()
    towers = ("model.audio_tower.", "model.multi_modal_projector.")
    tensors = {name.removeprefix("model."): tensor for name, tensor in random.items() if name.startswith(towers)}
    tensors |= {f"language_model.{name}": tensor for name, tensor in trained.items()}
    tensors["language_model.lm_head.weight"] = trained["model.embed_tokens.weight"].clone()
    _write(folder, whole.to_dict() | {"architectures": ["Qwen2AudioForConditionalGeneration"]}, tensors)
    _rename_last_tokens(folder / "tokenizer.json", dict(zip(audio_ids, AUDIO_TOKENS, strict=True)))
    sound = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "sampling_rate": SAMPLING_RATE}
    sound |= {"processor_class": "Qwen2AudioProcessor", "return_attention_mask": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(sound))
    return folder


def _rename_last_tokens(path: Path, names: dict[int, str]) -> None:
    """Turn the last tokens of the vocabulary, those of the last merges, into special tokens."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for index, name in names.items():
        del vocabulary[next(text for text, old in vocabulary.items() if old == index)]
        tokenizer["model"]["merges"].pop()
        vocabulary[name] = index
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": index, "content": name})
    path.write_text(json.dumps(tokenizer))
