"""The drafter's own operators: in plain torch, and natively (csrc/) where the package was built with a compiler."""

from vllm_easyspec.ops import native
from vllm_easyspec.ops.choice import (
    FEW_TOKENS,
    FEW_TOKENS_CUDA,
    STACKED_PRODUCTS,
    TORCHS_PRODUCTS,
    arguments,
    is_chosen,
    is_short,
    serves,
)
from vllm_easyspec.ops.layers import (
    embed_shard,
    group_rms_norm,
    norm_and_project,
    prefix_sums,
    products,
    project_among_zeros,
    rotate_and_store,
    silu_and_mul,
    sum_of_mlps,
)
from vllm_easyspec.ops.lookahead import group_features, look_ahead
from vllm_easyspec.ops.native import warn_without
from vllm_easyspec.ops.positions import (
    advance_draft_inputs,
    calibration_inputs,
    shift_block_table,
    shift_slots,
    slots_of,
)
from vllm_easyspec.ops.registry import NAMESPACE, REFERENCES, reference_of

__all__ = [
    "FEW_TOKENS",
    "FEW_TOKENS_CUDA",
    "NAMESPACE",
    "REFERENCES",
    "STACKED_PRODUCTS",
    "TORCHS_PRODUCTS",
    "WHY_NOT_NATIVE",
    "advance_draft_inputs",
    "arguments",
    "calibration_inputs",
    "embed_shard",
    "group_features",
    "group_rms_norm",
    "is_chosen",
    "is_short",
    "look_ahead",
    "norm_and_project",
    "prefix_sums",
    "products",
    "project_among_zeros",
    "reference_of",
    "rotate_and_store",
    "serves",
    "shift_block_table",
    "shift_slots",
    "silu_and_mul",
    "slots_of",
    "sum_of_mlps",
    "warn_without",
]

# Why this process has no native operators; None where it has them.
WHY_NOT_NATIVE = native.load()
