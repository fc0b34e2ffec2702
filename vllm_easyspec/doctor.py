"""Checks a configuration without an engine: what each rank will hold, and whether the pair fits together."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_easyspec import support
from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.placement import LayerPlacement, MlpPlacement, choose_mlp
from vllm_easyspec.drafter.plan import PlanTable
from vllm_easyspec.drafter.vocabulary import DraftVocabulary, special_ids
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.lookahead import check_lookahead
from vllm_easyspec.versions import Support, installed, require_supported, vllm_version

VOCABULARY_PADDING = 64  # vLLM pads the vocabulary to a multiple of this before it shards it


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds of the drafter, in bytes."""

    attention: int
    mlp: int
    embedding: int  # the embedding, the LM head if it is untied, and the final norm
    kv_per_token: int

    @property
    def weights(self) -> int:
        return self.attention + self.mlp + self.embedding


def rank_memory(
    shape: DrafterShape, placement: LayerPlacement, mlp: MlpPlacement, rank: int, itemsize: int, drafted: int = 0
) -> RankMemory:
    """Weights and K/V of one rank: whole attentions of its own layers, its part of everything else.

    drafted: tokens of the draft vocabulary, whose rows the LM head has; 0 without one.
    """
    layers, ranks = len(placement.layers_of(rank)), placement.num_ranks
    width = len(mlp.shard(shape.intermediate_size, rank, ranks))
    biases = 2 * width + shape.hidden_size if shape.mlp_bias else 0
    rows = _rows(shape.vocab_size, ranks)
    if drafted or not shape.tied_embeddings:
        rows += _rows(drafted or shape.vocab_size, ranks)
    return RankMemory(
        attention=layers * shape.attention_parameters() * itemsize,
        mlp=shape.num_layers * (shape.hidden_size * (3 * width + 1) + biases) * itemsize,
        embedding=(rows + 1) * shape.hidden_size * itemsize,
        kv_per_token=layers * 2 * shape.kv_size * itemsize,
    )


