"""The drafter's K/V pages on this rank: who owns them, and how a group's layers become one batch of sequences.

Ownership. vLLM's K/V cache manager allocates blocks; target and drafter share one block table, so block `b` of a
request means page `b` of every layer, of the target and of the drafter. A rank holds pages only for its own layers. A
drafter page contains precise K/V for every position up to a request's newest token once a round's calibration has run,
and fuzzy K/V for at most K-1 positions after it, which the next calibration overwrites or which is never read. A page
that vLLM shares through prefix caching contains calibrated positions only. Paused rounds (K = 0) leave pages behind;
their blocks are marked, and read before the next draft (`uncalibrated.py`).

The virtual batch. vLLM places the pages of layers with the same K/V spec one layer after another, at a constant stride.
So the pages of a rank's layers `s .. s+G-1` are one array of `G * num_blocks` pages that starts at layer `s`, and `G`
layers of `B` requests are `G * B` sequences of one paged-attention call: block tables are shifted by `num_blocks` per
layer, cache slots by `num_blocks * block_size`.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.worker.utils import AttentionGroup

from vllm_easyspec.ops import WHY_NOT_NATIVE, advance_draft_inputs, shift_block_table, shift_slots

if TYPE_CHECKING:
    from vllm_easyspec.drafter.model import Rotate

# Backends whose pages hold plain keys and values: `[pages, kv_heads, page tokens, 2 * head_dim]`. CPU_ATTN instead
# packs keys for its vector units.
PLAIN_CACHE_BACKENDS = {"FLASH_ATTN", "TRITON_ATTN"}


class DrafterAttention(Attention):
    """Registers the pages of one drafter layer with vLLM, and holds the attention backend's implementation."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Full attention, also for a drafter with a sliding window: its pages then follow the target's block table."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
        )


@dataclass(frozen=True)
class Sequences:
    """The tokens of one pass as paged-attention sequences: of one layer, or, from `repeat_layers`, of several.

    Not vLLM's `CommonAttentionMetadata`, which `PagedKV.metadata` makes from it for each build: that class caches what
    builders derive from it, and a copy for more layers, or for the next step, would keep stale values.

    positions: `[tokens] int64`; slots: `[tokens] int64`, -1 for tokens whose K/V is not written; query_start_loc:
    `[reqs + 1] int32`, and its copy on the host; seq_lens: `[reqs] int32`, keys that the last query of a request sees;
    seq_lens_bound: upper bounds of these on the host; block_table: `[reqs, width] int32`; max_query_len, max_seq_len:
    upper bounds.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_bound: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int

    def repeat_layers(self, num_layers: int, num_blocks: int, block_size: int) -> "Sequences":
        """The same tokens in `num_layers` layers, layer by layer, for any group of that size.

        num_blocks: cache blocks of one layer, each of `block_size` tokens.
        """
        if num_layers == 1:
            return self
        tokens = self.positions.shape[0]
        return replace(
            self,
            positions=self.positions.repeat(num_layers),
            slots=shift_slots(self.slots, num_layers, num_blocks * block_size),
            query_start_loc=_repeat_starts(self.query_start_loc, num_layers, tokens),
            query_start_loc_cpu=_repeat_starts(self.query_start_loc_cpu, num_layers, tokens),
            seq_lens=self.seq_lens.repeat(num_layers),
            seq_lens_bound=self.seq_lens_bound.repeat(num_layers),
            block_table=shift_block_table(self.block_table, num_layers, num_blocks),
        )


class PagedKV:
    """Joint views of the pages of this rank's drafter layers. Built again whenever vLLM binds other pages."""

    def __init__(
        self,
        layers: Sequence[DrafterAttention],
        group: AttentionGroup | None,
        num_blocks: int,
        block_size: int,
        captured_tokens: int = 0,
    ):
        """layers: this rank's, in the model's order; group: their vLLM attention group, None where the rank has none;
        captured_tokens: tokens of the longest calibration pass that a CUDA graph may hold.

        Raises ValueError where the pages are not laid out one layer after another.
        """
        self.layers = layers
        self.group = group
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.captured_tokens = captured_tokens
        # Weak, so as not to keep pages that vLLM has freed; an address would not do, since later pages may reuse it.
        self.first_pages = weakref.ref(layers[0].kv_cache) if layers else None
        if layers:
            self._check_layout()
        # Whether `rotate_and_store` may write the pages; its reference can't do so within a CUDA graph.
        self.is_plain = (
            bool(layers) and WHY_NOT_NATIVE is None and layers[0].attn_backend.get_name() in PLAIN_CACHE_BACKENDS
        )

    def _check_layout(self) -> None:
        first = self.layers[0].kv_cache
        pages = first.shape[0]
        layer_bytes = pages * first.stride(0) * first.element_size()
        if pages % self.num_blocks:
            raise ValueError(f"a drafter layer has {pages} pages, no multiple of the {self.num_blocks} cache blocks")
        split = self.group.kernel_block_size if self.group else None
        kernel_block = split or self.block_size * self.num_blocks // pages
        if kernel_block != self.block_size:
            raise ValueError(
                f"an attention backend splits the cache's blocks of {self.block_size} tokens into blocks of "
                f"{kernel_block}, which easyspec does not support. Give --block-size {kernel_block}"
            )
        for index, layer in enumerate(self.layers):
            cache = layer.kv_cache
            if cache.shape != first.shape or cache.data_ptr() != first.data_ptr() + index * layer_bytes:
                raise ValueError(
                    "the drafter's K/V pages are not laid out one layer after another, as easyspec needs: "
                    f"layer {layer.layer_name} has shape {tuple(cache.shape)}, strides {cache.stride()}. Choose a "
                    "layer-compact K/V cache layout (unset VLLM_KV_CACHE_LAYOUT, no K/V connector)"
                )

    def is_current(self) -> bool:
        """Whether the pages are still those that vLLM has bound."""
        return self.first_pages is None or self.layers[0].kv_cache is self.first_pages()

    def pages(self, layers: slice) -> torch.Tensor:
        """The pages of consecutive layers as one cache, `[layers * pages, ...]`, in the backend's own layout."""
        first = self.layers[layers.start].kv_cache
        count = layers.stop - layers.start
        size = (count * first.shape[0], *first.shape[1:])
        return torch.as_strided(first, size, first.stride(), first.storage_offset())

    def metadata(self, sequences: Sequences) -> Any:
        """The attention backend's metadata for `sequences`; it refers to their tensors."""
        assert self.group is not None
        metadata = self.group.build_metadata(
            CommonAttentionMetadata(
                query_start_loc=sequences.query_start_loc,
                query_start_loc_cpu=sequences.query_start_loc_cpu,
                seq_lens=sequences.seq_lens,
                seq_lens_cpu_upper_bound=sequences.seq_lens_bound,
                num_reqs=sequences.seq_lens.shape[0],
                num_actual_tokens=sequences.positions.shape[0],
                max_query_len=sequences.max_query_len,
                max_seq_len=sequences.max_seq_len,
                block_table_tensor=sequences.block_table,
                slot_mapping=sequences.slots,
                positions=sequences.positions,
                is_prefilling=torch.zeros(sequences.seq_lens.shape[0], dtype=torch.bool),
            ),
            # Without a schedule in the builder's one buffer: a pass holds metadata for groups of several sizes.
            fast_build=True,
        )
        is_long = sequences.max_query_len > 1 and sequences.positions.shape[0] > self.captured_tokens
        if is_long and hasattr(metadata, "max_num_splits"):
            # Otherwise FlashAttention 3 would allocate a buffer of all queries for each split that a graph may need.
            metadata.max_num_splits = 0
        return metadata


