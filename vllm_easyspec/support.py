"""Settings that easyspec can't work with: each is refused by name, before a model is loaded.

The table covers what vLLM's configuration tells. What is only determined later (the attention backend that vLLM chose,
the cache groups, the layout of the pages) is checked by the worker.
"""

import importlib.metadata
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from vllm_easyspec.config import METHOD, GroupedAttention, RuntimeOptions
from vllm_easyspec.drafter.architectures import DrafterShape, UnsupportedDrafterError
from vllm_easyspec.drafter.vocabulary import (
    DraftVocabulary,
    VocabularyFile,
    check_number,
    special_ids,
    tokenizer_hash,
)
from vllm_easyspec.errors import ConfigError, shown

logger = logging.getLogger("vllm.easyspec")

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig

# K/V types of pages that a drafter can share: no scales, no packing.
PLAIN_KV_TYPES = {"auto", "float16", "bfloat16"}

# Attention backends that can process the drafter's virtual batch. Others keep the state of one batch in their builder,
# while a pass needs metadata for groups of several sizes at once, or index by the number of blocks of one layer, or
# have not been reviewed.
ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")

# If there is no tokenizer to ask, fewer missing tokens than this in the drafter's vocabulary are assumed to be padding.
# Vocabularies are padded to multiples of at most 256, on either side; Qwen2.5's differ by 128.
MOST_PADDING = 512

HETEROGENEOUS = "use_heterogeneous_vocab: true"

# Up to this share of the drafter's tokens may have another name than the target's: Llama 3.1 named some of Llama 3's
# reserved tokens, and distilled models rename special tokens.
MOST_RENAMED = 0.01

# The kernel of xformers 0.0.35 uses tl.make_block_ptr.
TRITON_WITHOUT_BLOCK_POINTERS = Version("3.9")

# Configurations of these types, without these fields, are read by vLLM as by transformers.
PLAIN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL_FIELDS = {"auto_map", "quantization_config", "speculators_config", "rotary_emb_base", "rotary_pct"}

# If a drafter's name or path contains one of these, `SpeculativeConfig.__post_init__` assumes another method.
MARKS_OF_OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


@dataclass(frozen=True)
class Refusal:
    """A setting of the engine that easyspec can't work with."""

    setting: str
    value: Callable[["VllmConfig"], object]
    applies: Callable[["VllmConfig"], bool]
    why_and_remedy: str

    def message(self, config: "VllmConfig") -> str:
        return self.describe(self.value(config))

    def describe(self, value: object) -> str:
        return f"{self.setting}={value!r} is not supported with method: {METHOD}: {self.why_and_remedy}"


def _above_one(setting: str, why_and_remedy: str) -> Refusal:
    """A count of `ParallelConfig` that must be 1."""
    return Refusal(
        setting,
        lambda config: getattr(config.parallel_config, setting),
        lambda config: getattr(config.parallel_config, setting) > 1,
        why_and_remedy,
    )


def _chosen_backend(config: "VllmConfig") -> str | None:
    """The attention backend that the user chose for the drafter, or for all layers; None if vLLM is to choose."""
    chosen = config.speculative_config.attention_backend or config.attention_config.backend
    return None if chosen is None else chosen.name


def _layouts_block_by_block() -> set[str]:
    """Names of the K/V layouts in which a block contains the pages of all layers."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return {layout.name for layout in KVCacheLayout if not layout.is_layer_compact}


def _asked_layout() -> str | None:
    import vllm.envs as envs

    return envs.VLLM_KV_CACHE_LAYOUT


def why_no_xformers() -> str | None:
    """Why xformers can't run here, with the remedy; None if it can."""
    try:
        importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        return "the package xformers is not installed. Run pip install 'vllm-easyspec[xformers]'"
    try:
        import triton
    except ImportError:
        return "Triton is not installed. Install triton<3.9"
    if Version(triton.__version__) >= TRITON_WITHOUT_BLOCK_POINTERS:
        return f"its kernel needs block pointers, which Triton {triton.__version__} no longer has. Install triton<3.9"
    return None


def _xformers_serves(config: "VllmConfig") -> bool:
    """Whether the drafter may use xformers' attention in place of a backend's."""
    wanted = RuntimeOptions.from_vllm(config).grouped_attention
    return wanted == "xformers" or (wanted == "auto" and why_no_xformers() is None)


