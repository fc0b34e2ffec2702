"""A weight transfer engine for tests: a trainer's weights come from a safetensors file, in chunks.

vLLM's own engines (NCCL, CUDA IPC) need GPUs. This one treats the model exactly as they do. A worker registers it when
it imports its `worker_extension_cls` from here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "easyspec_test_file"


@dataclass
class Chunk(WeightTransferUpdateInfo):
    """Some tensors of a file."""

    path: str
    names: list[str]


class FileTransfer(WeightTransferEngine[WeightTransferInitInfo, Chunk]):
    """Loads each chunk as it comes."""

    init_info_cls, update_info_cls = WeightTransferInitInfo, Chunk

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Do nothing: there is no connection."""

    def shutdown(self) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # there is no device to wait for

    def receive_weights(self, update_info: Chunk) -> None:
        with safe_open(update_info.path, "pt") as file:
            self.model.load_weights([(name, file.get_tensor(name)) for name in update_info.names])


def chunks(folder: Path, size: int = 20) -> list[dict[str, Any]]:
    """The updates that send all tensors of a folder's model, `size` at a time."""
    path = str(folder / "model.safetensors")
    with safe_open(path, "pt") as file:
        names = sorted(file.keys(), reverse=True)
    return [{"path": path, "names": names[start : start + size]} for start in range(0, len(names), size)]


class Extension:
    """The worker's extension, which adds nothing to it."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)
