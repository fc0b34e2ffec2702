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


class RayCpuPlatform(CpuPlatform):
    """A CPU whose ranks Ray places by a resource of its own, as it places GPU ranks by GPUs."""

    ray_device_key = RAY_RESOURCE


class SleepingCpuPlatform(CpuPlatform):
    """A CPU on which sleep mode is allowed: `simulated_sleep.py`."""

    def is_sleep_mode_available(self) -> bool:
        return True


def activate() -> str | None:
    """Named by EASYSPEC_TEST_PLATFORM: async, ray or sleeping."""
    import os

    kind = os.environ.get("EASYSPEC_TEST_PLATFORM")
    if kind == "ray":
        _give_ray_ranks_numbers()
    names = {"async": "AsyncCpuPlatform", "ray": "RayCpuPlatform", "sleeping": "SleepingCpuPlatform"}
    return None if kind is None else f"{__name__}.{names[kind]}"


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
