"""vLLM's sleep mode on a CPU: its own worker and backend, with an allocator that only pretends to give memory back.

Like `CuMemAllocator` it knows the tag of everything that is allocated inside `use_memory_pool`. What sleeps is filled
with garbage; on waking, what was offloaded has its contents again, and the rest is still garbage. A worker imports its
`worker_extension_cls` from here, which gives vLLM's CPU worker the GPU worker's methods for sleeping.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm import device_allocator
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

GARBAGE = 0x42  # of every byte: 48.56 as float32, and no index as an integer


class SimulatedAllocator(TorchDispatchMode):
    """Tags the memory of every tensor that an operator returns inside a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.allocations: dict[int, tuple[str, torch.UntypedStorage]] = {}  # by address
        self.asleep: dict[int, torch.UntypedStorage | None] = {}  # with the contents where they are offloaded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self.allocations.setdefault(storage.data_ptr(), (self.tags[-1], storage))
        return result

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        self.tags.append(tag or "default")
        try:
            with self:
                yield
        finally:
            self.tags.pop()

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        assert isinstance(offload_tags, tuple)
        for address, (tag, storage) in self.allocations.items():
            if address not in self.asleep:
                self.asleep[address] = storage.clone() if tag in offload_tags else None
                storage.fill_(GARBAGE)

    def wake_up(self, tags: list[str] | None = None) -> None:
        for address, (tag, storage) in self.allocations.items():
            woken = tags is None or tag in tags or tag not in device_allocator.DEFERRABLE_TAGS
            if address in self.asleep and woken:
                contents = self.asleep.pop(address)
                if contents is not None:
                    storage.copy_(contents)

    def get_current_usage(self) -> int:
        return sum(storage.nbytes() for _, storage in self.allocations.values())


class Extension:
    """What the worker offers in addition."""

    def easyspec_test_lost(self) -> list[str]:
        """The drafter's parameters that are asleep."""
        pairs = self.speculator.model.named_parameters()  # type: ignore[attr-defined]
        return [name for name, parameter in pairs if parameter.untyped_storage().data_ptr() in ALLOCATOR.asleep]


ALLOCATOR = SimulatedAllocator()


for name in ("sleep", "wake_up"):
    setattr(CPUWorker, name, getattr(Worker, name))
CPUWorker._maybe_get_memory_pool_context = lambda self, tag: ALLOCATOR.use_memory_pool(tag)
device_allocator.get_mem_allocator_instance = lambda: ALLOCATOR
torch.accelerator.synchronize = lambda device=None: None
torch.accelerator.get_memory_info = lambda device=None: (0, 1)
