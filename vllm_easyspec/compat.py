"""All patches of vLLM. Everything else in this package uses interfaces that vLLM offers.

Three methods of `EngineArgs` are wrapped by `apply`, which may be called any number of times: a method is never wrapped
twice, and each wrapper calls vLLM's own method with unchanged arguments unless easyspec was asked for. The other
patches are functions, called where an engine of ours runs.

1. `EngineArgs.add_cli_args`. Cause: `--speculative-config` is parsed by `json.loads`, so neither a path nor a clear
   error is possible. Remove when vLLM takes a path there, or lets a plugin register a speculative method.
2. `EngineArgs.create_engine_config`. Cause: `SpeculativeConfig` has a closed list of methods and fields, so
   `method: easyspec` is first turned into vLLM's own `draft_model`, our worker and our options; and only here are the
   whole configuration and the environment available before processes start. Remove when vLLM lets a plugin register a
   speculative method with its own fields and checks.
3. `EngineArgs.create_speculative_config`. Cause: vLLM refuses a draft model whose vocabulary is the target's less
   padding (Qwen2.5 32B and 72B with their small siblings), though its rejection sampler can handle it; and 0.33
   shortens the target's context to its drafter's. Remove when vLLM accepts such pairs and leaves lengths to the
   speculator.
4. `GPUModelRunner.speculator`, replaced after `init_device`. Cause: `init_speculator` has a closed list of methods.
   Remove when vLLM resolves a plugin's speculator class.
5. `GPUModelRunner.lora_state`, likewise. Cause: vLLM 0.32 gives the LM head one adapter per request, for one row of
   logits; a request that is verified has more (`lora.py`). Remove when `LoraState` counts the drafts.
6. `Scheduler.dynamic_sd_lookup`, changed by `vllm-easyspec tune`. Cause: only the scheduler can choose K, and it
   reads its table once. Remove when K can be changed in a running engine.
7. `__bases__` of worker classes in this process. Cause: vLLM permanently adds a `worker_extension_cls` to the bases of
   the worker's class, and the next engine then refuses it for a subclass of that class, such as easyspec's worker.
   Remove when vLLM creates a new class for a worker with an extension.
8. `sys.excepthook` of a command that serves easyspec (`last_words.py`). Cause: vLLM reports a worker's error to the
   user only as "See root cause above", pages below it. Remove when vLLM passes the root cause on.
"""

import itertools
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from vllm_easyspec import last_words, round_reports, support
from vllm_easyspec.config import OPTIONS_KEY, EasySpecConfig, RuntimeOptions, is_easyspec, is_path, load
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.versions import Support, UnsupportedVllmError, require_supported, vllm_version

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

logger = init_logger(__name__)

WORKER_CLS = "vllm_easyspec.worker.SpeculativeWorker"
OMP_BINDING = "VLLM_CPU_OMP_THREADS_BIND"

# The value that we gave OMP_BINDING, so that it can be told from a user's.
_our_binding: str | None = None


@config(repr=False)  # vLLM's own one-line repr
class EasySpecSpeculativeConfig(SpeculativeConfig):
    """vLLM's configuration, without two assumptions about draft models that don't hold for ours."""

    def verify_equal_vocab_size_if_draft_model(self) -> None:
        """Do nothing: `support.check_vocabulary` checks after construction, so that its error is one line."""

    def draft_shares_target_positions(self) -> bool:
        """True: vLLM 0.33 need not cut the target's context down to its drafter's, since ours stops drafting there."""
        return True


def apply(version: str | None = None) -> bool:
    """Patch `EngineArgs`; False where it was patched before. On a vLLM that isn't supported, only refuse easyspec."""
    wrappers: dict[str, Callable[..., Any]] = {
        "add_cli_args": _teach_arguments,
        "create_engine_config": _teach_engine_config,
    }
    if Support.of(version or vllm_version()) is not Support.UNSUPPORTED:
        wrappers["create_speculative_config"] = _teach_speculative_config
    present = [name for name in wrappers if name in EngineArgs.__dict__]  # an unsupported vLLM may not have all
    if all(is_patched(name) for name in present):
        return False
    for name in present:
        _patch(name, wrappers[name])
    return True


def is_patched(name: str) -> bool:
    """Whether a method of `EngineArgs` is ours."""
    return hasattr(getattr(EngineArgs, name, None), "_easyspec_original")


