"""A drafter without an engine: real tensor-parallel processes, vLLM's own loader, paged cache and attention backend.

For tests and for timing a draft step. `run_ranks` starts the ranks; in each, `StandaloneDrafter` does what vLLM's
worker and `EasySpecSpeculator` do at start, for a drafter that has no target beside it. All ranks must make the same
calls: every pass has collectives.
"""

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from vllm import EngineArgs
from vllm.config import CUDAGraphMode, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel, get_tp_group
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.utils import AttentionGroup

from vllm_easyspec import plugin
from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.calibration import CalibrationScheduler
from vllm_easyspec.compat import cpu_lists, usable_cpus
from vllm_easyspec.config import OPTIONS_KEY, RuntimeOptions
from vllm_easyspec.drafter.model import LayerParallelDrafter
from vllm_easyspec.drafter.paged_kv import PagedKV, PagedPass, Sequences
from vllm_easyspec.drafter.plan import LayerPlan, Scope
from vllm_easyspec.drafter.products import choose_products
from vllm_easyspec.drafter.xformers_attention import choose as choose_attention
from vllm_easyspec.drafting import DraftLoop
from vllm_easyspec.graphs import DraftGraphs

try:  # vLLM 0.33 moved the planning of the K/V cache; of 0.32 it is in kv_cache_utils
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    from vllm.v1.core import kv_cache_utils as planning


