"""New weights for a running drafter: from a trainer, through vLLM's weight transfer, or from a folder."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.model_loader import get_model_loader

from vllm_easyspec.drafter.architectures import DrafterShape
from vllm_easyspec.drafter.quantized_checkpoint import decompressed
from vllm_easyspec.support import check_checkpoint, read_hf_config

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig


class ReceivedWeights(nn.Module):
    """What a weight transfer engine loads in place of the drafter.

    vLLM prepares a model for new weights module by module, each with its own tensors as they were before loading. The
    drafter has all layers in one module, packed or quantized, so its tensors are collected here first, on the host, in
    any order and number of chunks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        chunk = {name: tensor.to("cpu", copy=True) for name, tensor in weights}  # the engine reuses its buffers
        self.tensors |= chunk
        return set(chunk)


def read_weights(
    model_config: "ModelConfig", load_config: "LoadConfig", shape: DrafterShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint that `model_config` names, decompressed.

    Raises ValueError for a checkpoint of another shape, and for a load format that can't be read twice.
    """
    model, revision = model_config.model, model_config.revision
    hf_config = read_hf_config(model, revision, model_config.code_revision, model_config.trust_remote_code)
    given, wanted = asdict(DrafterShape.from_hf_config(hf_config)), asdict(shape)
    if given != wanted:
        differ = [
            f"{name}={given[name]!r} in place of {wanted[name]!r}" for name in wanted if given[name] != wanted[name]
        ]
        raise ValueError(f"model={model!r} has {', '.join(differ)}. Give a drafter of the same shape")
    check_checkpoint(model, revision, shape)
    loader: Any = get_model_loader(load_config)
    if not hasattr(loader, "get_all_weights"):
        raise ValueError(f"load_format={load_config.load_format!r} can't be read again. Transfer the weights instead")
    weights = loader.get_all_weights(model_config, ReceivedWeights())
    quantization = getattr(hf_config, "quantization_config", None)
    yield from weights if quantization is None else decompressed(weights, quantization)
