"""What a user writes, read into a frozen `EasySpecConfig`: a path to YAML or JSON, the name of a configuration that
comes with this package, inline JSON, or a dict.

Every refusal is a `ConfigError` of one line that names the field, its value, what is allowed and the remedy. Nothing
here imports vLLM: the file is read before an engine exists, and by `vllm-easyspec doctor` without one.
"""

import difflib
import hashlib
import itertools
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vllm_easyspec.documents import find, read_file, read_json
from vllm_easyspec.drafter.plan import DraftPlan, PlanTable, Scope, parse_grouping
from vllm_easyspec.errors import ConfigError, shown

METHOD = "easyspec"
OPTIONS_KEY = "easyspec"  # in vLLM's additional_config
LOOKAHEAD_HASH_KEY = "lookahead_sha256"  # next to the options there
VOCABULARY_HASH_KEY = "draft_vocabulary_sha256"  # likewise
MOST_ERRORS = 5  # shown for one configuration
MOST_RANGES = 256  # of batch sizes, likewise
MOST_DRAFTS = 256  # far more than can pay off; catches typing errors before the engine starts

MlpMode = Literal["auto", "tensor", "replicate"]
Calibration = Literal["every_round", "never"]
GroupedAttention = Literal["auto", "backend", "xformers"]
Quantization = Literal["int8_per_channel_weight_only", "fp8_per_channel"]  # of vLLM's online methods

logger = logging.getLogger("vllm.easyspec")

# vLLM's speculative fields that easyspec refuses, with the reason and the remedy.
REFUSED_FIELDS = {
    "draft_tensor_parallel_size": "the drafter's layers are spread over the target's tensor-parallel ranks, however "
    "many they are. Remove it",
    "tensor_parallel_size": "the drafter's layers are spread over the target's tensor-parallel ranks. Remove it, and "
    "give the engine --tensor-parallel-size",
    "parallel_drafting": "it needs a drafter trained for it and vLLM's own proposer. Remove it, or use vLLM's own "
    "method: draft_model",
    "kv_cache_dtype": "the drafter's K/V pages lie in the target's allocation and have its type. Remove it",
    "moe_backend": "supported drafters are dense. Remove it; the target's is --moe-backend",
    "enforce_eager": "vLLM reads it nowhere. Remove it, and give the engine --enforce-eager",
    **dict.fromkeys(
        ("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k"),  # from vLLM 0.33 on
        "FLy's verification is lossy. Remove it",
    ),
}

# Fields of vLLM's other methods.
FIELDS_OF_OTHER_METHODS = {
    "prompt_lookup_max": "ngram",
    "prompt_lookup_min": "ngram",
    "suffix_decoding_max_tree_depth": "suffix",
    "suffix_decoding_max_cached_requests": "suffix",
    "suffix_decoding_max_spec_factor": "suffix",
    "suffix_decoding_min_token_prob": "suffix",
    "disable_padded_drafter_batch": "eagle",
    "disable_eagle_block_drop": "eagle",
    "index_share_for_mtp_iteration": "mtp",
    "dspark_draft_topk": "dspark",
    # From vLLM 0.33 on.
    "disable_lookahead_block_hashes": "eagle",
    "draft_lm_head_quantization": "eagle",
    "xpress_topc": "dflash",
}


