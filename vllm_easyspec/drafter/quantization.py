"""A drafter's matrices after loading: quantized if asked for, and packed if native products read them.

Only weights are quantized, with a scale per column (output channel); activations keep the drafter's dtype. So does the
embedding, of which a pass reads only a few rows. The LM head is quantized, in a copy if it is tied to the embedding.
"""

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_easyspec import ops
from vllm_easyspec.packing import QUANTIZATIONS, pack, quantize

logger = init_logger("vllm.easyspec")


def prepared(
    weights: torch.Tensor, quantization: str | None, parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrices `[layers, inner, columns]` as the operators of this device read them, and their scales, if any.

    parts: as in `packing.pack`.
    """
    scales = None
    if quantization is not None:
        weights, scales = quantize(weights, QUANTIZATIONS[quantization])
        if weights.is_cuda or ops.WHY_NOT_NATIVE is not None:
            logger.info_once(
                "easyspec: quantization=%s saves memory here, but no time: each product converts its weights first",
                quantization,
            )
    if weights.device.type == "cpu" and ops.WHY_NOT_NATIVE is None:
        weights = pack(weights, parts)
    return weights, scales


def quantize_head(head: ParallelLMHead, quantization: str) -> None:
    """Give the loaded LM head quantized weights of its own."""
    tokens = head.weight.shape[0]
    weights, scales = prepared(head.weight.data.t().unsqueeze(0), quantization)
    assert scales is not None
    head.register_parameter("weight", nn.Parameter(weights, requires_grad=False))
    head.register_parameter("scales", nn.Parameter(scales, requires_grad=False))
    head.quant_method = _QuantizedHead(tokens)
    head.cpu_linear = None  # vLLM's product on a CPU, which holds a copy


class _QuantizedHead(UnquantizedEmbeddingMethod):
    """tokens: of this rank's shard, padding included."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def process_weights_after_loading(self, layer: Any) -> None:
        """Do nothing: there is no copy."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[rows, hidden]` to `[rows, tokens]`."""
        own = bias if bias is None else bias.unsqueeze(0)
        return ops.project_among_zeros(x.unsqueeze(0), layer.weight, layer.scales, own, 0, 1, 0, 1, self.tokens)[0]
