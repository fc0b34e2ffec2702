"""Tiny random drafters of every supported family, and what each rank does with them for `test_drafter.py`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 101  # no multiple of any number of ranks, nor of vLLM's padding
PROMPTS = [
    torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (37, 5, 70)
]
# How the requests continue, whatever the logits are: [request][step].
CONTINUATIONS = torch.randint(VOCAB, (len(PROMPTS), 3), generator=torch.Generator().manual_seed(0)).tolist()
STEPS = [[[ids[step]] for ids in CONTINUATIONS] for step in range(len(CONTINUATIONS[0]))]
SCOPES = ("attention", "block")


@dataclass(frozen=True)
class Case:
    """A drafter: name, `transformers` configuration, MLP placement, and the plans to test."""

    name: str
    config: PretrainedConfig
    mlp: str
    plans: tuple[tuple[int, ...], ...]
    shards: int = 1  # safetensors files
    block_size: int = 32
    ranks: tuple[int, ...] = field(default=(1, 2))


def _sizes(layers: int, heads: int, kv_heads: int, width: int, **more: Any) -> dict[str, Any]:
    """hidden_size differs from heads * head_dim; 32 is the smallest head that CPU attention takes."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": 48,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "intermediate_size": width,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    } | more


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

CASES = [
    Case(
        "llama3_rope",
        LlamaConfig(**_sizes(6, 4, 2, 96), rope_parameters=_LLAMA3_ROPE),
        mlp="tensor",
        plans=((1, 4, 1), (2, 3, 1), (6,)),
        ranks=(1, 2, 4),  # 2 K/V heads on 4 ranks
    ),
    Case(
        "llama_biases_yarn_tied",
        LlamaConfig(
            **_sizes(5, 2, 2, 75, tie_word_embeddings=True),
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=_YARN_ROPE,
        ),
        mlp="tensor",  # a width that two ranks can't halve
        plans=((1, 3, 1), (2, 3)),
    ),
    Case(
        "llama_three_heads_linear_rope",
        LlamaConfig(**_sizes(5, 3, 1, 64), rope_parameters=_LINEAR_ROPE),
        mlp="replicate",
        plans=((1, 2, 2), (4, 1)),
    ),
    Case(
        "llama_more_ranks_than_layers",
        LlamaConfig(**_sizes(3, 3, 3, 50)),
        mlp="tensor",  # 50 on 4 ranks: 12, 13, 12, 13
        plans=((1, 2), (3,)),
        block_size=64,
        ranks=(4,),
    ),
    Case(
        "mistral_window",
        MistralConfig(**_sizes(6, 4, 1, 64), sliding_window=24),
        mlp="tensor",
        plans=((1, 4, 1), (3, 3)),
    ),
    Case(
        "mistral_tied",
        MistralConfig(**_sizes(4, 2, 1, 64, tie_word_embeddings=True), sliding_window=None),
        "auto",
        ((1, 3),),
    ),
    Case(
        "qwen2_tied_sharded",
        Qwen2Config(**_sizes(6, 4, 2, 64, tie_word_embeddings=True)),
        mlp="replicate",
        plans=((1, 4, 1), (2, 2, 2)),
        shards=3,
    ),
    Case(
        "qwen2_window",
        Qwen2Config(**_sizes(4, 2, 2, 64), use_sliding_window=True, sliding_window=40, max_window_layers=0),
        mlp="tensor",
        plans=((1, 2, 1),),
    ),
    Case(
        "qwen3",
        Qwen3Config(**_sizes(6, 4, 2, 96)),
        mlp="tensor",
        plans=((1, 4, 1), (3, 2, 1)),
    ),
    Case(
        "qwen3_biases_tied",
        Qwen3Config(**_sizes(4, 3, 3, 64, tie_word_embeddings=True), attention_bias=True),
        mlp="replicate",
        plans=((1, 3),),
    ),
]


def make_checkpoint(case: Case, folder: Path) -> PreTrainedModel:
    """Write a random float32 checkpoint. Every kind of weight matters: norms aren't ones, nor are biases zeros."""
    model = AutoModelForCausalLM.from_config(case.config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(case.name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.3 * noise * parameter.shape[1] ** -0.5)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // case.shards + 1 if case.shards > 1 else "5GB")
    return model


# ---- on a rank ----


@dataclass
class Pass:
    """The run of one drafter under a plan: what all ranks must agree on, and what this rank did."""

    logits: list[np.ndarray]  # of each pass, [tokens, vocab]
    hidden: list[np.ndarray]  # of each pass, [tokens, hidden]
    counters: dict[str, int]


@dataclass
class CaseResult:
    prefill: Pass
    precise_steps: Pass
    fuzzy: dict[tuple[tuple[int, ...], str], Pass]
    recalibrated: Pass  # all continuation tokens again, in one precise pass over fuzzy K/V
    top_tokens: np.ndarray  # of the prefill's tokens
    pages: int  # pages of this rank's layers, all layers together


def run_cases(folder: str, cases: Sequence[Case], broken: Sequence[str]) -> tuple[dict[str, CaseResult], list[str]]:
    """Results by case, and the ValueErrors of loading the `broken` checkpoints."""
    return {case.name: _run_case(Path(folder) / case.name, case) for case in cases}, list(map(_loading_error, broken))


def _run_case(folder: Path, case: Case) -> CaseResult:
    from vllm_easyspec.config import LayerParallelConfig, RuntimeOptions
    from vllm_easyspec.drafter.plan import DraftPlan
    from vllm_easyspec.engineless import EnginelessDrafter
    from vllm_easyspec.metrics import PassCounters

    options = RuntimeOptions(layer_parallel=LayerParallelConfig(mlp=case.mlp))
    drafter = EnginelessDrafter(folder, options, max_num_reqs=len(PROMPTS), max_len=128, block_size=case.block_size)

    def read(
        passes: Sequence[Sequence[Sequence[int]]], group_sizes: Sequence[int] | None = None, scope: Any = "attention"
    ):
        drafter.model.counters = PassCounters()
        plan = DraftPlan(tuple(group_sizes), scope) if group_sizes else None
        hidden = [drafter.read(tokens, plan) for tokens in passes]
        logits = [drafter.logits(h).numpy() for h in hidden]
        return Pass(logits, [h.numpy() for h in hidden], asdict(drafter.model.counters))

    def again() -> None:
        drafter.rewind([len(prompt) for prompt in PROMPTS])

    prefill = read([PROMPTS])
    precise_steps = read(STEPS)
    fuzzy = {}
    for group_sizes in case.plans:
        for scope in SCOPES:
            again()
            fuzzy[group_sizes, scope] = read(STEPS, group_sizes, scope)
    again()
    recalibrated = read([CONTINUATIONS])
    with torch.inference_mode():
        top_tokens = drafter.model.get_top_tokens(torch.from_numpy(prefill.hidden[0]))
    pages = sum(layer.kv_cache.shape[0] for layer in drafter.pages.layers)
    return CaseResult(prefill, precise_steps, fuzzy, recalibrated, top_tokens.numpy(), pages)


def _loading_error(folder: str) -> str:
    from vllm_easyspec.engineless import EnginelessDrafter

    try:
        EnginelessDrafter(folder)
    except ValueError as error:
        return str(error)
    return "none"
