"""Quantized checkpoints: each weight is decompressed as it is read, and the drafter treats it like any other.

Activations keep the drafter's dtype, whatever the checkpoint says of them. The formats are compressed-tensors', which
decompresses its own, AutoAWQ's and fp8's; GPTQ's is described at https://github.com/AutoGPTQ/AutoGPTQ.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Parts = dict[str, torch.Tensor]
# Of compressed-tensors.
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
# Scales of activations and of the K/V cache, which are not quantized here.
_IGNORED = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale", "q_scale")


def unsupported(quantization: Mapping[str, Any]) -> str | None:
    """Why a checkpoint with this `quantization_config` can't be read; None if it can."""
    method = quantization.get("quant_method")
    if method not in _READERS:
        return f"quant_method={method!r}: supported are {', '.join(_READERS)}"
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        given = {group.get("format") for group in groups.values() if isinstance(group, dict)}
        for name in {quantization.get("format"), *given} - {None}:
            if name not in FORMATS:
                return f"format={name!r}: supported are {', '.join(FORMATS)}"
        if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
            return "sparsity_config: compressed sparse weights are not supported"
        if quantization.get("transform_config"):
            return "transform_config: transformed activations are not supported"
    elif method == "awq" and (quantization.get("bits", 4), quantization.get("version", "gemm").lower()) != (4, "gemm"):
        return "AWQ other than 4 bits of version 'gemm' is not supported"
    elif method == "gptq" and quantization.get("bits") not in (2, 4, 8):
        return f"GPTQ of bits={quantization.get('bits')}: supported are 2, 4 and 8"
    elif method == "gptq" and quantization.get("dynamic"):
        return "GPTQ with rules by layer (dynamic) is not supported"
    return None


@dataclass(frozen=True)
class _Compressed:
    """How a linear layer is stored: the tensors needed, and what makes its weight of them."""

    parts: tuple[str, ...]
    decompress: Callable[[Parts], torch.Tensor]


OfLayer = Callable[[str], _Compressed | None]  # of a linear layer's name; None where it is not quantized


def decompressed(
    weights: Iterable[tuple[str, torch.Tensor]], quantization: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors as an unquantized one has them: `NAME.weight`, `[outputs, inputs]`.

    quantization: the `quantization_config` of config.json, one that `unsupported` has nothing against. Raises
    ValueError where a part of a weight is missing.
    """
    of_layer = _READERS[quantization["quant_method"]](dict(quantization))
    pending: dict[str, Parts] = defaultdict(dict)
    stored: dict[str, _Compressed | None] = {}
    for name, tensor in weights:
        layer, _, part = name.rpartition(".")
        if layer not in stored:
            stored[layer] = of_layer(layer) if layer.endswith(("_proj", "lm_head")) else None
        how = stored[layer]
        if how is None or part == "bias":
            if part not in _IGNORED:
                yield name, tensor
        elif part in how.parts:
            parts = pending[layer]
            parts[part] = tensor
            if len(parts) == len(how.parts):
                yield f"{layer}.weight", how.decompress(pending.pop(layer))
    for layer, parts in pending.items():
        how = stored[layer]
        assert how is not None
        raise ValueError(
            f"the drafter's checkpoint lacks {sorted(set(how.parts) - set(parts))} of {layer!r}, which its "
            "quantization_config says is quantized. Check that all of its files are there"
        )


def _compressed_tensors(quantization: dict[str, Any]) -> OfLayer:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    linear = torch.nn.Linear(1, 1, device="meta")
    config = QuantizationConfig.model_validate(quantization)

    def of_scheme(scheme: Any) -> _Compressed:
        file_format = scheme.format or infer_module_format(torch.nn.Linear, scheme)
        compressor = BaseCompressor.get_value_from_registry(getattr(file_format, "value", file_format))
        names = compressor.compression_param_names(scheme)
        return _Compressed(names, lambda parts: compressor.decompress(parts, scheme)["weight"])

    def of_layer(layer: str) -> _Compressed | None:
        schemes = [scheme for scheme in config.config_groups.values() if scheme.weights is not None]
        ignored = config.ignore or ()
        return next((of_scheme(one) for one in schemes if is_match(layer, linear, one.targets, ignored)), None)

    return of_layer


def _awq(quantization: dict[str, Any]) -> OfLayer:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    converter = AutoAWQConverter.from_autoawq_config(quantization)
    (scheme,) = converter.create_config().config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def decompress(parts: Parts) -> torch.Tensor:
        return compressor.decompress(_converted(converter, parts), scheme)["weight"]

    def of_layer(layer: str) -> _Compressed | None:
        others = {name.removeprefix(layer + ".") for name in converter.get_dependencies(f"{layer}.qweight")}
        return _Compressed(("qweight", *others), decompress) if others else None

    return of_layer


def _gptq(quantization: dict[str, Any]) -> OfLayer:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits = quantization["bits"]
    # Version 1, which is the default, stores each zero point less one.
    shift = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    values = 32 // bits

    def decompress(parts: Parts) -> torch.Tensor:
        packed, scales, groups = parts["qweight"], parts["scales"], parts["g_idx"].long()
        inputs, outputs = packed.shape[0] * values, packed.shape[1]
        levels = unpack_from_int32(packed, bits, torch.Size((inputs, outputs)), packed_dim=0).short()
        zeros = unpack_from_int32(parts["qzeros"], bits, scales.shape).short() + shift
        return ((levels - zeros[groups]) * scales[groups]).t()

    how = _Compressed(("qweight", "qzeros", "scales", "g_idx"), decompress)
    quantizes_head = bool(quantization.get("lm_head"))
    return lambda layer: how if quantizes_head or not layer.endswith("lm_head") else None


def _fp8(quantization: dict[str, Any]) -> OfLayer:
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    ignored = tuple(quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or ("lm_head",))
    block = quantization.get("weight_block_size")
    if block is None:
        how = _Compressed(("weight", "weight_scale"), lambda parts: parts["weight"].float() * parts["weight_scale"])
    else:
        converter = FP8BlockDequantizer(weight_block_size=tuple(block), dtype=torch.float32)
        how = _Compressed(("weight", "weight_scale_inv"), lambda parts: _converted(converter, parts)["weight"])
    return lambda layer: None if layer.endswith(ignored) else how


def _converted(converter: Any, parts: Parts) -> Parts:
    """What a converter of compressed-tensors, which takes whole names, makes of one layer."""
    whole = converter.process({f"layer.{part}": tensor for part, tensor in parts.items()})
    return {name.removeprefix("layer."): tensor for name, tensor in whole.items()}


# By `quant_method`.
_READERS: dict[str, Callable[[dict[str, Any]], OfLayer]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
}
