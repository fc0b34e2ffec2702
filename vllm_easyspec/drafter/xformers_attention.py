"""xformers' paged split-k attention for the drafter's virtual batch, as an attention backend of vLLM named XFORMERS.

Used where the backend that vLLM chose can't take the virtual batch, or on request (`grouped_attention: xformers`).
Pages and cache write are the Triton backend's; only the attention call differs. xformers' causal masks require queries
in runs of equal length, at most 16. So a sequence's queries are cut, from its end, into such runs, each a sequence of
its own that sees fewer keys; queries that fill up the first run are computed and dropped.
"""

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig, replace, set_current_vllm_config
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.attention.selector import get_attn_backend

from vllm_easyspec.config import GroupedAttention
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.support import ATTENTION_BACKEND, ATTENTION_BACKENDS
from vllm_easyspec.support import XFORMERS as NAME
from vllm_easyspec.support import why_no_xformers as why_unusable

if TYPE_CHECKING:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = init_logger("vllm.easyspec")

LONGEST_RUN = 16  # queries; xformers refuses longer ones under a causal mask
HEAD_SIZES = (16, 32, 64, 128, 256, 512)  # of its kernel


def choose(config: VllmConfig, grouped_attention: GroupedAttention) -> VllmConfig:
    """The drafter's configuration, with xformers as its backend if that is asked for or no other can be used.

    Raises `ConfigError` if it is needed and can't run.
    """
    if grouped_attention == "backend":
        return config
    reason = "it was asked for"
    if grouped_attention == "auto":
        chosen = _vllms_choice(config)
        if chosen in ATTENTION_BACKENDS:
            return config
        if why_unusable():
            raise ConfigError(ATTENTION_BACKEND.describe(chosen))
        reason = f"{chosen} can't take the layers of a group as one batch"
    unusable = why_unusable()
    if unusable:
        raise ConfigError(
            f"grouped_attention={grouped_attention!r} can't be used: {unusable}, or write grouped_attention: backend"
        )
    logger.info("easyspec: the drafter's attention is xformers', since %s", reason)
    config = copy.copy(config)
    config.attention_config = replace(config.attention_config, backend=register())
    return config


def is_chosen(config: VllmConfig) -> bool:
    """Whether `choose` chose xformers; the same on ranks without a layer."""
    return getattr(config.attention_config.backend, "name", None) == NAME


def register() -> AttentionBackendEnum:
    """Register the backend with vLLM in this process. May be repeated."""
    if NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[NAME]
    return AttentionBackendEnum.register(NAME, f"{__name__}.XFormersBackend")


def _vllms_choice(config: VllmConfig) -> str:
    model = config.model_config
    with set_current_vllm_config(config):
        return get_attn_backend(
            model.get_head_size(),
            model.dtype,
            config.cache_config.cache_dtype,
            num_heads=model.hf_config.num_attention_heads,
            has_sliding_window=model.get_sliding_window() is not None,
        ).get_name()