ATTENTION_BACKEND = Refusal(
    "attention_backend",
    _chosen_backend,
    lambda config: _chosen_backend(config) not in (None, *ATTENTION_BACKENDS) and not _xformers_serves(config),
    f"the drafter's attention needs one of {', '.join(ATTENTION_BACKENDS)}. Write attention_backend: TRITON_ATTN "
    "(or FLASH_ATTN) next to method: easyspec; the target may keep its own",
)
XFORMERS = "XFORMERS"  # `drafter.xformers_attention`, in place of a backend of vLLM's

REFUSALS = (
    _above_one(
        "pipeline_parallel_size",
        "the drafter's layers are spread over the ranks of one tensor-parallel group. Use --tensor-parallel-size "
        "for all devices",
    ),
    Refusal(
        "data_parallel_size",
        lambda config: config.parallel_config.data_parallel_size,
        lambda config: config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe,
        "engines of a mixture of experts run in lockstep, which has not been tested. Start one engine per replica, "
        "each with its own --tensor-parallel-size",
    ),
    _above_one(
        "decode_context_parallel_size",
        "it cuts a request's K/V over the ranks, but the drafter needs whole layers. Remove it",
    ),
    _above_one(
        "prefill_context_parallel_size",
        "it cuts a prompt over the ranks, but the drafter needs whole layers. Remove it",
    ),
    Refusal(
        "kv_offloading_size",
        lambda config: config.cache_config.kv_offloading_size,
        lambda config: config.cache_config.kv_offloading_size is not None,
        "offload moves the pages of the layers that all ranks have, and each drafter layer is on one rank only. "
        "Remove it",
    ),
    Refusal(
        "kv_transfer_config",
        lambda config: config.kv_transfer_config.kv_connector,
        lambda config: config.kv_transfer_config is not None,
        "a K/V connector moves the pages of the layers that all ranks have, and each drafter layer is on one rank "
        "only. Remove it",
    ),
    Refusal(
        "kv_cache_dtype",
        lambda config: config.cache_config.cache_dtype,
        lambda config: config.cache_config.cache_dtype not in PLAIN_KV_TYPES,
        f"the drafter's pages have the target's type, which must be one of {', '.join(sorted(PLAIN_KV_TYPES))}. "
        "Give --kv-cache-dtype auto",
    ),
    ATTENTION_BACKEND,
    Refusal(
        "VLLM_KV_CACHE_LAYOUT",
        lambda config: _asked_layout(),
        lambda config: _asked_layout() in _layouts_block_by_block(),
        "a group of the drafter's layers needs its pages one layer after another. Unset it",
    ),
    Refusal(
        "runner",
        lambda config: config.model_config.runner_type,
        lambda config: config.model_config.runner_type == "pooling",
        "a pooling model generates no tokens to draft. Remove the speculative configuration",
    ),
    Refusal(
        "enable_dbo",
        lambda config: config.parallel_config.enable_dbo,
        lambda config: config.parallel_config.use_ubatching,
        "it splits a batch in two, but the drafter drafts for the whole batch. Remove it",
    ),
    Refusal(
        "model",
        lambda config: config.model_config.model,
        lambda config: config.model_config.is_hybrid or config.model_config.is_attention_free,
        "the target has recurrent (Mamba-like) layers, whose state is in separate cache groups, but the drafter "
        "shares one group with the target. Use vLLM's own method: draft_model",
    ),
    Refusal(
        "model",
        lambda config: config.model_config.model,
        lambda config: config.model_config.is_encoder_decoder,
        "the target's cross-attention is in a separate cache group, but the drafter shares one group with the "
        "target. Use vLLM's own method: draft_model",
    ),
    Refusal(
        "disable_hybrid_kv_cache_manager",
        lambda config: config.scheduler_config.disable_hybrid_kv_cache_manager,
        lambda config: (
            has_local_attention(config.model_config) and not config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "the target has sliding-window or chunked attention, whose K/V would be in separate cache groups, but the "
        "drafter shares one group with the target. Give --disable-hybrid-kv-cache-manager",
    ),
)


def has_local_attention(model: "ModelConfig") -> bool:
    """Whether some layers of the target keep only the K/V of a window or chunk."""
    config = model.hf_text_config
    layer_types = getattr(config, "layer_types", None)
    local = any(kind != "full_attention" for kind in layer_types or [])
    window = model.get_sliding_window() is not None and layer_types is None
    return local or window or getattr(config, "attention_chunk_size", None) is not None


def check_engine(config: "VllmConfig") -> None:
    """Raise `ConfigError` for the first setting that easyspec can't work with."""
    for refusal in REFUSALS:
        if refusal.applies(config):
            raise ConfigError(refusal.message(config))
    check_runner(config)


def check_attention_backend(name: str, grouped_attention: GroupedAttention = "auto") -> None:
    """Raise `ConfigError` where the drafter can't use the attention backend that vLLM gave it."""
    if grouped_attention == "xformers" and name != XFORMERS:
        raise ConfigError(
            f"grouped_attention='xformers' needs a CUDA device; but here vLLM gave the drafter {name}. Write "
            "grouped_attention: backend"
        )
    if name not in (*ATTENTION_BACKENDS, XFORMERS):
        raise ConfigError(ATTENTION_BACKEND.describe(name))


def check_runner(config: "VllmConfig") -> None:
    """Raise `ConfigError` if vLLM would use its V1 model runner."""
    if config.use_v2_model_runner:
        return
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        cause = "VLLM_USE_V2_MODEL_RUNNER=0 is set. Unset it"
    elif not HAS_TRITON:
        cause = "Triton is missing or has no active backend. Install it; on a CPU, also triton-interpreter-backend"
    else:
        cause = "vLLM's log names the feature that its Model Runner V2 lacks. Remove that feature"
    raise ConfigError(f"method: {METHOD} needs vLLM's Model Runner V2, but this engine would use V1: {cause}")


def _is_plain(folder: Path) -> bool:
    """Whether vLLM reads the folder's config.json as `transformers` does, and no other file."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = {str(name) for name in config}
        is_plain = config["model_type"] in PLAIN_TYPES and not fields & SPECIAL_FIELDS
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the error is vLLM's to tell
    return is_plain and not any((folder / name).exists() for name in ("hf_quant_config.json", "params.json"))


def read_hf_config(model: str, revision: str | None, code_revision: str | None = None, trust: bool = False) -> Any:
    """The model's `transformers` configuration, read as vLLM reads it. Raises `ConfigError`."""
    from huggingface_hub import hf_hub_download

    try:
        if _is_plain(folder := Path(model).expanduser()):  # importing vLLM takes seconds
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(folder)
        from vllm.transformers_utils.config import get_config

        if "://" not in model and not Path(model).expanduser().exists():
            hf_hub_download(model, "config.json", revision=revision)  # vLLM would retry an unreachable hub many times
        return get_config(model, trust_remote_code=trust, revision=revision, code_revision=code_revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={model!r} can't be read: {' '.join(str(error).split())} Give a folder with a config.json, or a hub "
            "name that this machine can reach"
        ) from error


def read_drafter(
    model: str, revision: str | None, code_revision: str | None = None, trust: bool = False
) -> DrafterShape:
    """The drafter's shape, from its folder or the hub. Raises `ConfigError` for a drafter that easyspec can't run."""
    if any(mark in model.lower() for mark in MARKS_OF_OTHER_METHODS):
        raise ConfigError(_another_method(model, "another method"))
    return _shape(read_hf_config(model, revision, code_revision, trust), model)


def check_drafter(config: "SpeculativeConfig", options: RuntimeOptions) -> None:
    """Raise `ConfigError` if easyspec can't run the drafter, as vLLM configured it, with this target."""
    draft, target = config.draft_model_config, config.target_model_config
    if config.method != "draft_model":
        raise ConfigError(_another_method(str(config.model), f"its method {config.method}"))
    shape = _shape(draft.hf_config, str(config.model))
    if draft.quantization is not None and getattr(draft.hf_config, "quantization_config", None) is None:
        raise ConfigError(
            f"model={config.model!r} is quantized ({draft.quantization}) without a quantization_config in its "
            "config.json, which tells how to read it. Give a checkpoint that has one, or the unquantized one"
        )
    options.layer_parallel.plan_table(shape.num_layers)
    check_checkpoint(draft.model, draft.revision, shape)
    if options.use_heterogeneous_vocab:
        told = _shared(config).describe_shared()
    else:
        check_vocabulary(shape.vocab_size, target.get_vocab_size(), lambda: _target_token_ids(target))
        told = check_tokens(lambda: _drafters_tokenizer(draft), lambda: _tokenizer_of(target))
    if told:
        logger.info("easyspec: %s", told)


def _shared(config: "SpeculativeConfig") -> DraftVocabulary:
    draft, target = config.draft_model_config, config.target_model_config
    sizes = draft.get_vocab_size(), target.get_vocab_size()
    return shared_tokens(_drafters_tokenizer(draft), _tokenizer_of(target), *sizes)


def shared_tokens(drafters: Any, targets: Any, draft_size: int, target_size: int) -> DraftVocabulary:
    """The tokens that both tokenizers have. Raises `ConfigError` if there are none, or a tokenizer is None."""
    for whose, tokenizer in (("drafter", drafters), ("target", targets)):
        if tokenizer is None:
            raise ConfigError(
                f"use_heterogeneous_vocab=True compares the tokens of two tokenizers, and the {whose} has none here. "
                f"Give a {whose} with its tokenizer, and leave --skip-tokenizer-init out"
            )
    return DraftVocabulary.shared(drafters, targets, draft_size, target_size)


def check_checkpoint(model: str, revision: str | None, shape: DrafterShape) -> None:
    """Raise `ConfigError` where the drafter's files, so far as they are here, are cut short or of another shape."""
    from vllm_easyspec.drafter.checkpoint import check_files
    from vllm_easyspec.lookahead import checkpoint_folder

    folder = checkpoint_folder(model, revision)
    if folder is not None:
        check_files(folder, shape)


def check_maps(config: "SpeculativeConfig", options: RuntimeOptions) -> None:
    """Raise `ConfigError` if the file of look-ahead maps doesn't fit this drafter and plan."""
    if options.lookahead is None:
        return
    from vllm_easyspec.lookahead import check_lookahead

    draft = config.draft_model_config
    shape = _shape(draft.hf_config, str(config.model))
    plans = options.layer_parallel.plan_table(shape.num_layers).plans
    check_lookahead(options.lookahead, draft.model, draft.revision, shape, plans)


def check_draft_vocabulary(config: "SpeculativeConfig", options: RuntimeOptions) -> None:
    """Raise `ConfigError` where the drafter can't draft from `draft_vocabulary`."""
    draft = config.draft_model_config
    read_vocabulary(
        options.draft_vocabulary,
        _shape(draft.hf_config, str(config.model)),
        lambda: _drafters_tokenizer(draft),
    )


def read_vocabulary(
    wanted: int | str | None, shape: DrafterShape, tokenizer: Callable[[], Any]
) -> VocabularyFile | None:
    """The file of `draft_vocabulary`, if it is one. Raises `ConfigError` where it can't serve this drafter.

    tokenizer: loads the drafter's, asked only where there is a file; None where it has none.
    """
    if isinstance(wanted, int):
        check_number(wanted, shape.vocab_size)
    if not isinstance(wanted, str):
        return None
    file, loaded = VocabularyFile.read(wanted), tokenizer()
    file.check(wanted, shape.vocab_size, None if loaded is None else tokenizer_hash(loaded.get_vocab()))
    return file


def draft_vocabulary(config: "VllmConfig", options: RuntimeOptions, shape: DrafterShape) -> DraftVocabulary | None:
    """What the drafter of an engine, or one without an engine, may draft; None for everything. The first rank decides.

    config: as `draft_vllm_config` makes it.
    """
    from vllm.distributed import get_tp_group

    wanted, spec = options.draft_vocabulary, config.speculative_config
    translated = options.use_heterogeneous_vocab and spec is not None  # without an engine there is no target
    if wanted is None and not translated:
        return None
    group, vocabulary = get_tp_group(), None
    if group.rank_in_group == 0 and wanted is None:
        vocabulary = _shared(spec)
    elif group.rank_in_group == 0:
        assert wanted is not None
        special = special_tokens(config.model_config if spec is None else spec.target_model_config)
        vocabulary = DraftVocabulary.of(wanted, special, shape.vocab_size)
    return group.broadcast_object(vocabulary, src=0) if group.world_size > 1 else vocabulary


def special_tokens(model: "ModelConfig") -> set[int]:
    """Ids of the model's special tokens; without a tokenizer, of those that its configuration names."""
    tokenizer = _tokenizer_of(model)
    if tokenizer is not None:
        return special_ids(tokenizer)
    named = (getattr(model.hf_text_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    return {index for entry in named for index in (entry if isinstance(entry, list) else [entry]) if index is not None}


def read_tokenizer(model: str, revision: str | None, vocab_size: int, trust: bool = False) -> Any:
    """A model's tokenizer; None where it has none."""
    from vllm.tokenizers import get_tokenizer

    return _loaded(lambda: get_tokenizer(model, revision=revision, trust_remote_code=trust), vocab_size)


def _drafters_tokenizer(draft: "ModelConfig") -> Any:
    """The drafter's own; vLLM's configuration of it names the target's."""
    return read_tokenizer(draft.model, draft.revision, draft.get_vocab_size(), draft.trust_remote_code)


def _tokenizer_of(model: "ModelConfig") -> Any:
    """None where there is none, or where the engine is to run without."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return _loaded(lambda: cached_tokenizer_from_config(model), model.get_vocab_size())


def _loaded(load: Callable[[], Any], vocab_size: int) -> Any:
    try:
        tokenizer = load()
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # whatever loaders say to a folder without one
        return None
    # transformers makes an empty tokenizer of a folder that holds none.
    return None if tokenizer is None or 2 * len(tokenizer.get_vocab()) < vocab_size else tokenizer


def _another_method(model: str, method: str) -> str:
    return (
        f"model={model!r}: vLLM takes it for a drafter of {method}, by its name or its config.json. Give an ordinary "
        f"language model, by a name or path that contains none of {', '.join(MARKS_OF_OTHER_METHODS)}"
    )


def _shape(hf_config: Any, model: str) -> DrafterShape:
    try:
        return DrafterShape.from_hf_config(hf_config)
    except UnsupportedDrafterError as error:
        raise ConfigError(f"model={model!r}: {error}") from error


def check_vocabulary(draft_size: int, target_size: int, count_tokens: Callable[[], int | None]) -> str:
    """Accept a drafter vocabulary that equals the target's, padding at the end aside, and return why, in words.

    `count_tokens` returns the number of token ids of the target's tokenizer, None if there is none; it is called only
    if the sizes differ. Raises `ConfigError` for any other mismatch.
    """
    if draft_size == target_size:
        return f"{draft_size} tokens in both"
    refused = f"the drafter's vocabulary has vocab_size={draft_size}, the target's vocab_size={target_size}"
    remedy = (
        "Only padding at the end may differ: choose a drafter of the target's family, with its tokenizer, or write "
        + HETEROGENEOUS
    )
    if draft_size > target_size:
        raise ConfigError(f"{refused}, and it must not be larger. {remedy}")
    tokens = count_tokens()
    if tokens is not None and 2 * tokens < target_size:
        tokens = None  # for a folder without a tokenizer transformers makes an empty one
    if tokens is None and target_size - draft_size >= MOST_PADDING:
        raise ConfigError(
            f"{refused}. Without a tokenizer, fewer than {MOST_PADDING} missing tokens count as padding. {remedy}"
        )
    if tokens is not None and tokens > draft_size:
        raise ConfigError(f"{refused}, and the target's tokenizer has {tokens} token ids. {remedy}")
    why = "no tokenizer to ask" if tokens is None else f"the tokenizer has {tokens} token ids"
    return f"{draft_size} of the target's {target_size}, the rest is padding ({why})"


def check_tokens(load_drafters: Callable[[], Any], load_targets: Callable[[], Any]) -> str:
    """Compare the tokens of the drafter's and the target's tokenizer. Returns a note for the log, or an empty string.

    The arguments load the tokenizers, and return None if there is none. Raises `ConfigError` if ids stand for different
    tokens, which is possible although the vocabularies have the same size: hardly any draft would be accepted.
    """
    target = load_targets()
    drafter = None if target is None else load_drafters()
    if drafter is None:
        whose = "target" if target is None else "drafter"
        return f"the {whose} has no tokenizer here, so the drafter's tokens are not compared with the target's"
    theirs, own = ({index: token for token, index in one.get_vocab().items()} for one in (target, drafter))
    common = sorted(theirs.keys() & own.keys())
    others = [index for index in common if theirs[index] != own[index]]
    if not others:
        return ""
    first = others[0]
    differ = (
        f"{len(others)} of the {len(common)} ids that both tokenizers have stand for different tokens, such as id "
        f"{first}: {shown(own[first])} in the drafter's and {shown(theirs[first])} in the target's"
    )
    if len(others) > MOST_RENAMED * len(common):
        raise ConfigError(f"{differ}. Choose a drafter with the target's tokenizer, or write {HETEROGENEOUS}")
    return f"{differ}. So few are assumed to be renamed special tokens"


def count_token_ids(load_tokenizer: Callable[[], Any]) -> int | None:
    """One more than a tokenizer's largest id; None if no tokenizer can be loaded."""
    try:
        tokenizer = load_tokenizer()
    except (OSError, ValueError):
        return None
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def _target_token_ids(target: "ModelConfig") -> int | None:
    if target.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    return count_token_ids(lambda: cached_tokenizer_from_config(target))
