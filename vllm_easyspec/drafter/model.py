"""`LayerParallelDrafter`: the drafter's forward pass under any plan, both scopes, on any number of ranks.

Every rank holds the whole attentions of its own layers (`LayerPlacement`), stacked, so that its share of a group is a
slice; the MLPs of all layers, sharded or replicated; and a shard of the embedding and the LM head. Hidden states are
bitwise equal on all ranks: whatever differs between ranks goes through a collective whose result all ranks use.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.head import DraftHead
from vllm_easyspec.drafter.paged_kv import DrafterAttention
from vllm_easyspec.drafter.placement import LayerPlacement, MlpPlacement, choose_mlp
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.drafter.quantization import prepared
from vllm_easyspec.drafter.quantized_checkpoint import decompressed
from vllm_easyspec.drafter.weights import load_drafter_weights
from vllm_easyspec.lookahead import GroupLookahead, LookaheadFile, LookaheadMaps
from vllm_easyspec.metrics import PassCounters
from vllm_easyspec.ops import (
    embed_shard,
    group_rms_norm,
    norm_and_project,
    prefix_sums,
    project_among_zeros,
    rotate_and_store,
    sum_of_mlps,
)
from vllm_easyspec.rank_check import first_problem
from vllm_easyspec.support import draft_vocabulary

MATRICES = ("wqkv", "wo", "w_gate_up", "w_down")  # of `LayerParallelDrafter`


class Rotate(Protocol):
    """The drafter's head norms and rotary embedding."""

    def __call__(
        self,
        layers: slice,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate `qkv` in place, and write keys and values to `slots` of the pages `cache` if these are given.

        qkv: `[layers, tokens, heads + 2 kv_heads, head_dim]`; positions, slots: `[layers * tokens] int64`. Returns q, k
        and v, each `[layers * tokens, heads, head_dim]`.
        """
        ...


class Attend(Protocol):
    """One pass's attention over the K/V of this rank's layers, at the positions and slots of the pass's tokens."""

    def attend(self, layers: slice, qkv: torch.Tensor, rotate: Rotate) -> torch.Tensor:
        """Rotate queries and keys at the pass's positions, store keys and values, attend.

        layers: consecutive ones of this rank's own; qkv: `[layers, tokens, heads + 2 kv_heads, head_dim]`, changed in
        place. Returns `[layers * tokens, heads, head_dim]`, layer by layer.
        """
        ...


class LayerParallelDrafter(nn.Module):
    """One rank's share of the drafter, as vLLM's model loader builds and fills it."""

    cos_sin: torch.Tensor  # [positions, rotary dim], as the rotary embedding holds them
    own_ids: torch.Tensor | None  # [vocab_size] int64: the id that the drafter reads for each of the target's
    # Of quantized matrices, [layers, columns] float32.
    wqkv_scales: torch.Tensor | None
    wo_scales: torch.Tensor | None
    w_gate_up_scales: torch.Tensor | None
    w_down_scales: torch.Tensor | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        shape = DrafterShape.from_hf_config(config)
        options = RuntimeOptions.from_vllm(vllm_config)
        self.shape = shape
        self.rank, self.num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.placement = LayerPlacement(shape.num_layers, self.num_ranks)
        self.local_layers = self.placement.layers_of(self.rank)
        self.dtype = vllm_config.model_config.dtype
        self.quantization = options.quantization
        self.checkpoint_quantization = getattr(config, "quantization_config", None)
        device_type = vllm_config.device_config.device_type
        self.mlp = choose_mlp(options.layer_parallel.mlp, shape, self.num_ranks, self.dtype.itemsize, device_type)
        self.counters = PassCounters()
        self.lookahead: LookaheadMaps | None = None
        # For fitting maps: called with each group, its input and its attentions' outputs, `[group, tokens, hidden]`.
        self.observer: Callable[[range, torch.Tensor, torch.Tensor], None] | None = None

        self.prefix = prefix
        self.vocabulary = vocabulary = draft_vocabulary(vllm_config, options, shape)
        inputs = None if vocabulary is None or vocabulary.inputs is None else torch.tensor(vocabulary.inputs)
        self.register_buffer("own_ids", inputs, persistent=False)
        self.rotary = get_rope(
            shape.head_dim,
            max_position=max(shape.max_position_embeddings, vllm_config.model_config.max_model_len),
            rope_parameters=shape.rope_parameters,
        )
        self.register_buffer("cos_sin", self.rotary.cos_sin_cache.to(self.dtype), persistent=False)
        cache_config = copy.copy(vllm_config.cache_config)
        cache_config.sliding_window = None  # otherwise a layer without a window would use the target's
        self.attention = nn.ModuleList(
            DrafterAttention(
                shape.num_heads,
                shape.head_dim,
                shape.head_dim**-0.5,
                num_kv_heads=shape.num_kv_heads,
                cache_config=cache_config,
                per_layer_sliding_window=shape.sliding_window,
                prefix=f"{prefix}.layers.{layer}.attn",
            )
            for layer in self.local_layers
        )
        self._create_weights()
        self.vocab_size = self.head.vocab_size  # ids that the drafter takes and gives, all of them the target's

    def _create_weights(self) -> None:
        """Stacked weights, embedding and head; matrices are stored input-major (`x @ w`)."""
        shape, local, all_layers = self.shape, len(self.local_layers), self.shape.num_layers
        name = f"{self.prefix}.embed_tokens"
        self.embed_tokens = VocabParallelEmbedding(shape.vocab_size, shape.hidden_size, prefix=name)
        self.head = DraftHead(shape, self.embed_tokens, self.vocabulary, prefix=f"{self.prefix}.lm_head")
        hidden, qkv = shape.hidden_size, shape.q_size + 2 * shape.kv_size
        self.mlp_shard = self.mlp.shard(shape.intermediate_size, self.rank, self.num_ranks)
        width = len(self.mlp_shard)

        def weight(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*sizes, dtype=self.dtype), requires_grad=False)

        self.attention_norms = weight(local, hidden)
        self.wqkv = weight(local, hidden, qkv)
        self.wo = weight(local, shape.q_size, hidden)
        self.bqkv = weight(local, qkv) if shape.qkv_bias else None
        self.bo = weight(local, hidden) if shape.o_bias else None
        self.q_norms = weight(local, shape.head_dim) if shape.qk_norm else None
        self.k_norms = weight(local, shape.head_dim) if shape.qk_norm else None
        self.mlp_norms = weight(all_layers, hidden)
        self.w_gate_up = weight(all_layers, hidden, 2 * width)
        self.w_down = weight(all_layers, width, hidden)
        self.b_gate_up = weight(all_layers, 2 * width) if shape.mlp_bias else None
        self.b_down = weight(all_layers, hidden) if shape.mlp_bias else None
        self.final_norm = weight(hidden)
        for name in MATRICES:
            self.register_parameter(f"{name}_scales", None)

    def prepare_weights(self) -> None:
        """After loading: the matrices as products read them, see `packing.py`."""
        for name in MATRICES:
            weights, scales = prepared(getattr(self, name).data, self.quantization, 2 if name == "w_gate_up" else 1)
            setattr(self, name, nn.Parameter(weights, requires_grad=False))
            if scales is not None:
                setattr(self, f"{name}_scales", nn.Parameter(scales, requires_grad=False))
        if self.quantization is not None:
            self.head.quantize(self.quantization)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.checkpoint_quantization is not None:
            weights = decompressed(weights, self.checkpoint_quantization)
        return load_drafter_weights(self, weights)

    def read_maps(self, file: LookaheadFile) -> None:
        """Load look-ahead maps, at the same addresses if there are some already."""
        maps = LookaheadMaps.load(file, self.placement, self.rank, self.final_norm)
        if self.lookahead is None:
            self.lookahead = maps
        else:
            self.lookahead.load_state_dict(maps.state_dict())

    def replace_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take these weights, as an unquantized checkpoint has them, in place of the present ones: all or nothing, on
        all ranks together, and at the same addresses, which CUDA graphs hold.

        Meanwhile there is memory for both. Raises ValueError, and changes nothing, where a rank can't use them.
        """
        present = dict(self.named_parameters())
        stacks = dict(self.named_parameters(recurse=False))
        embed_tokens, head = self.embed_tokens, self.head
        cause = None
        try:
            with set_default_torch_dtype(self.dtype), self.final_norm.device:
                self._create_weights()
            load_drafter_weights(self, weights)
            self.prepare_weights()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
            cause = error
        finally:
            loaded = dict(self.named_parameters())
            self.embed_tokens, self.head = embed_tokens, head
            for name, parameter in stacks.items():
                setattr(self, name, parameter)
        problem = first_problem(None if cause is None else str(cause))
        if problem is not None:
            raise ValueError(f"the drafter keeps its present weights: {problem}") from cause
        for name, parameter in present.items():
            parameter.data.copy_(loaded[name])
        self.head.refresh()

    def forward(
        self,
        input_ids: torch.Tensor,
        plan: DraftPlan,
        attention: Attend,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states `[tokens, hidden]` of `input_ids` (`[tokens]`), its K/V stored by `attention`.

        The precise plan is the ordinary forward pass. previous: the final hidden states `[tokens, hidden]` of the
        tokens before; if given, groups use the look-ahead maps.
        """
        self.counters.passes += 1
        x = self._embed(input_ids)
        for group in plan.groups:
            ahead = None
            if self.lookahead is not None and previous is not None and len(group) > 1:
                ahead = self.lookahead.of_group(group.start, x, previous)
            outputs = self._attention_outputs(x, group, attention, ahead)
            if self.observer is not None:
                self.observer(group, x, outputs)
            # Block scope: each MLP reads its own prefix, the group's input and the attentions up to its own.
            size = 1 if plan.scope == "attention" else len(group)
            for start, part in zip(group[::size], outputs.split(size), strict=True):
                prefixes = prefix_sums(x, part)
                inputs = prefixes if ahead is None or size == 1 else ahead.mlp_inputs(prefixes)
                x = self._mlps(inputs, prefixes[-1], range(start, start + size))
        return group_rms_norm(x, self.final_norm.unsqueeze(0), self.shape.rms_norm_eps)[0]

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.own_ids is not None:
            input_ids = self.own_ids[input_ids]
        if self.num_ranks == 1 or input_ids.device.type != "cpu":
            return self.embed_tokens(input_ids)
        # On a CPU vLLM's own embedding takes ten small operators.
        shard = self.embed_tokens.shard_indices
        first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        return tensor_model_parallel_all_reduce(embed_shard(input_ids, self.embed_tokens.weight, first, end - first))

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` to `[tokens, vocab]`, on every rank; minus infinity for what can't be drafted."""
        return self.head.logits(hidden)

    def get_top_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """The arg-max of the logits, for two numbers per rank in a collective: `[tokens, hidden]` to `[tokens]`."""
        return self.head.top_tokens(hidden)

    def largest_share(self, plan: DraftPlan) -> int:
        """The most layers of one group that are on this rank."""
        shares = (self.placement.local_slice(self.rank, group) for group in plan.groups)
        return max(share.stop - share.start for share in shares)

    def _attention_outputs(
        self, x: torch.Tensor, group: range, attention: Attend, ahead: GroupLookahead | None
    ) -> torch.Tensor:
        """All attentions of a group on one input: `[tokens, hidden]` to `[group, tokens, hidden]`, on every rank.

        ahead: the group's look-ahead maps, which give each attention its own input.
        """
        mine = self.placement.local_slice(self.rank, group)
        count, tokens = mine.stop - mine.start, x.shape[0]
        if count == 0:
            return self._all_reduce_attention(x.new_zeros(len(group), tokens, x.shape[1]))
        inputs = x if ahead is None else ahead.attention_inputs(count)
        qkv = norm_and_project(
            inputs,
            self.attention_norms,
            self.wqkv,
            self.wqkv_scales,
            self.bqkv,
            mine.start,
            count,
            self.shape.q_size + 2 * self.shape.kv_size,
            self.shape.rms_norm_eps,
        )
        heads = qkv.unflatten(-1, (-1, self.shape.head_dim))
        mixed = attention.attend(mine, heads, self._rotate).view(count, tokens, self.shape.q_size)
        self.counters.cache_writes += 1
        self.counters.attention_calls += 1
        offset = self.local_layers[mine.start] - group.start
        outputs = project_among_zeros(
            mixed, self.wo, self.wo_scales, self.bo, mine.start, len(group), offset, self.num_ranks, x.shape[1]
        )
        return outputs if self.num_ranks == 1 else self._all_reduce_attention(outputs)

    def _rotate(
        self,
        layers: slice,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Implements `Rotate`."""
        shape = self.shape
        rotate_and_store(
            qkv,
            positions,
            self.cos_sin,
            shape.num_heads,
            shape.num_kv_heads,
            self.rotary.is_neox_style,
            self.q_norms,
            self.k_norms,
            layers.start,
            shape.rms_norm_eps,
            cache,
            slots,
        )
        return qkv.flatten(0, 1).split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)

    def _mlps(self, inputs: torch.Tensor, residual: torch.Tensor, layers: range) -> torch.Tensor:
        """The residual and the sum of the layers' MLPs, each on its own input: `[layers, tokens, hidden]` and
        `[tokens, hidden]` to `[tokens, hidden]`."""
        tensor_parallel = self.num_ranks > 1 and self.mlp is MlpPlacement.TENSOR
        total = sum_of_mlps(
            inputs,
            self.mlp_norms,
            self.w_gate_up,
            self.w_gate_up_scales,
            self.b_gate_up,
            self.w_down,
            self.w_down_scales,
            None if tensor_parallel else residual,
            layers.start,
            len(self.mlp_shard),
            self.shape.rms_norm_eps,
        )
        if tensor_parallel:
            self.counters.mlp_collectives += 1
            total = residual + self._sum_over_ranks(total)
        return total if self.b_down is None else total + self.b_down[layers.start : layers.stop].sum(0)

    def _all_reduce_attention(self, outputs: torch.Tensor) -> torch.Tensor:
        """Every rank fills in its own layers; adding zeros is exact, so all ranks get the owner's bits."""
        self.counters.attention_collectives += 1
        return tensor_model_parallel_all_reduce(outputs)

    def _sum_over_ranks(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, bitwise equal on all ranks."""
        if part.device.type == "cpu" and self.num_ranks > 2:
            # vLLM's all-reduce in shared memory (csrc/cpu/shm.cpp) starts each rank's sum with that rank's own part.
            return tensor_model_parallel_all_gather(part.unsqueeze(0), dim=0).sum(0)
        return tensor_model_parallel_all_reduce(part)

    def weight_bytes(self) -> int:
        """Bytes of weights on this rank."""
        return sum(p.numel() * p.element_size() for p in self.parameters())