def _repeat_starts(starts: torch.Tensor, num_layers: int, tokens: int) -> torch.Tensor:
    """`[reqs + 1]` to `[num_layers * reqs + 1]`: each layer's sequences follow the last layer's tokens."""
    shifts = torch.arange(num_layers, dtype=starts.dtype, device=starts.device).unsqueeze(1) * tokens
    return torch.cat([(starts[:-1] + shifts).view(-1), starts[-1:] + (num_layers - 1) * tokens])


class PagedPass:
    """One pass over the drafter's pages. Implements `drafter.model.Attend`."""

    def __init__(self, pages: PagedKV, sequences: Sequences):
        self.pages = pages
        self.sequences = sequences
        self.virtual: dict[int, tuple[Sequences, Any]] = {}  # by number of layers, with the backend's metadata

    def _virtual(self, num_layers: int) -> tuple[Sequences, Any]:
        if num_layers not in self.virtual:
            sequences = self._repeated(num_layers)
            self.virtual[num_layers] = sequences, self.pages.metadata(sequences)
        return self.virtual[num_layers]

    def _repeated(self, num_layers: int) -> Sequences:
        return self.sequences.repeat_layers(num_layers, self.pages.num_blocks, self.pages.block_size)

    def attend(self, layers: slice, qkv: torch.Tensor, rotate: "Rotate") -> torch.Tensor:
        sequences, metadata = self._virtual(layers.stop - layers.start)
        layer, cache = self.pages.layers[layers.start], self.pages.pages(layers)
        if self.pages.is_plain:
            q, k, v = rotate(layers, qkv, sequences.positions, cache, sequences.slots)
        else:
            q, k, v = rotate(layers, qkv, sequences.positions)
            if not layer.attn_backend.forward_includes_kv_cache_update:
                layer.impl.do_kv_cache_update(layer, k, v, cache, sequences.slots)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        layer.impl.forward(layer, q, k, v, cache, metadata, output=out)
        return out


