"""Platforms that give a CPU what vLLM switches off there. Active in processes that have this folder on their path."""

import ray
from ray.runtime_context import RuntimeContext
from vllm.platforms.cpu import CpuPlatform

RAY_RESOURCE = "easyspec_rank"


class AsyncCpuPlatform(CpuPlatform):
    """A CPU with asynchronous scheduling, which vLLM turns off there as not required."""

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        super().check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True


class AdaptiveCpuPlatform(AsyncCpuPlatform):
    """A CPU with adaptive verification, which vLLM ties to CUDA graphs: it measures its costs by them.

    Here the costs are made up, so that some drafts are left out. vLLM chooses which, as on a GPU.
    """

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        super().check_and_update_config(vllm_config)
        type(vllm_config)._validate_adaptive_verification = lambda self: None
        _verify_adaptively()


class RayCpuPlatform(CpuPlatform):
    """A CPU whose ranks Ray places by a resource of its own, as it places GPU ranks by GPUs."""

    ray_device_key = RAY_RESOURCE


class SleepingCpuPlatform(CpuPlatform):
    """A CPU on which sleep mode is allowed: `simulated_sleep.py`."""

    def is_sleep_mode_available(self) -> bool:
        return True


def activate() -> str | None:
    """Named by EASYSPEC_TEST_PLATFORM: async, adaptive, ray or sleeping."""
    import os

    kind = os.environ.get("EASYSPEC_TEST_PLATFORM")
    if kind == "ray":
        _give_ray_ranks_numbers()
    return kind and f"{__name__}.{kind.capitalize()}CpuPlatform"


def _verify_adaptively() -> None:
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification

    manager = adaptive_verification.AdaptiveVerificationManager
    create = model_runner.maybe_create_adaptive_verification_manager
    if getattr(create, "_on_cpu", False):
        return

    def maybe_create(**arguments) -> manager | None:
        created = create(**arguments)
        if created is not None:
            created.set_cost_curves([(16, 1.0)], [(tokens, 4 + tokens / 2) for tokens in range(1, 201)])
        return created

    maybe_create._on_cpu = True
    model_runner.maybe_create_adaptive_verification_manager = maybe_create
    model_runner.resolve_adaptive_cudagraph_mode = lambda mode, **_: mode
    adaptive_verification.get_varlen_cudagraph_unsupported_backend = lambda *_, **__: None
    adaptive_verification._assign_draft_token_budget_compiled = adaptive_verification._assign_draft_token_budget


def _give_ray_ranks_numbers() -> None:
    """Ray numbers accelerators that it knows; a resource of our own it only counts. On one node any numbers will do."""
    original = RuntimeContext.get_accelerator_ids
    if getattr(original, "_numbers_ranks", False):
        return

    def get_accelerator_ids(self):
        count = int(ray.get_runtime_context().get_assigned_resources().get(RAY_RESOURCE, 0))
        return original(self) | {RAY_RESOURCE: [str(i) for i in range(count)]}

    get_accelerator_ids._numbers_ranks = True
    RuntimeContext.get_accelerator_ids = get_accelerator_ids