class _Strict(BaseModel):
    """Unknown keys and wrong types are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _read_grouping(value: Any) -> Any:
    """A plan as text; YAML reads `10` as a number, and lists are taken too."""
    if isinstance(value, list | tuple) and all(type(size) is int for size in value):
        value = "-".join(map(str, value))
    elif type(value) is int:
        value = str(value)
    if not isinstance(value, str):
        return value  # refused as not a string
    try:
        parse_grouping(value)
    except ValueError:
        raise PydanticCustomError("plan", "it is not group sizes joined by dashes") from None
    return value


def _read_vocabulary(value: Any) -> Any:
    """A number of tokens or a path."""
    if (type(value) is int and value >= 1) or (isinstance(value, str) and 1 <= len(value) <= 4096) or value is None:
        return value
    raise PydanticCustomError("draft_vocabulary", "it is neither a number of at least 1 nor a path")


PathText = Annotated[str, Field(min_length=1, max_length=4096, pattern="^[^\\x00]*$")]
Grouping = Annotated[str, BeforeValidator(_read_grouping)]
BY_RULE = {"group_size", "precise_head", "precise_tail"}


class PlanConfig(_Strict):
    """One way to run the drafter's layers side by side."""

    scope: Scope = Field(
        default="attention",
        description="'attention' (the attentions of a group side by side, its MLPs in order) or 'block' (then the MLPs "
        "side by side too: faster, less exact)",
    )
    plan: Grouping | None = Field(
        default=None,
        description="the sizes of all groups in order, which must add up to the drafter's layers, such as 1-4-4-1; in "
        "place of group_size, precise_head and precise_tail",
    )
    group_size: int = Field(default=4, ge=1, description="layers in a group: an integer of at least 1, such as 4")
    precise_head: int = Field(
        default=1, ge=0, description="first layers that run one after another: an integer of at least 0, such as 1"
    )
    precise_tail: int = Field(
        default=1, ge=0, description="last layers that run one after another: an integer of at least 0, such as 1"
    )
    group_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        min_length=1,
        strict=False,
        description="the earlier form of plan: a list of group sizes, each an integer of at least 1, such as "
        "[1, 4, 4, 1]",
    )

    @model_validator(mode="after")
    def _one_way_to_group(self) -> "PlanConfig":
        given = [name for name in ("plan", "group_sizes") if getattr(self, name) is not None]
        others = [*given[1:], *sorted(self.model_fields_set & BY_RULE)]
        if given and others:
            name = given[0]
            value = self.plan if name == "plan" else list(self.group_sizes or ())
            raise ValueError(
                f"{name}={value} is given together with {', '.join(others)}, but only one of them is allowed. Remove "
                f"{name}, or remove {' and '.join(others)}"
            )
        if self.group_sizes is not None:
            _warn_of_group_sizes()
        return self

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The group sizes that were given, in either form."""
        return self.group_sizes if self.plan is None else parse_grouping(self.plan)

    def draft_plan(self, num_layers: int, path: str = "layer_parallel") -> DraftPlan:
        """The plan for a drafter of `num_layers` layers. Raises `ConfigError` where the sizes don't add up.

        path: the place of this plan in the configuration, for the error.
        """
        if self.sizes is None:
            return DraftPlan.grouped(num_layers, self.group_size, self.precise_head, self.precise_tail, self.scope)
        name = "group_sizes" if self.plan is None else "plan"
        try:
            return DraftPlan.of_sizes(num_layers, self.sizes, self.scope, f"{path}.{name}")
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def to_json(self) -> dict[str, Any]:
        """Plain JSON that reads back to the same plans."""
        fields = self.model_dump(mode="json", exclude={"plan", "group_sizes", "by_batch_size"})
        if self.sizes is None:
            return fields
        kept = {name: value for name, value in fields.items() if name not in BY_RULE}
        return kept | {"plan": "-".join(map(str, self.sizes))}


@cache
def _warn_of_group_sizes() -> None:
    """Only once per process, however often a configuration is read."""
    logger.warning(
        "easyspec: group_sizes is now called plan: write plan: 1-4-4-1 in place of group_sizes: [1, 4, 4, 1]"
    )


class BatchSizePlanConfig(PlanConfig):
    """A plan and a K for a range of batch sizes, from above the entry before to `up_to`."""

    up_to: int | None = Field(
        default=None,
        ge=1,
        description="the largest batch size of the entry: an integer of at least 1, such as 4; only the last entry may "
        "go without",
    )
    num_speculative_tokens: int | None = Field(
        default=None,
        ge=0,
        description="K at these batch sizes: an integer of at least 0 (no drafts) and at most "
        "the num_speculative_tokens of all; left out, that one",
    )

    @property
    def has_plan(self) -> bool:
        """False for an entry that only sets K, which takes the plan outside the table."""
        return self.num_speculative_tokens is None or bool(
            self.model_fields_set & {"scope", "plan", "group_sizes", *BY_RULE}
        )

    def to_json(self) -> dict[str, Any]:
        fields = super().to_json() if self.has_plan else {"up_to": self.up_to}
        num_drafts = self.num_speculative_tokens
        return {name: value for name, value in fields.items() if name != "num_speculative_tokens"} | (
            {} if num_drafts is None else {"num_speculative_tokens": num_drafts}
        )


class LayerParallelConfig(PlanConfig):
    """How the drafter's layers run side by side."""

    mlp: MlpMode = Field(
        default="auto",
        description="'tensor' (each MLP cut over the ranks), 'replicate' (whole on each rank, no collective) or 'auto' "
        "(by the drafter's size)",
    )
    by_batch_size: tuple[BatchSizePlanConfig, ...] = Field(
        default=(),
        strict=False,
        max_length=MOST_RANGES,
        description="a list of plans and K for ranges of batch sizes, such as [{up_to: 4, scope: block, plan: 1-8-1, "
        "num_speculative_tokens: 3}]; larger batches take the plan and the K outside the list",
    )

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "LayerParallelConfig":
        ends = [entry.up_to for entry in self.by_batch_size]
        for index, (end, following) in enumerate(itertools.pairwise(ends)):
            if end is None:
                raise ValueError(
                    f"by_batch_size[{index}] has no up_to, and only the last entry may go without. Add up_to, or "
                    "remove the entries after it"
                )
            if following is not None and following <= end:
                raise ValueError(
                    f"by_batch_size[{index + 1}].up_to={shown(following)} is not above the {shown(end)} of the entry "
                    "before. Order the entries by up_to, each larger than the last"
                )
        return self

    def plan_table(self, num_layers: int) -> PlanTable:
        """The plans of all batch sizes for a drafter of `num_layers` layers.

        Raises `ConfigError` if the sizes of any plan, used or not, don't add up.
        """
        beyond = self.draft_plan(num_layers)
        return PlanTable.of(
            beyond,
            [
                (
                    entry.up_to,
                    entry.draft_plan(num_layers, f"layer_parallel.by_batch_size[{index}]")
                    if entry.has_plan
                    else beyond,
                )
                for index, entry in enumerate(self.by_batch_size)
            ],
        )

    def to_json(self) -> dict[str, Any]:
        table = [entry.to_json() for entry in self.by_batch_size]
        return super().to_json() | ({"by_batch_size": table} if table else {})


