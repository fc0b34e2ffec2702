"""A drafter without an engine, on this rank: vLLM's own loader, paged cache and attention backend, and no target.

For tests, timing and fitting. `EnginelessDrafter` does what vLLM's worker does at start, and drafts with the same
`DrafterRuntime` as the speculator. All ranks (`ranks.py`) must make the same calls: every pass has collectives.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from vllm import EngineArgs
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.utils import AttentionGroup

from vllm_easyspec import plugin
from vllm_easyspec.config import OPTIONS_KEY, RuntimeOptions
from vllm_easyspec.drafter.paged_kv import PagedPass, Sequences
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.drafter.products import choose_products
from vllm_easyspec.graphs import DraftGraphs
from vllm_easyspec.metrics import DraftStatistics
from vllm_easyspec.runtime import build_runtime, draft_vllm_config, load_drafter, virtual_batch_config

try:  # 0.33; in vLLM 0.32 the K/V cache is planned in kv_cache_utils
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    from vllm.v1.core import kv_cache_utils as planning


class EnginelessDrafter:
    """One rank's share of a drafter, and pages for `max_num_reqs` requests of at most `max_len` tokens.

    Request `i` owns row `i` of the block table, whose blocks are shuffled in the same way on all ranks. `lengths[i]` of
    its tokens are in the pages; `rewind` removes tokens, as vLLM does with rejected drafts.
    """

    def __init__(
        self,
        model: str | Path,
        options: RuntimeOptions | None = None,
        *,
        dtype: str = "float32",
        load_format: str = "auto",
        max_num_reqs: int = 4,
        max_len: int = 256,
        block_size: int = 32,
        num_drafts: int = 5,
        graph_sizes: Sequence[int] = (),
    ):
        """model: a checkpoint's folder; load_format: vLLM's, such as 'dummy' for random weights; num_drafts: K, the
        largest of a round; graph_sizes: numbers of requests for which to capture CUDA graphs, if any.

        Raises what vLLM's configuration and `load_drafter` raise.
        """
        self.graph_sizes = list(graph_sizes)
        options = options or RuntimeOptions()
        plugin.register()
        group = get_tp_group()
        self.device = group.device
        blocks_per_req = -(-max_len // block_size)
        # Block 0 belongs to no request, as in vLLM.
        self.num_blocks = 1 + max_num_reqs * blocks_per_req
        # With the real size vLLM would require head counts divisible by the ranks; whole layers don't.
        config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            load_format=load_format,
            use_tqdm_on_load=False,
            tensor_parallel_size=1,
            block_size=block_size,
            max_model_len=max_len,
            max_num_seqs=max_num_reqs,
            max_num_batched_tokens=max_num_reqs * max_len,
            num_gpu_blocks_override=self.num_blocks,
            enforce_eager=True,
            additional_config={OPTIONS_KEY: options.to_json()},
        ).create_engine_config()
        self.config = draft_vllm_config(config, options)
        shuffled = 1 + torch.randperm(self.num_blocks - 1, generator=torch.Generator().manual_seed(0))
        self.block_table = shuffled.view(max_num_reqs, blocks_per_req).int()
        self.lengths = [0] * max_num_reqs
        self.draft_tokens = torch.zeros(max_num_reqs, num_drafts, dtype=torch.int64, device=self.device)
        with set_current_vllm_config(self.config):
            self.model = load_drafter(self.config, options)
            choose_products(self.model)
            attention_groups = self._allocate_pages()
        self.precise = DraftPlan.precise(self.model.shape.num_layers)
        self.graphs = None if not graph_sizes else self._new_graphs()
        self.runtime = build_runtime(
            self._graph_config(),
            self.model,
            attention_groups,
            self.num_blocks,
            block_size,
            self.block_table.to(self.device, copy=True),  # vLLM refills its own in each step
            self.draft_tokens,
            self._sample,
            DraftStatistics(self.device, num_drafts),
            self.graphs,
        )
        self.pages, self.loop = self.runtime.pages, self.runtime.loop

    def _allocate_pages(self) -> list[AttentionGroup]:
        """Let vLLM lay out, allocate and bind this rank's pages. Returns an empty list if the rank has no layers."""
        group = get_tp_group()
        specs: list[dict[str, Any]] = [{}] * group.world_size
        torch.distributed.all_gather_object(specs, get_kv_cache_spec(self.config), group=group.cpu_group)
        specs_of_holders = [spec for spec in specs if spec]  # the first ranks
        if group.rank_in_group >= len(specs_of_holders):
            return []
        layers: list[Any] = list(self.model.attention)
        backends = [layer.get_attn_backend() for layer in layers]
        resolve_kv_cache_layout(self.config, [[layout.name for layout in get_supported_kv_cache_layouts(backends)]])
        # The number of blocks is overridden, so the memory given here doesn't matter.
        arguments = [self.config, specs_of_holders, [1 << 40] * len(specs_of_holders)]
        if hasattr(planning, "get_global_kv_cache_groups"):  # 0.33; 0.32 groups the layers inside
            arguments.append(planning.get_global_kv_cache_groups(self.config, specs_of_holders))
        configs = planning.get_kv_cache_configs(*arguments)
        kv_config = configs[group.rank_in_group]
        groups, _, kernel_block_sizes = init_attn_backend(
            kv_config, virtual_batch_config(self._graph_config(), self.model), self.device
        )
        init_kv_cache(
            self.config.compilation_config.static_forward_context,
            kv_config,
            self.device,
            kernel_block_sizes,
            self.config,
            attn_groups=groups[0],
        )
        return groups[0]

    def _graph_config(self) -> VllmConfig:
        """The configuration with CUDA graphs of `graph_sizes`."""
        config = copy.copy(self.config)
        if self.graph_sizes:
            compilation = config.compilation_config = copy.copy(config.compilation_config)
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            compilation.cudagraph_capture_sizes = self.graph_sizes
            compilation.max_cudagraph_capture_size = max(self.graph_sizes)
        return config

    def _new_graphs(self) -> DraftGraphs:
        return DraftGraphs(self._graph_config(), self.device, CUDAGraphMode.FULL_DECODE_ONLY)

    def _sample(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, num_reqs: int, test_room: bool
    ) -> None:
        """Greedy."""
        self.draft_tokens[:num_reqs, index] = self.model.get_top_tokens(hidden)

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        plan: DraftPlan | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read more tokens of requests 0, 1, ... (at least one of each) in one pass, the precise one by default.

        Stores their K/V and returns final hidden states `[tokens, hidden]`, request after request. previous: as in
        `LayerParallelDrafter.forward`.
        """
        sequences = self.sequences([len(ids) for ids in tokens])
        ids = torch.tensor([token for request in tokens for token in request], device=self.device)
        for request, new in enumerate(tokens):
            self.lengths[request] += len(new)
        return self.run(ids, sequences, plan or self.precise, previous)

    @torch.inference_mode()
    def run(
        self,
        ids: torch.Tensor,
        sequences: Sequences,
        plan: DraftPlan,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over `ids` (`[tokens] int64`) at `sequences`: final hidden states `[tokens, hidden]`."""
        return self.model(ids, plan, PagedPass(self.pages, sequences), previous)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` to `[tokens, vocab]`, on every rank."""
        return self.model.compute_logits(hidden)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of requests 0, 1, ... past `lengths`. Their K/V stays in the pages until overwritten."""
        self.lengths[: len(lengths)] = lengths

    def sequences(self, new: Sequence[int]) -> Sequences:
        """The sequences of a pass that reads `new[i]` tokens after the `lengths[i]` of request `i`."""
        reqs = len(new)
        of_req = torch.repeat_interleave(torch.arange(reqs), torch.tensor(new))
        starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
        offsets = torch.arange(of_req.shape[0]) - starts[of_req]
        positions = torch.tensor(self.lengths[:reqs])[of_req] + offsets
        block_size = self.pages.block_size
        slots = self.block_table[of_req, positions // block_size].long() * block_size + positions % block_size
        seq_lens = torch.tensor(self.lengths[:reqs], dtype=torch.int32) + starts.diff()
        return Sequences(
            positions=positions.to(self.device),
            slots=slots.to(self.device),
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            seq_lens_bound=seq_lens,
            block_table=self.block_table[:reqs].to(self.device),
            max_query_len=max(new),
            max_seq_len=int(seq_lens.max()),
        )
