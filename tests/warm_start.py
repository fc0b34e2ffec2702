"""Engines and ranks of the tests start in 5 seconds instead of 20: their processes are forked, vLLM already imported.

vLLM spawns its processes on a CPU, and each imports vLLM anew, the workers after the engine. Here an engine's process
is forked from one that has imported vLLM and done nothing else, and its workers are forked from it. Each gets what a
spawned process gets: its arguments by pickle, the environment that its parent has at that moment, and OpenMP's settings
in it, which otherwise are read where a process begins.
"""

import multiprocessing
import os
from multiprocessing.context import ForkContext, ForkProcess, ForkServerContext, ForkServerProcess
from typing import Any

import torch

PRELOADED = [
    "warm_start",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm_easyspec.worker",
    "vllm_easyspec.speculator",
]


def set_threads() -> None:
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if cpus := os.environ.get("GOMP_CPU_AFFINITY"):
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split()})


class WarmProcess(ForkServerProcess):
    def start(self) -> None:
        self.environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        set_threads()
        super().run()


class WorkerProcess(ForkProcess):
    def run(self) -> None:
        set_threads()
        super().run()


class WarmContext(ForkServerContext):
    Process = WarmProcess


class WorkerContext(ForkContext):
    Process = WorkerProcess


def use() -> None:
    """From now on, fork what would be spawned, here and in the processes started so."""
    original, warm, workers = multiprocessing.get_context, WarmContext(), WorkerContext()
    warm.set_forkserver_preload(PRELOADED)

    def get_context(method: str | None = None) -> Any:
        if method != "spawn":
            return original(method)
        return warm if multiprocessing.parent_process() is None else workers

    multiprocessing.get_context = get_context


use()
