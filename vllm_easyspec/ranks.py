"""`run_ranks`: a function in new processes that form one tensor-parallel group, as vLLM's workers do."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.platforms import current_platform

from vllm_easyspec.compat import cpu_lists, usable_cpus
from vllm_easyspec.errors import CommandError

GRACE_S = 1.0  # how long to wait for other ranks' reports once one has failed


class RankError(CommandError):
    """A rank failed, died or timed out. The message names the rank and contains its traceback."""


class _Group(NamedTuple):
    """What the ranks of one `run_ranks` share."""

    num_ranks: int
    rendezvous: str  # a file


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call `function(*args)` in `num_ranks` new processes that form one tensor-parallel group. Returns results by rank.

    function: importable by name in a new process. On a CPU each rank gets its share of this process's CPUs. Raises
    `RankError` for the first rank that fails, or after `timeout_s` seconds; no process is left behind either way.
    """
    deadline = time.monotonic() + timeout_s
    VllmConfig()  # makes a CPU platform set the environment of worker processes
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
                process.kill()  # also after success: at an ordinary exit Triton would complain of leaks
            for process in processes:
                process.join()
            # vLLM's ranks leave their shared memory behind.
            for leftover in Path("/dev/shm").glob(f"{Path(group.rendezvous).name}-*"):
                leftover.unlink()


def _collect(results: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    """Every rank's result; raises `RankError` for the first rank that failed or died.

    The others then fail too, at a collective that has lost it, and may report first, so each reports when it failed.
    """
    done: dict[int, Any] = {}
    failed: dict[int, tuple[float, str]] = {}
    while waiting := [rank for rank in range(len(results)) if rank not in done and rank not in failed]:
        ready = wait([results[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in waiting:
            if results[rank] not in ready:
                continue
            try:
                succeeded, value, at = pickle.loads(results[rank].recv_bytes())
            except EOFError:
                failed[rank] = 0.0, "died before it returned a result"  # the others fail because of it
                continue
            if succeeded:
                done[rank] = value
            else:
                failed[rank] = at, f"failed:\n{value}"
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    if failed:
        first = min(failed, key=lambda rank: failed[rank])
        raise RankError(f"rank {first} of {len(results)} {failed[first][1]}")
    if waiting:
        raise RankError(f"ranks {waiting} of {len(results)} did not finish within {timeout_s:g} seconds")
    return [done[rank] for rank in range(len(results))]


def _rank_main(
    rank: int, group: _Group, cpus: list[int], sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """A rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the ranks
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which this process would leave behind
    if cpus:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(len(cpus))
    try:
        with _tensor_parallel(rank, group):
            gc.freeze()  # loading a model collects garbage; spare it what has been imported
            # Pickling copies tensors; torch's pipes would share memory that ends with this process.
            message = pickle.dumps((True, function(*args), time.time()))
    except BaseException as error:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc(), time.time())))
        raise SystemExit(1) from error
    sender.send_bytes(message)


@contextmanager
def _tensor_parallel(rank: int, group: _Group) -> Iterator[None]:
    """The distributed state of vLLM, set up as by its worker."""
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu.shm  # noqa: F401 - adds torch functions that a CPU lacks, as vLLM's worker does
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
    """The CPUs of each rank; empty lists if ranks don't compute on CPUs."""
    if not current_platform.is_cpu():
        return [[] for _ in range(num_ranks)]
    lists = cpu_lists(num_ranks, usable_cpus(num_ranks)).split("|")
    return [[int(cpu) for cpu in cpus.split(",")] for cpus in lists]