def _rows(tokens: int, ranks: int) -> int:
    return -(-tokens // VOCABULARY_PADDING) * VOCABULARY_PADDING // ranks


def diagnose(
    config: EasySpecConfig,
    num_ranks: int,
    target: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    prompts: Sequence[Sequence[int]] = (),
) -> list[str]:
    """The lines of the report. Raises `ConfigError` or `UnsupportedVllmError` for the first thing that can't work.

    prompts: token ids, of which the report gives the share that may be drafted.
    """
    version = vllm_version()
    require_supported(version)
    if num_ranks < 1:
        raise ConfigError(f"tensor_parallel_size={num_ranks} is not allowed. Give a number of ranks of at least 1")
    config.check_model()
    shape = support.read_drafter(config.model, config.revision, config.code_revision)
    support.check_checkpoint(config.model, config.revision, shape)
    plans = config.layer_parallel.plan_table(shape.num_layers)
    vocabulary = _vocabulary(config, shape, target)
    drafted = _draft_vocabulary(config, shape, target)
    # A drafter has the target's dtype, and `auto` loads float32 checkpoints in 16 bits too.
    itemsize = 4 if dtype == "float32" else 2
    device = device or _this_device()
    mlp = choose_mlp(config.layer_parallel.mlp, shape, num_ranks, itemsize, device)
    placement = LayerPlacement(shape.num_layers, num_ranks)
    maps = "none"
    if config.lookahead is not None:
        maps = check_lookahead(config.lookahead, config.model, config.revision, shape, plans.plans).describe()
    return [
        f"drafter     {config.model}: {shape.architecture}, {shape.num_layers} layers, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} K/V heads of {shape.head_dim}, hidden {shape.hidden_size}, vocabulary "
        f"{shape.vocab_size}",
        f"drafting    {config.num_speculative_tokens} tokens per round, calibration {config.calibration}",
        *_plan_lines(plans, config),
        f"lookahead   {maps}",
        f"MLPs        {mlp.value} ({config.layer_parallel.mlp}, on {device})",
        *_rank_lines(shape, placement, mlp, itemsize, len(drafted.ids) if drafted else 0),
        f"vocabulary  {vocabulary}",
        *_drafted_lines(drafted, prompts),
        f"operators   {_operators()}",
        f"versions    vllm {version} ({Support.of(version).value}), torch {installed('torch')}, "
        f"python {platform.python_version()}, vllm-easyspec {installed('vllm-easyspec')}",
    ]


def _operators() -> str:
    from vllm_easyspec.ops import WHY_NOT_NATIVE

    return "native" if WHY_NOT_NATIVE is None else f"in plain torch, slower, since {WHY_NOT_NATIVE}"


def _plan_lines(plans: PlanTable, config: EasySpecConfig) -> Iterator[str]:
    """The plan of the largest batches, then all plans if batch sizes differ."""
    plan = plans.largest
    yield (
        f"plan        {plan.grouping}, scope {plan.scope}: {plan.sequential_steps} sequential sublayers, "
        f"the precise pass has {2 * plan.num_layers}"
    )
    first = 1
    for entry in plans.ranges if len(plans.ranges) > 1 else ():
        sizes = f"up to {entry.up_to}" if entry.up_to else "beyond"
        yield f"by batch    {sizes}: {entry.plan.grouping}, scope {entry.plan.scope}, K={config.num_drafts_at(first)}"
        first = (entry.up_to or first) + 1


def _rank_lines(
    shape: DrafterShape, placement: LayerPlacement, mlp: MlpPlacement, itemsize: int, drafted: int
) -> Iterator[str]:
    for rank in range(placement.num_ranks):
        memory = rank_memory(shape, placement, mlp, rank, itemsize, drafted)
        layers = ", ".join(map(str, placement.layers_of(rank))) or "none"
        yield (
            f"rank {rank:<6} attention of layers {layers}; weights {_mebibytes(memory.weights)} (attention "
            f"{_mebibytes(memory.attention)}, MLPs {_mebibytes(memory.mlp)}, embedding and LM head "
            f"{_mebibytes(memory.embedding)}); K/V {memory.kv_per_token} bytes per token"
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _vocabulary(config: EasySpecConfig, shape: DrafterShape, target: str | None) -> str:
    if target is None:
        return f"{shape.vocab_size} tokens; give --model TARGET to compare with the target's"
    from vllm.transformers_utils.config import get_hf_text_config

    size = get_hf_text_config(support.read_hf_config(target, revision=None)).vocab_size
    if config.use_heterogeneous_vocab:
        own = support.read_tokenizer(config.model, config.revision, shape.vocab_size)
        theirs = support.read_tokenizer(target, None, size)
        return support.shared_tokens(own, theirs, shape.vocab_size, size).describe_shared()
    sizes = support.check_vocabulary(shape.vocab_size, size, lambda: _count_token_ids(target))
    tokens = support.check_tokens(
        lambda: support.read_tokenizer(config.model, config.revision, shape.vocab_size),
        lambda: support.read_tokenizer(target, None, size),
    )
    return f"{sizes}; {tokens or 'the tokenizers agree'}"


def _draft_vocabulary(config: EasySpecConfig, shape: DrafterShape, target: str | None) -> DraftVocabulary | None:
    if config.draft_vocabulary is None:
        return None
    drafters = support.read_tokenizer(config.model, config.revision, shape.vocab_size)
    support.read_vocabulary(config.draft_vocabulary, shape, lambda: drafters)
    tokenizer = drafters if target is None else support.read_tokenizer(target, None, shape.vocab_size)
    special = () if tokenizer is None else special_ids(tokenizer)
    return DraftVocabulary.of(config.draft_vocabulary, special, shape.vocab_size)


def _drafted_lines(drafted: DraftVocabulary | None, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    if drafted is None:
        return
    share, tokens = drafted.share_of(prompts)
    covered = f", which cover {share:.1%} of the {tokens:,} tokens of the prompts" if tokens else ""
    yield f"drafts      from {len(drafted.ids):,} of {drafted.size:,} tokens{covered}"


def _count_token_ids(target: str) -> int | None:
    from vllm.tokenizers import get_tokenizer

    return support.count_token_ids(lambda: get_tokenizer(target))


def _this_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if not (torch.version.cuda or torch.version.hip or torch.version.xpu):
        return "cpu"
    from vllm.platforms import current_platform

    return current_platform.device_type
