"""Weights of several layers in the form that matrix products read: packed on a CPU, quantized if asked for.

A checkpoint is loaded into stacks `[layers, inner, columns]`. With few tokens a CPU's products are bound by reading
them, and memory is read fastest in order, so the native operators read them tile by tile:

    [layers, tiles, steps, 64, abreast]

with 64 columns per tile and `abreast` neighbouring inner indices per step: 1 for float32, 2 for smaller types. Missing
columns and inner indices are zeros. 8-bit numbers are a sign and a magnitude, in the order of csrc/packed_matmul.h.
`unpack` reverses this, for the references.
"""

import torch

TILE = 64
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest weight of a column is scaled to this
# vLLM's names of the online quantization methods for a drafter, and the dtype of its weights.
QUANTIZATIONS = {"int8_per_channel_weight_only": torch.int8, "fp8_per_channel": torch.float8_e4m3fn}


def quantize(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`[layers, inner, columns]` to the same in `dtype`, and a scale per column, `[layers, columns] float32`."""
    largest = LARGEST[dtype]
    codes = torch.empty_like(weights, dtype=dtype)
    scales = (weights.abs().amax(dim=1).float() / largest).clamp_(min=torch.finfo(torch.float32).tiny)
    for layer, code, scale in zip(weights, codes, scales, strict=True):  # one at a time, to save memory
        scaled = layer.float() / scale
        code.copy_((scaled.round_() if dtype is torch.int8 else scaled).clamp_(-largest, largest))
    return codes, scales


def is_quantized(weights: torch.Tensor) -> bool:
    """Whether `quantize` made these."""
    return weights.dtype in LARGEST


def is_packed(weights: torch.Tensor) -> bool:
    """Whether `pack` made these."""
    return weights.dim() == 5


def pack(weights: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """`[layers, inner, columns]` packed for the native operators of a CPU.

    parts: 2 for gates and values, whose tiles alternate.
    """
    dtype, abreast = weights.dtype, 1 if weights.dtype is torch.float32 else 2
    if weights.dtype is torch.int8:
        weights = torch.where(weights < 0, -128 - weights, weights)  # two's complement to a sign and a magnitude
    if dtype in LARGEST:
        weights = weights.view(torch.uint8)
    layers, inner, columns = weights.shape
    width = columns // parts
    steps, tiles = -(-inner // abreast), -(-width // TILE)
    padded = weights.new_zeros(layers, steps * abreast, parts, tiles * TILE)
    padded[:, :inner, :, :width] = weights.reshape(layers, inner, parts, width)
    tiled = padded.view(layers, steps, abreast, parts, tiles, TILE)
    packed = tiled.permute(0, 4, 3, 1, 5, 2).flatten(1, 2).contiguous()
    return (_interleave(packed) if dtype in LARGEST else packed).view(dtype)


def unpack(packed: torch.Tensor, inner: int, columns: int, parts: int = 1) -> torch.Tensor:
    """The stack `[layers, inner, columns]` that was packed."""
    dtype = packed.dtype
    if dtype in LARGEST:
        packed = _interleave(packed.view(torch.uint8), back=True)
    layers, tiles, steps, _, abreast = packed.shape
    tiled = packed.view(layers, tiles // parts, parts, steps, TILE, abreast).permute(0, 3, 5, 2, 1, 4)
    padded = tiled.reshape(layers, steps * abreast, parts, tiles // parts * TILE)
    plain = padded[:, :inner, :, : columns // parts].flatten(2)
    if dtype is torch.int8:
        plain = plain.view(torch.int8)
        return torch.where(plain < 0, -128 - plain, plain)
    return plain.view(dtype)


def _interleave(packed: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Alternate the bytes of the first and the last 16 of 32 columns, 8 bytes each."""
    halves = (4, 2) if back else (2, 4)
    return packed.view(packed.numel() // 64, *halves, 8).transpose(1, 2).reshape(packed.shape)


def dequantized(
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    dtype: torch.dtype,
    inner: int,
    columns: int,
    parts: int = 1,
) -> torch.Tensor:
    """`[layers, inner, columns]` in `dtype`, of weights in any form that this module makes."""
    if is_packed(weights):
        weights = unpack(weights, inner, columns, parts)
    if scales is None:
        return weights
    return (weights.to(scales.dtype) * scales.unsqueeze(1)).to(dtype)