def _patch(name: str, wrap: Callable[..., Any]) -> None:
    """Replace a method of `EngineArgs`. Raises RuntimeError where it is ours already."""
    if is_patched(name):
        raise RuntimeError(f"EngineArgs.{name} is patched already, and a second patch would wrap the first")
    declared, original = EngineArgs.__dict__[name], getattr(EngineArgs, name)
    wrapped = wrap(original)
    wrapped._easyspec_original = original
    setattr(EngineArgs, name, staticmethod(wrapped) if isinstance(declared, staticmethod) else wrapped)


def _teach_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        action = parser._option_string_actions.get("--speculative-config")
        if action is not None:
            action.type = partial(read_argument, action.type)
        return parser

    return add_cli_args


def read_argument(vllm_type: Callable[[str], Any], text: str) -> dict[str, Any] | None:
    """The value of `--speculative-config`: what vLLM reads itself, or a path to YAML or JSON.

    Raises ArgumentTypeError, which argparse reports in one line with exit code 2.
    """
    if is_path(text):
        try:
            return vllm_type(text)  # empty, None, null
        except ArgumentTypeError:
            pass
    try:
        value = load(text)
        if is_easyspec(value):
            last_words.print_at_the_end()
            require_supported(vllm_version())
            EasySpecConfig.parse(value, source=text if is_path(text) else "").check_model()
    except (ConfigError, UnsupportedVllmError) as error:
        raise ArgumentTypeError(str(error)) from error
    return value


def _teach_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        _unbind_cpus()
        asked = translate(self)
        vllm_config = original(self, *args, **kwargs)
        if asked:
            support.check_engine(vllm_config)
            round_reports.make_folder()
            _bind_cpus(vllm_config.parallel_config)
        return vllm_config

    return create_engine_config


def translate(args: EngineArgs) -> bool:
    """Turn `method: easyspec` into vLLM's own settings, in place; False where it was not asked for. May be repeated."""
    if isinstance(args.speculative_config, str | Path):
        args.speculative_config = load(args.speculative_config)
    given = args.speculative_config
    if not isinstance(given, Mapping):
        return False
    if _is_translated(args):
        return True
    if not is_easyspec(given):
        return False
    _check_version()
    easyspec = EasySpecConfig.parse(given)
    easyspec.check_model()
    for flag in ("spec_method", "spec_model", "spec_tokens"):
        if getattr(args, flag) is not None:
            raise ConfigError(
                f"{flag}={getattr(args, flag)!r} is given together with speculative_config, and only one of the two is "
                "allowed with easyspec. Remove it, and write the value in speculative_config"
            )
    if args.worker_cls not in ("auto", WORKER_CLS):
        raise ConfigError(
            f"worker_cls={args.worker_cls!r:.120} is not allowed with method: easyspec, which needs its own worker "
            f"({WORKER_CLS}). Remove worker_cls; a worker_extension_cls is allowed"
        )
    speculative_config, options = easyspec.to_vllm()
    args.additional_config = _with_options(args.additional_config, options)
    args.speculative_config = speculative_config
    args.worker_cls = WORKER_CLS
    return True


def _is_translated(args: EngineArgs) -> bool:
    ours = isinstance(args.additional_config, Mapping) and OPTIONS_KEY in args.additional_config
    return ours and args.worker_cls == WORKER_CLS and not is_easyspec(args.speculative_config or {})


def _check_version() -> None:
    version = vllm_version()
    require_supported(version)
    if Support.of(version) is Support.CHECKED:
        logger.warning("easyspec on vLLM %s: %s.", version, Support.CHECKED.value)


