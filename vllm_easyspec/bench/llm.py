"""A vLLM engine for benchmarks and tuning: its start, requests and stop."""

import copy
import gc
import os
from collections.abc import Sequence
from typing import Any, Self

from vllm import envs
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_easyspec.compat import OMP_BINDING, cpu_lists, usable_cpus
from vllm_easyspec.errors import ConfigError

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


class Engine:
    """A vLLM engine. A `with` block stops it at the end and frees its memory in this process."""

    def __init__(
        self,
        engine_args: EngineArgs,
        in_process: bool | None = None,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
    ):
        """in_process: whether the engine runs in this process; by default as the environment tells vLLM.

        usage_context: vLLM's defaults for batches depend on it. Raises `ConfigError` for several engines.
        """
        if engine_args.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size={engine_args.data_parallel_size} is not allowed here: a command measures one "
                "engine, and those of data parallelism are independent of each other. Remove it"
            )
        self.in_process = not envs.VLLM_ENABLE_V1_MULTIPROCESSING if in_process is None else in_process
        saved = os.environ.get(MULTIPROCESSING)
        os.environ[MULTIPROCESSING] = "0" if self.in_process else "1"
        try:
            self.llm = LLMEngine.from_engine_args(changed(engine_args), usage_context=usage_context)
        finally:
            del os.environ[MULTIPROCESSING]
            if saved is not None:
                os.environ[MULTIPROCESSING] = saved

    def rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call `method` on all ranks. Returns rank 0's reply."""
        return self.llm.collective_rpc(method, args=args, kwargs=kwargs)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.engine_core.shutdown()
        del self.llm
        gc.collect()
        if self.in_process:
            cleanup_dist_env_and_memory()


def changed(engine_args: EngineArgs, **changes: Any) -> EngineArgs:
    """A changed copy, because vLLM and easyspec modify the arguments that they are given."""
    copied = copy.deepcopy(engine_args)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


def parse_engine_args(command: str, arguments: Sequence[str]) -> EngineArgs:
    """Options of vLLM's, in the form of `vllm serve`. command: the command that takes them after `--`."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=f"vllm-easyspec {command} ... --"))
    return EngineArgs.from_cli_args(parser.parse_args(list(arguments)))


def bind_cpus(ranks: int) -> None:
    """On a CPU, bind ranks as easyspec does: otherwise vLLM needs a NUMA node per rank."""
    if current_platform.is_cpu() and ranks > 1:
        os.environ.setdefault(OMP_BINDING, cpu_lists(ranks, usable_cpus(ranks)))
