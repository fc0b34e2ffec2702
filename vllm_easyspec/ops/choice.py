"""Which calls the native operators of few tokens serve; torch's own products take the others."""

from functools import lru_cache
from typing import Any

import torch

from vllm_easyspec.ops import native
from vllm_easyspec.packing import is_packed, is_quantized

# Up to this many tokens look-ahead maps run in one native operator on a CPU; in bfloat16 torch's products use
# instructions that it lacks. Measured by benchmarks/operators.py (docs/results.md); float16 is assumed to be like
# bfloat16.
FEW_TOKENS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


# The same for a sublayer's matrix products on a GPU, in bfloat16: the limit of csrc/skinny_product.h.
FEW_TOKENS_CUDA = 16


def is_short(x: torch.Tensor) -> bool:
    """Whether the native operator of few tokens serves an input `[..., tokens, hidden]`.

    On a CPU it serves packed weights (`packing.py`) whatever the number of tokens.
    """
    if native.load() is not None:
        return False
    if x.device.type == "cpu":
        return x.shape[-2] <= FEW_TOKENS[x.dtype]
    return x.dtype is torch.bfloat16 and x.shape[-2] <= FEW_TOKENS_CUDA and x.is_cuda and _has_clusters(x.device)


# Operators on a drafter's stacked weights: a CPU's are native where the weights are packed.
STACKED_PRODUCTS = ("norm_and_project", "project_among_zeros", "sum_of_mlps")


# The cases in which torch's products were measured to be faster on this GPU (drafter/products.py): an operator's name,
# whether it is called for several layers at once, and the number of tokens, rounded up to a power of two.
TORCHS_PRODUCTS: set[tuple[str, bool, int]] = set()


def serves(arguments: tuple[Any, ...]) -> bool:
    """Whether the native operator of few tokens can serve a call of this one."""
    return is_short(arguments[0]) and _are_vectors(arguments) and not any(is_quantized(w) for w in _tensors(arguments))


def is_chosen(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the native operator of few tokens serves a call of this one."""
    x = arguments[0]
    if x.device.type == "cpu" and name in STACKED_PRODUCTS:
        return any(is_packed(w) for w in _tensors(arguments))
    if not serves(arguments):
        return False
    if not (TORCHS_PRODUCTS and x.is_cuda):
        return True
    layers = arguments[6] if name == "norm_and_project" else x.shape[0]
    return (name, layers > 1, 1 << (x.shape[-2] - 1).bit_length()) not in TORCHS_PRODUCTS


def arguments(*args: Any) -> tuple[Any, ...]:
    """The arguments of a call, in place of calling an operator."""
    return args


@lru_cache
def _has_clusters(device: torch.device) -> bool:
    """Whether this GPU has clusters of blocks, which the skinny product needs: Hopper and newer."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def _are_vectors(arguments: tuple[Any, ...]) -> bool:
    """Whether a GPU's kernel reads whole vectors of 16 bytes, in half a row of a gated product too."""
    tensors = _tensors(arguments)
    if not tensors[0].is_cuda:
        return True
    return tensors[0].shape[-1] % 8 == 0 and all(w.shape[-1] % 16 == 0 for w in tensors[1:] if w.dim() == 3)