def _with_options(additional_config: Any, options: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(additional_config, Mapping):
        raise ConfigError(
            f"additional_config={additional_config!r} is not a dict, and easyspec has to add its options to it. "
            "Give a dict"
        )
    theirs = additional_config.get(OPTIONS_KEY, options)
    if theirs != options:
        raise ConfigError(
            f"additional_config[{OPTIONS_KEY!r}]={theirs!r} is not allowed: easyspec keeps its options there. Remove "
            "it, and write the options in speculative_config"
        )
    return {**additional_config, OPTIONS_KEY: options}


def _teach_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        if not _is_translated(self):
            return original(self, target_model_config, target_parallel_config)
        return _build_speculative_config(
            {
                **self.speculative_config,
                "target_model_config": target_model_config,
                "target_parallel_config": target_parallel_config,
            },
            RuntimeOptions.from_json(self.additional_config[OPTIONS_KEY]),
        )

    return create_speculative_config


def _build_speculative_config(fields: dict[str, Any], options: RuntimeOptions) -> EasySpecSpeculativeConfig:
    trust = fields["target_model_config"].trust_remote_code
    support.read_drafter(fields["model"], fields.get("revision"), fields.get("code_revision"), trust)
    try:
        built = EasySpecSpeculativeConfig(**fields)
    except (OSError, ValueError, KeyError) as error:
        causes = [part["msg"] for part in error.errors()] if isinstance(error, ValidationError) else [str(error)]
        raise ConfigError(
            f"vLLM can't use model={fields['model']!r} as this target's drafter, or another field: "
            + "; ".join(" ".join(cause.split()) for cause in causes)
        ) from error
    support.check_drafter(built, options)
    support.check_maps(built, options)
    support.check_draft_vocabulary(built, options)
    return built


# ---- in a worker ----


def install_speculator(runner: "GPUModelRunner", build: Callable[[], "BaseSpeculator"]) -> None:
    """Patch 4: replace the runner's speculator by `build()`. May be repeated."""
    runner.speculator = None  # free its buffers before ours are allocated
    runner.speculator = build()


def install_lora_state(runner: "GPUModelRunner", max_num_reqs: int) -> None:
    """Patch 5. May be repeated."""
    from vllm_easyspec.lora import VerifyingLoraState

    runner.lora_state = VerifyingLoraState(max_num_reqs)


# ---- in the process of `tune` or `bench`, which may run the engine themselves ----


def scheduled_drafts(engine: "LLMEngine") -> list[int]:
    """Patch 6: the scheduler's own list of K by batch size, which may be changed between two steps."""
    return engine.engine_core.engine_core.scheduler.dynamic_sd_lookup


def remove_worker_extension(extension: type) -> None:
    """Patch 7: remove `extension` from the bases of the worker classes that vLLM added it to. May be repeated."""
    worker: Any  # mypy considers bases fixed
    for worker in extension.__subclasses__():
        others = tuple(base for base in worker.__bases__ if base is not extension)
        if others:  # a subclass without another base is an extension itself, not a worker
            worker.__bases__ = others


# ---- CPUs of ranks ----


def _bind_cpus(parallel: ParallelConfig) -> None:
    """Give every rank of this machine's engines its CPUs where vLLM's automatic binding can't.

    That needs as many NUMA nodes as ranks and fails with an assertion otherwise (vllm/utils/ompmultiprocessing.py).
    """
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    global _our_binding
    ranks = parallel.local_world_size * parallel.data_parallel_size_local
    if not current_platform.is_cpu() or ranks <= 1 or OMP_BINDING in os.environ:
        return
    if len(get_visible_memory_node()) >= ranks:
        return
    _our_binding = os.environ[OMP_BINDING] = cpu_lists(ranks, usable_cpus(ranks))
    logger.info("easyspec: %s=%s, since there are fewer NUMA nodes than ranks.", OMP_BINDING, _our_binding)


def _unbind_cpus() -> None:
    """Remove the binding of an earlier engine in this process: the next may have other ranks, or no easyspec."""
    global _our_binding
    if _our_binding is not None and os.environ.get(OMP_BINDING) == _our_binding:
        del os.environ[OMP_BINDING]
    _our_binding = None


def usable_cpus(ranks: int) -> list[int]:
    """The CPUs this process may use: one per physical core if there are enough for all ranks, otherwise all."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    cpus = sorted(get_allowed_cpu_list(), key=lambda cpu: cpu.id)
    one_per_core = {(cpu.numa_node, cpu.physical_core): cpu.id for cpu in reversed(cpus)}
    return sorted(one_per_core.values()) if len(one_per_core) >= ranks else [cpu.id for cpu in cpus]


def cpu_lists(ranks: int, cpus: list[int]) -> str:
    """One list of CPUs per rank in the form of vLLM's setting, such as `0,1|2,3`. With fewer CPUs than ranks, ranks
    share."""
    if len(cpus) < ranks:
        return "|".join(str(cpus[rank % len(cpus)]) for rank in range(ranks))
    starts = [rank * len(cpus) // ranks for rank in range(ranks + 1)]
    return "|".join(",".join(map(str, cpus[a:b])) for a, b in itertools.pairwise(starts))