class XFormersBackend(TritonAttentionBackend):
    """vLLM refuses what it can't do when a layer is built: `Selected backend ... is not valid ... Reason`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["XFormersImpl"]:
        return XFormersImpl

    @staticmethod
    def get_builder_cls() -> type["XFormersMetadataBuilder"]:
        return XFormersMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_SIZES

    @classmethod
    def supports_compute_capability(cls, capability: "DeviceCapability") -> bool:
        return capability.major >= 8

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False  # its paged masks have no window

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # the number of splits depends on the batch


@dataclass(frozen=True)
class Runs:
    """Queries cut into runs of equal length. A run is one of xformers' sequences; their number is a power of two."""

    width: int  # queries per run
    take: torch.Tensor  # [runs * width] int64: the token at each place of a run
    back: torch.Tensor  # [tokens] int64: the place of each token
    sequence: torch.Tensor  # [runs] int64: the sequence whose keys a run sees
    unseen: torch.Tensor  # [runs] int32: how many of that sequence's last keys it doesn't see

    @classmethod
    def cut(cls, query_starts: np.ndarray, longest: int, device: torch.device) -> "Runs":
        """query_starts: `[sequences + 1]`; longest: upper bound of queries per sequence."""
        width = min(LONGEST_RUN, _power_of_two(longest))
        lens = np.diff(query_starts)
        counts = -(-lens // width)
        # The kernel is compiled for each number of runs: padding limits how many there are. Padding reads sequence 0.
        padded = _power_of_two(int(counts.sum()))
        sequence, after = np.zeros(padded, np.int64), np.zeros(padded, np.int64)
        live = int(counts.sum())
        sequence[:live] = np.repeat(np.arange(len(lens)), counts)
        ends = np.cumsum(counts)
        after[:live] = (np.repeat(ends, counts) - 1 - np.arange(live)) * width
        first, end = query_starts[sequence], query_starts[sequence + 1]
        tokens = (end - after - width)[:, None] + np.arange(width)
        take = np.maximum(tokens, first[:, None])
        back = np.empty(int(query_starts[-1]), np.int64)
        real = tokens[:live] >= first[:live, None]
        back[tokens[:live][real]] = np.arange(live * width).reshape(live, width)[real]
        take = np.minimum(take, max(0, len(back) - 1))

        def put(array: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(array.reshape(-1), device)

        return cls(width, put(take), put(back), put(sequence), put(after.astype(np.int32)))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class XFormersMetadata:
    """What a pass's attention calls share."""

    query_starts: np.ndarray  # [sequences + 1]
    longest: int  # upper bound of queries per sequence
    seq_lens: torch.Tensor  # [sequences] int32; read by each call, so that new lengths are seen
    block_table: torch.Tensor  # [sequences, width] int32

    @cached_property
    def runs(self) -> Runs:
        """Cut at the first call only: vLLM's runner builds metadata for these layers too, but never runs them."""
        return Runs.cut(self.query_starts, self.longest, self.seq_lens.device)


class XFormersMetadataBuilder(AttentionMetadataBuilder[XFormersMetadata]):
    """Builds a pass's metadata from vLLM's common one."""

    # vLLM reads this for the target's graphs, which don't contain these layers: less would disable them. The drafter's
    # own graphs can't contain `Runs`, which are copied from the host; `open_graphs` asks `is_chosen`.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: "AttentionSpec", layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> XFormersMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.numpy()
        return XFormersMetadata(starts, common.max_query_len, common.seq_lens, common.block_table_tensor)

    def update_draft_decode_metadata(self, _metadata: XFormersMetadata) -> None:
        """Do nothing: lengths and block tables are the caller's own buffers."""


class XFormersImpl(TritonAttentionImpl):
    """The Triton backend's implementation with xformers' attention."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XFormersMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output: `[tokens, heads, head_size]`; kv_cache: `[pages, kv_heads, page_size, 2 * head_size]`, keys
        before values, with heads and tokens in either order in memory."""
        runs = attn_metadata.runs
        keys, values = kv_cache.split(self.head_size, dim=-1)
        attended = paged_attention(
            query[runs.take],
            keys,
            values,
            attn_metadata.block_table[runs.sequence],
            # A padding sequence has no keys; its result is dropped, so it sees one key rather than divide by zero.
            (attn_metadata.seq_lens[runs.sequence] - runs.unseen).clamp_(min=1),
            runs.width,
            self.scale,
        )
        return output.copy_(attended[runs.back])


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    width: int,
    scale: float,
) -> torch.Tensor:
    """Xformers' causal attention of the last `width` positions of each sequence. Returns a tensor of query's shape.

    query: `[sequences * width, heads, head_size]`; keys, values: `[pages, kv_heads, page_size, head_size]`;
    block_table: `[sequences, pages per sequence] int32`; seq_lens: `[sequences] int32`, at least 1.
    """
    from xformers.ops.fmha.attn_bias import (
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask as PagedCausalMask,
    )
    from xformers.ops.fmha.attn_bias import _PaddedSeqLenInfo, _SeqLenInfo
    from xformers.ops.fmha.common import Inputs

    kv_heads, page_size, head_size = keys.shape[1:]
    grouped = (1, query.shape[0], kv_heads, query.shape[1] // kv_heads, head_size)
    key_rows, pages_a_block = _rows(keys, grouped[3])
    value_rows, _ = _rows(values, grouped[3])
    # Lengths on the host are for xformers' own checks, which the operator doesn't run.
    mask = PagedCausalMask(
        q_seqinfo=_SeqLenInfo(seqstart=None, max_seqlen=width, min_seqlen=width, seqstart_py=[0]),
        k_seqinfo=_PaddedSeqLenInfo(
            seqstart=None, max_seqlen=0, min_seqlen=0, seqstart_py=[0], seqlen=seq_lens, seqlen_py=[], padding=0
        ),
        block_tables=block_table * pages_a_block,
        page_size=page_size,
    )
    inputs = Inputs(query.view(grouped), key_rows, value_rows, mask, scale=scale)
    out, _ = _operator(page_size).apply(inputs, needs_gradient=False)
    return out.reshape(query.shape)


def _rows(pages: torch.Tensor, queries_per_head: int) -> tuple[torch.Tensor, int]:
    """Keys or values as the kernel reads them, one row per token: `[1, rows, kv_heads, queries_per_head, head_size]`.

    Also the factor for block numbers: if a page's tokens are stored head by head, a head's rows in one block are
    `kv_heads` blocks away from its rows in the next.
    """
    num_pages, kv_heads, page_size, head_size = pages.shape
    block, head, token, _ = pages.stride()
    if block == page_size * token:
        rows, factor = num_pages * page_size, 1
    elif head == page_size * token and block == kv_heads * head:
        rows, factor = ((num_pages - 1) * kv_heads + 1) * page_size, kv_heads
    else:
        raise ValueError(
            f"xformers can't read K/V pages with strides {tuple(pages.stride())} for {tuple(pages.shape)}. Write "
            "grouped_attention: backend"
        )
    view = pages.as_strided((1, rows, kv_heads, queries_per_head, head_size), (0, token, head, 0, 1))
    return view, factor


@cache
def _operator(page_size: int) -> Any:
    """Xformers' operator with a tile of keys whose size divides the page's."""
    from xformers.ops.fmha.triton_splitk import FwOp

    tile = min(FwOp.BLOCK_N, page_size & -page_size)
    return type("FwOp_paged", (FwOp,), {"BLOCK_N": tile})