class StandaloneDrafter:
    """One rank's share of a drafter, and pages for `max_num_reqs` requests of at most `max_len` tokens.

    Request `i` owns row `i` of a block table whose blocks are shuffled, the same way on all ranks. `lengths[i]` of its
    tokens are in the pages; `rewind` takes tokens back, as vLLM does with rejected drafts.
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
        graph_sizes: Sequence[int] = (),
    ):
        """model: a checkpoint's folder; load_format: vLLM's, such as 'dummy' for random weights; graph_sizes: numbers
        of requests for which `graphs` can hold CUDA graphs.
        """
        self.graph_sizes = list(graph_sizes)
        plugin.register()
        group = get_tp_group()
        self.device = group.device
        blocks_per_req = -(-max_len // block_size)
        # Block 0 belongs to no one, as in vLLM.
        self.num_blocks = 1 + max_num_reqs * blocks_per_req
        # vLLM would want head counts that tensor parallelism divides; whole layers on a rank need no such thing.
        self.config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=dtype,  # type: ignore[arg-type]
            load_format=load_format,
            use_tqdm_on_load=False,
            tensor_parallel_size=1,
            block_size=block_size,
            max_model_len=max_len,
            max_num_seqs=max_num_reqs,
            max_num_batched_tokens=max_num_reqs * max_len,
            num_gpu_blocks_override=self.num_blocks,
            enforce_eager=True,
            additional_config={OPTIONS_KEY: (options or RuntimeOptions()).to_json()},
        ).create_engine_config()
        self.config = choose_attention(self.config, (options or RuntimeOptions()).grouped_attention)
        hf_config = self.config.model_config.hf_config
        hf_config.architectures = [plugin.DRAFTER_ARCHITECTURE, *hf_config.architectures]
        with set_current_vllm_config(self.config):
            self.model: LayerParallelDrafter = get_model(vllm_config=self.config, prefix="draft_model")
            choose_products(self.model)
            attention_group = self._allocate_pages()
        self.pages = PagedKV(list(self.model.attention), attention_group, self.num_blocks, block_size)
        self.precise = LayerPlan.precise(self.model.shape.num_layers)
        shuffled = 1 + torch.randperm(self.num_blocks - 1, generator=torch.Generator().manual_seed(0))
        self.block_table = shuffled.view(max_num_reqs, blocks_per_req).int()
        self.lengths = [0] * max_num_reqs

    def _allocate_pages(self) -> AttentionGroup | None:
        """Have vLLM lay out, allocate and bind this rank's pages. Returns None where no layer lives on the rank."""
        group = get_tp_group()
        specs: list[dict] = [{}] * group.world_size
        torch.distributed.all_gather_object(specs, get_kv_cache_spec(self.config), group=group.cpu_group)
        specs_of_holders = [spec for spec in specs if spec]  # the first ranks
        if group.rank_in_group >= len(specs_of_holders):
            return None
        layers: list[Any] = list(self.model.attention)
        backends = [layer.get_attn_backend() for layer in layers]
        resolve_kv_cache_layout(self.config, [[layout.name for layout in get_supported_kv_cache_layouts(backends)]])
        # The override of the number of blocks decides, not the memory.
        arguments = [self.config, specs_of_holders, [1 << 40] * len(specs_of_holders)]
        if hasattr(planning, "get_global_kv_cache_groups"):  # 0.33; 0.32 groups the layers inside
            arguments.append(planning.get_global_kv_cache_groups(self.config, specs_of_holders))
        configs = planning.get_kv_cache_configs(*arguments)
        kv_config = configs[group.rank_in_group]
        groups, _, kernel_block_sizes = init_attn_backend(kv_config, self._builder_config(), self.device)
        init_kv_cache(
            self.config.compilation_config.static_forward_context,
            kv_config,
            self.device,
            kernel_block_sizes,
            self.config,
            attn_groups=groups[0],
        )
        return groups[0][0]

    def _builder_config(self) -> VllmConfig:
        """For metadata builders of the virtual batch: as many sequences as layers times requests."""
        layers = max(1, len(self.model.local_layers))
        config = self._graph_config(layers)
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.max_num_seqs *= layers
        return config

    def _graph_config(self, layers: int = 1) -> VllmConfig:
        """With `graph_sizes`, of `layers` sequences a request, in place of no graphs."""
        config = copy.copy(self.config)
        if self.graph_sizes:
            compilation = config.compilation_config = copy.copy(config.compilation_config)
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            compilation.cudagraph_capture_sizes = self.graph_sizes
            compilation.max_cudagraph_capture_size = layers * max(self.graph_sizes)
        return config

    def graphs(self) -> DraftGraphs:
        return DraftGraphs(self._graph_config(), self.device, CUDAGraphMode.FULL_DECODE_ONLY)

    def loop(self, num_drafts: int) -> DraftLoop:
        """The fuzzy loop of requests 0, 1, ..., which drafts greedily."""
        tokens = torch.zeros(len(self.lengths), num_drafts, dtype=torch.int64, device=self.device)

        def sample(index: int, hidden: torch.Tensor, positions: torch.Tensor, reqs: int) -> None:
            tokens[:reqs, index] = self.model.get_top_tokens(hidden)

        block_size = self.pages.block_size
        max_len = self.block_table.shape[1] * block_size
        calibration = CalibrationScheduler(self.model.shape.vocab_size, max_len, block_size, self.device)
        table = self.block_table.to(self.device)
        return DraftLoop(self.model, self.pages, calibration, table, tokens, sample)

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        plan: LayerPlan | None = None,
        scope: Scope = "attention",
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read further tokens of requests 0, 1, ... (at least one of each) in one pass, precise without a plan.

        Stores their K/V and returns final hidden states `[tokens, hidden]`, request after request. previous: as in
        `LayerParallelDrafter.forward`.
        """
        sequences = self.sequences([len(ids) for ids in tokens])
        ids = torch.tensor([token for request in tokens for token in request], device=self.device)
        for request, new in enumerate(tokens):
            self.lengths[request] += len(new)
        return self.run(ids, sequences, plan or self.precise, scope, previous)

    @torch.inference_mode()
    def run(
        self,
        ids: torch.Tensor,
        sequences: Sequences,
        plan: LayerPlan,
        scope: Scope,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over `ids` (`[tokens] int64`) at `sequences`: final hidden states `[tokens, hidden]`."""
        return self.model(ids, plan, scope, PagedPass(self.pages, sequences), previous)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden]` to `[rows, vocab]`, on every rank."""
        return self.model.compute_logits(hidden)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of requests 0, 1, ... past `lengths`. Their K/V stays in the pages until overwritten."""
        self.lengths[: len(lengths)] = lengths

    def sequences(self, new: Sequence[int]) -> Sequences:
        """`new[i]` tokens after the `lengths[i]` of request `i`."""
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


# ---- ranks ----


class RankError(BenchmarkError):
    """A rank failed, died or ran out of time. The message names the rank and holds its traceback."""


class _Group(NamedTuple):
    """What the ranks of one `run_ranks` share."""

    num_ranks: int
    rendezvous: str  # a file


def run_ranks(num_ranks: int, function: Callable, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call `function(*args)` in `num_ranks` new processes that form one tensor-parallel group. Returns results by rank.

    function: importable by name in a new process. On a CPU each rank gets its share of this process's CPUs. Raises
    `RankError` for the first rank that fails, or after `timeout_s` seconds; no process is left behind either way.
    """
    deadline = time.monotonic() + timeout_s
    VllmConfig()  # a CPU platform sets the environment of worker processes while it checks a configuration
    context = multiprocessing.get_context("spawn")
    processes, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        group = _Group(num_ranks, f"{folder}/{uuid.uuid4().hex}")
        try:
            for rank, cpus in enumerate(_cpus_by_rank(num_ranks)):
                result, sender = context.Pipe(duplex=False)
                process = context.Process(target=_rank_main, args=(rank, group, cpus, sender, function, args))
                process.start()
                sender.close()
                processes.append(process)
                results.append(result)
            return _collect(results, deadline, timeout_s)
        finally:
            for process in processes:
                process.kill()  # also where all went well: Triton would complain of leaks at an ordinary exit
            for process in processes:
                process.join()
            # vLLM's ranks leave their shared memory behind.
            for leftover in Path("/dev/shm").glob(f"{Path(group.rendezvous).name}-*"):
                leftover.unlink()


def _collect(results: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    """Every rank's result; raises `RankError` for the first rank that sends a traceback or nothing."""
    done: dict[int, Any] = {}
    while len(done) < len(results):
        waiting = [rank for rank in range(len(results)) if rank not in done]
        ready = wait([results[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {waiting} of {len(results)} did not finish within {timeout_s:g} seconds")
        for rank in waiting:
            if results[rank] not in ready:
                continue
            try:
                succeeded, value = pickle.loads(results[rank].recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} of {len(results)} died before it returned a result") from None
            if not succeeded:
                raise RankError(f"rank {rank} of {len(results)} failed:\n{value}")
            done[rank] = value
    return [done[rank] for rank in range(len(results))]


def _rank_main(
    rank: int, group: _Group, cpus: list[int], sender: Connection, function: Callable, args: tuple[Any, ...]
) -> None:
    """A rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the ranks
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which the end of this process would leave behind
    if cpus:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(len(cpus))
    try:
        with _tensor_parallel(rank, group):
            gc.freeze()  # loading a model collects garbage; what has been imported is none
            # Pickled here, tensors are copied; a pipe of torch's would share memory that dies with this process.
            message = pickle.dumps((True, function(*args)))
    except BaseException as error:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from error
    sender.send_bytes(message)


@contextmanager
def _tensor_parallel(rank: int, group: _Group) -> Iterator[None]:
    """vLLM's distributed state, as its worker sets it up."""
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu.shm  # noqa: F401 - fills in torch functions that a CPU lacks, as vLLM's CPU worker does
    else:
        torch.accelerator.set_device_index(rank)
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    os.environ["VLLM_DIST_IDENT"] = Path(group.rendezvous).name  # names the shared memory of CPU collectives
    config = VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=group.num_ranks, rank=rank))
    with set_current_vllm_config(config):
        init_worker_distributed_environment(
            config, rank, f"file://{group.rendezvous}", rank, current_platform.dist_backend
        )
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


def _cpus_by_rank(num_ranks: int) -> list[list[int]]:
    """The CPUs of each rank; empty lists where ranks compute elsewhere."""
    if not current_platform.is_cpu():
        return [[] for _ in range(num_ranks)]
    lists = cpu_lists(num_ranks, usable_cpus(num_ranks)).split("|")
    return [[int(cpu) for cpu in cpus.split(",")] for cpus in lists]