class RuntimeOptions(_Strict):
    """What the worker needs beyond vLLM's own speculative configuration; travels in `additional_config`."""

    layer_parallel: LayerParallelConfig = Field(
        default=LayerParallelConfig(), description="a mapping with scope, plan and so on"
    )
    calibration: Calibration = Field(
        default="every_round",
        description="'every_round' (the K/V of accepted tokens is made precise) or 'never' (to measure what that is "
        "worth)",
    )
    grouped_attention: GroupedAttention = Field(
        default="auto",
        description="'backend' (vLLM's attention backend takes a group's layers), 'xformers' or 'auto' (xformers where "
        "the backend can't)",
    )
    check_ranks: bool = Field(
        default=False,
        description="true or false; true asserts every round that all ranks drafted the same tokens (debugging)",
    )
    lookahead: PathText | None = Field(
        default=None, description="a file of look-ahead maps, which vllm-easyspec fit writes"
    )
    quantization: Quantization | None = Field(
        default=None,
        description="'int8_per_channel_weight_only' or 'fp8_per_channel' (the drafter's weights are quantized when "
        "loaded, its activations are not), or leave it out",
    )
    draft_vocabulary: Annotated[int | str | None, BeforeValidator(_read_vocabulary)] = Field(
        default=None,
        description="the tokens that may be drafted: a number N of at least 1, such as 32768 (the N lowest ids and the "
        "special tokens), or a file that vllm-easyspec fit --vocabulary writes; left out, all of them",
    )

    use_heterogeneous_vocab: bool = Field(
        default=False,
        description="true (the drafter has another tokenizer: drafts come from the tokens that both have) or false",
    )

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> "RuntimeOptions":
        """The options of a running engine, from its `VllmConfig`."""
        additional = vllm_config.additional_config
        if not isinstance(additional, Mapping) or OPTIONS_KEY not in additional:
            raise ConfigError(
                f"additional_config={additional!r} holds no {OPTIONS_KEY!r} options. Don't set worker_cls yourself: "
                "give vLLM a speculative_config with method: easyspec"
            )
        return cls.from_json(additional[OPTIONS_KEY])

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> "RuntimeOptions":
        """The options in `additional_config`: what `to_json` gave, and hashes of the files that it names."""
        hashes = (LOOKAHEAD_HASH_KEY, VOCABULARY_HASH_KEY)
        return cls.model_validate({key: value for key, value in options.items() if key not in hashes})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON that reads back to the same options (vLLM hashes `additional_config` as JSON)."""
        return {
            "layer_parallel": self.layer_parallel.to_json(),
            "calibration": self.calibration,
            "grouped_attention": self.grouped_attention,
            "check_ranks": self.check_ranks,
            **({"lookahead": self.lookahead} if self.lookahead else {}),
            **({"draft_vocabulary": self.draft_vocabulary} if self.draft_vocabulary else {}),
            **({"use_heterogeneous_vocab": True} if self.use_heterogeneous_vocab else {}),
            **({"quantization": self.quantization} if self.quantization else {}),
        }


class EasySpecConfig(RuntimeOptions):
    """One easyspec configuration, as written in YAML."""

    method: Literal["easyspec"] = Field(description="'easyspec'")
    model: PathText = Field(description="the drafter: a folder, or a name on the Hugging Face hub")
    num_speculative_tokens: int = Field(
        ge=1, le=MOST_DRAFTS, description=f"tokens drafted per round (K): an integer from 1 to {MOST_DRAFTS}, such as 5"
    )

    # vLLM's own fields, passed through unchanged.
    draft_sample_method: Literal["greedy", "probabilistic"] | None = Field(
        default=None, description="'greedy' or 'probabilistic'"
    )
    rejection_sample_method: Literal["standard", "synthetic", "block"] | None = Field(
        default=None, description="'standard', 'synthetic' (benchmarks) or 'block'"
    )
    synthetic_acceptance_rates: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        default=None,
        description="with rejection_sample_method: synthetic, one rate from 0 to 1 for each drafted position",
    )
    synthetic_acceptance_length: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="with rejection_sample_method: synthetic, a number from 1 to num_speculative_tokens + 1",
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="the drafter's longest context: an integer of at least 1, at most the target's"
    )
    revision: str | None = Field(default=None, description="a branch, tag or commit of the drafter on the hub")
    code_revision: str | None = Field(
        default=None, description="a branch, tag or commit of the drafter's code on the hub"
    )
    attention_backend: str | None = Field(
        default=None, description="an attention backend of vLLM for the drafter, such as TRITON_ATTN"
    )
    num_speculative_tokens_per_batch_size: list[list[int]] | None = Field(
        default=None,
        description="vLLM's own form of K by batch size: [first batch size, last batch size, K] for each range, such "
        "as [[1, 8, 5]]; or give num_speculative_tokens in layer_parallel.by_batch_size",
    )
    use_local_argmax_reduction: bool | None = Field(
        default=None,
        description="true (greedy drafts are found on each rank's part of the vocabulary, two numbers per rank) or "
        "false (logits are gathered); left out, true with greedy drafts and without adaptive verification",
    )
    enable_adaptive_verification: bool | None = Field(
        default=None,
        description="true (each step verifies only the drafts of all requests that are worth their cost, by vLLM's "
        "estimate of each draft's acceptance; needs CUDA graphs) or false (every draft is verified)",
    )
    draft_load_config: dict[str, Any] | None = Field(
        default=None, description="a mapping of vLLM's LoadConfig for the drafter, such as {load_format: dummy}"
    )

    @model_validator(mode="after")
    def _one_table_of_k(self) -> "EasySpecConfig":
        table, max_drafts = self.layer_parallel.by_batch_size, self.num_speculative_tokens
        given = [(i, entry.num_speculative_tokens) for i, entry in enumerate(table)]
        for index, num_drafts in given:
            if num_drafts is None:
                continue
            name = f"layer_parallel.by_batch_size[{index}].num_speculative_tokens={shown(num_drafts)}"
            if self.num_speculative_tokens_per_batch_size is not None:
                raise ValueError(
                    f"{name} is given together with num_speculative_tokens_per_batch_size="
                    f"{self.num_speculative_tokens_per_batch_size}, but only one of the two may set K by batch size. "
                    "Remove num_speculative_tokens_per_batch_size, or num_speculative_tokens from all entries of "
                    "by_batch_size"
                )
            if num_drafts > max_drafts:
                raise ValueError(
                    f"{name} is more than num_speculative_tokens={max_drafts}, the most that a round may draft. Raise "
                    "that one, or lower this one"
                )
        return self

    @model_validator(mode="after")
    def _one_choice_of_tokens(self) -> "EasySpecConfig":
        if self.use_heterogeneous_vocab and self.draft_vocabulary is not None:
            raise ValueError(
                f"draft_vocabulary={shown(self.draft_vocabulary)} is given together with use_heterogeneous_vocab=True, "
                "which chooses the tokens itself. Remove draft_vocabulary"
            )
        return self

    @model_validator(mode="after")
    def _logits_for_adaptive_verification(self) -> "EasySpecConfig":
        if self.enable_adaptive_verification and self.use_local_argmax_reduction:
            raise ValueError(
                "use_local_argmax_reduction=True is given together with enable_adaptive_verification=True, which "
                "estimates acceptance from all logits of a draft. Remove one of the two"
            )
        return self

    def drafts_by_batch_size(self) -> list[list[int]] | None:
        """The table of K for vLLM, `[first batch size, last batch size, K]` per range; None if K is always the same."""
        table = self.layer_parallel.by_batch_size
        if all(entry.num_speculative_tokens is None for entry in table):
            return self.num_speculative_tokens_per_batch_size
        max_drafts, first, ranges = self.num_speculative_tokens, 1, []
        for entry in table:
            num_drafts = max_drafts if entry.num_speculative_tokens is None else entry.num_speculative_tokens
            ranges.append([first, entry.up_to or first, num_drafts])
            first = ranges[-1][1] + 1
        if table[-1].up_to is not None:
            ranges.append([first, first, max_drafts])  # for larger batches vLLM uses the last K
        return ranges

    def num_drafts_at(self, batch_size: int) -> int:
        """K of a round of `batch_size` requests, as vLLM's scheduler chooses it."""
        chosen = [
            num_drafts for first, _, num_drafts in sorted(self.drafts_by_batch_size() or []) if first <= batch_size
        ]
        return min([self.num_speculative_tokens, *chosen[-1:]])

    @classmethod
    def parse(cls, value: str | Path | Mapping[str, Any], source: str = "") -> "EasySpecConfig":
        """Read a configuration from a path, a shipped file's name, inline JSON or a dict. Raises `ConfigError`.

        `source` names where a dict came from; it defaults to the path.
        """
        source = source or (str(value) if is_path(value) else "")
        fields = {str(key).replace("-", "_"): part for key, part in load(value).items()}
        prefix = f"{source}: " if source else ""
        if fields.get("method") != METHOD:
            raise ConfigError(f"{prefix}method={shown(fields.get('method'))} is not easyspec. Write method: easyspec")
        _refuse_known_fields(fields, prefix)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            errors = error.errors()
            explained = [_explain(part) for part in errors[:MOST_ERRORS]]
            more = [f"and {len(errors) - MOST_ERRORS} more errors"] if len(errors) > MOST_ERRORS else []
            raise ConfigError(prefix + "; ".join(explained + more)) from None

    def draft_model(self) -> dict[str, Any]:
        """The speculative configuration of vLLM's own `draft_model` with this drafter, K and vLLM's fields."""
        ours = set(RuntimeOptions.model_fields) | {"method"}
        fields = {"method": "draft_model", **self.model_dump(mode="json", exclude=ours, exclude_none=True)}
        table = self.drafts_by_batch_size()
        return fields if table is None else fields | {"num_speculative_tokens_per_batch_size": table}

    def to_dict(self) -> dict[str, Any]:
        """A `speculative_config` that reads back to this configuration."""
        ours = set(RuntimeOptions.model_fields)
        return self.model_dump(mode="json", exclude=ours, exclude_none=True) | self.to_json()

    def to_vllm(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The speculative configuration for vLLM, and the options that go to `additional_config["easyspec"]`."""
        # 1 passes vLLM's check of the head counts at any rank count, and Model Runner V2 reads it nowhere else.
        fields = self.draft_model() | {"draft_tensor_parallel_size": 1}
        if self.draft_sample_method != "probabilistic" and not self.enable_adaptive_verification:
            fields.setdefault("use_local_argmax_reduction", True)
        options = RuntimeOptions(**{name: getattr(self, name) for name in RuntimeOptions.model_fields}).to_json()
        # vLLM distinguishes configurations by a hash of the options, and a path doesn't change with the file's content.
        if self.lookahead is not None:
            options[LOOKAHEAD_HASH_KEY] = _content_hash("lookahead", self.lookahead, "fit")
        if isinstance(self.draft_vocabulary, str):
            options[VOCABULARY_HASH_KEY] = _content_hash("draft_vocabulary", self.draft_vocabulary, "fit --vocabulary")
        return fields, options

    def check_model(self) -> None:
        """Raise `ConfigError` if `model` is a path on this machine without a model."""
        path = Path(self.model).expanduser()
        try:
            is_folder = (path / "config.json").is_file()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"model={shown(self.model)} is no path: {reason}. Give the drafter's folder") from error
        if not is_folder and (path.exists() or _looks_like_path(self.model)):
            what = "is not a folder with a config.json" if path.exists() else "does not exist"
            raise ConfigError(
                f"model={self.model!r} {what}. Give the drafter's folder (a path that begins with ./ or ../ in a file "
                "counts from that file's folder), or a name on the Hugging Face hub such as Qwen/Qwen2.5-0.5B-Instruct"
            )


def is_path(value: Any) -> bool:
    """Whether `value` is a path to a file or a shipped file's name, rather than inline JSON or a dict."""
    return isinstance(value, Path) or (isinstance(value, str) and not value.lstrip().startswith("{"))


def load(value: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read what `EasySpecConfig.parse` takes into a plain dict, of whatever method. Raises `ConfigError`.

    In an easyspec file a `model`, `lookahead` or `draft_vocabulary` that begins with ./ or ../ counts from the file's
    folder; nothing else is changed.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if not is_path(value):
        return _mapping(read_json(str(value), "the inline configuration"), "the inline configuration")
    path = find(value)
    config = _mapping(read_file(path), str(path))
    if is_easyspec(config):
        for name in ("model", "lookahead", "draft_vocabulary"):
            written = config.get(name)
            if isinstance(written, str) and written.startswith(("./", "../")):
                try:
                    config[name] = str((path.parent / written).resolve())
                except (OSError, ValueError) as error:  # too long, or with characters that no path has
                    reason = getattr(error, "strerror", None) or str(error)
                    raise ConfigError(f"{path}: {name}={shown(written)} is no path: {reason}. Correct it") from error
    return config


def is_easyspec(config: Mapping[str, Any]) -> bool:
    """Whether a speculative configuration asks for easyspec. Raises `ConfigError` if it almost does."""
    method = config.get("method")
    if method == METHOD:
        return True
    if isinstance(method, str) and re.sub("[^a-z]", "", method.lower()) == METHOD:
        raise ConfigError(f"method={shown(method)} is unknown. Write method: easyspec")
    if method is None and "layer_parallel" in config:
        raise ConfigError("method is missing, but layer_parallel is given. Write method: easyspec")
    return False


def _mapping(config: Any, source: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ConfigError(
            f"{source} holds {type(config).__name__} {shown(config)} where a mapping of fields is needed. Write "
            "method: easyspec, model: ..., num_speculative_tokens: 5, one per line"
        )
    return config


def _looks_like_path(model: str) -> bool:
    """Names on the hub are `name` or `owner/name`; remote stores have a scheme."""
    return "://" not in model and (model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/"))


def _content_hash(field: str, path: str, command: str) -> str:
    """Of a file that `vllm-easyspec` with `command` wrote. Raises `ConfigError` for a file that can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{field}={path!r} can't be read: {error.strerror}. Give a file that vllm-easyspec {command} wrote (a path "
            "that begins with ./ or ../ in a file counts from that file's folder), or remove it"
        ) from error


def _refuse_known_fields(fields: Mapping[str, Any], prefix: str) -> None:
    for name, value in fields.items():
        if value is None:
            continue
        if name in REFUSED_FIELDS:
            raise ConfigError(f"{prefix}{name}={shown(value)} is not allowed with easyspec: {REFUSED_FIELDS[name]}")
        if name in FIELDS_OF_OTHER_METHODS:
            raise ConfigError(
                f"{prefix}{name}={shown(value)} is not allowed with easyspec: it belongs to vLLM's method "
                f"{FIELDS_OF_OTHER_METHODS[name]}. Remove it"
            )


# The model of each place that may contain a mapping.
_OWNERS: dict[tuple[str, ...], type[BaseModel]] = {
    ("layer_parallel",): LayerParallelConfig,
    ("layer_parallel", "by_batch_size"): BatchSizePlanConfig,
}


def _explain(error: Any) -> str:
    """One pydantic error as a sentence: field, value, what is allowed."""
    *parents, name = [part for part in error["loc"] if isinstance(part, str)] or [""]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    owner = _OWNERS.get(tuple(parents), EasySpecConfig)
    if error["type"] == "value_error":
        return f"{path}.{error['ctx']['error']}".lstrip(".")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, owner.model_fields, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        allowed = ", ".join(owner.model_fields)
        return f"unknown key {path!r} with value {shown(error['input'])}. {hint}Allowed are {allowed}"
    description = owner.model_fields[name].description
    if error["type"] == "missing":
        return f"{path} is missing. Add it: {description}"
    message = error["msg"].replace("Tuple", "List").replace("tuple", "list")  # YAML and JSON only have lists
    return f"{path}={shown(error['input'])} is not allowed: {message}. Give {description}"