class DecodePass(PagedPass):
    """The passes of a loop of fuzzy steps, one token per request; `advance` moves all requests by a position, in place.

    If the attention backend can refresh its metadata on the device, nothing is built on the host between steps, so a
    CUDA graph can record the whole loop.
    """

    def __init__(
        self,
        pages: PagedKV,
        positions: torch.Tensor,
        live: torch.Tensor,
        block_table: torch.Tensor,
        num_layers: int,
        max_len: int,
        max_seq_len: int,
    ):
        """positions: `[reqs] int64`, of the tokens read last, -1 for requests that pad the batch; live: `[reqs]
        bool`, requests that write and read pages; block_table: `[reqs, width] int32`; num_layers: this rank's share of
        the largest group; max_len: positions that the drafter may hold; max_seq_len: upper bound of sequence lengths in
        the loop.
        """
        reqs, device = positions.shape[0], positions.device
        self.positions, self.live, self.max_len = positions, live, max_len
        self.block_table = torch.where(live.unsqueeze(1), block_table, 0)
        self.input_ids = torch.empty_like(positions)
        starts_cpu = torch.arange(num_layers * reqs + 1, dtype=torch.int32)
        bound = min(max_seq_len, max_len)
        # Layer by layer, so that the sequences of fewer layers are a prefix.
        self.all_layers = Sequences(
            positions=torch.empty(num_layers * reqs, dtype=torch.int64, device=device),
            slots=torch.empty(num_layers * reqs, dtype=torch.int64, device=device),
            query_start_loc=torch.arange(num_layers * reqs + 1, dtype=torch.int32, device=device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=torch.empty(num_layers * reqs, dtype=torch.int32, device=device),
            seq_lens_bound=torch.full_like(starts_cpu[1:], bound),
            block_table=shift_block_table(self.block_table, num_layers, pages.num_blocks),
            max_query_len=1,
            max_seq_len=bound,
        )
        builder = pages.group.get_metadata_builder() if pages.group else None
        self.builder = builder if builder and builder.supports_draft_decode_metadata_update else None
        super().__init__(pages, self.all_layers)

    def advance(self, drafts: torch.Tensor) -> None:
        """drafts: `[reqs] int64`, which become the `input_ids` of the next step."""
        advance_draft_inputs(
            drafts,
            self.positions,
            self.live,
            self.block_table,
            self.input_ids,
            self.all_layers.positions,
            self.all_layers.seq_lens,
            self.all_layers.slots,
            self.pages.block_size,
            self.pages.num_blocks,
            self.max_len,
        )
        if self.builder is None:
            self.virtual.clear()
        else:
            for _, metadata in self.virtual.values():
                self.builder.update_draft_decode_metadata(metadata)

    def _repeated(self, num_layers: int) -> Sequences:
        of_all, count = self.all_layers, num_layers * self.positions.shape[0]
        return replace(
            of_all,
            positions=of_all.positions[:count],
            slots=of_all.slots[:count],
            query_start_loc=of_all.query_start_loc[: count + 1],
            query_start_loc_cpu=of_all.query_start_loc_cpu[: count + 1],
            seq_lens=of_all.seq_lens[:count],
            seq_lens_bound=of_all.seq_lens_bound[:count],
            block_table=of_all.block_table[:count],
        )


@dataclass
class UnpagedPass:
    """A pass without pages, for vLLM's memory profiling: its attention returns q. Implements `Attend`."""

    positions: torch.Tensor

    def attend(self, layers: slice, qkv: torch.Tensor, rotate: "Rotate") -> torch.Tensor:
        q, _, _ = rotate(layers, qkv, self.positions.repeat(qkv.shape[0]))
        return q.contiguous()


class DensePass:
    """Precise attention over one whole sequence, without pages; keeps its K/V in `seen`. Implements `Attend`.

    The audit's reference: it shares the drafter's weights with the drafting passes, but not their paging.
    """

    def __init__(self, num_tokens: int, sliding_window: int | None, device: torch.device):
        self.positions = torch.arange(num_tokens, device=device)
        self.sliding_window = sliding_window
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def mask(self) -> torch.Tensor:
        distance = self.positions.unsqueeze(1) - self.positions
        visible = distance >= 0
        return visible if self.sliding_window is None else visible & (distance < self.sliding_window)

    def attend(self, layers: slice, qkv: torch.Tensor, rotate: "Rotate") -> torch.Tensor:
        assert qkv.shape[0] == 1, "precise: one layer after another"
        q, k, v = rotate(layers, qkv, self.positions)
        self.seen[layers.start] = (k.clone(), v.clone())
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=self.mask, enable_gqa=True
        )
        return out.transpose(0, 1).contiguous()
