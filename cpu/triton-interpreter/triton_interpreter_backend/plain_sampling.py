"""Plain implementations of the kernels that draw tokens and score them: Gumbel-max sampling, log-probabilities, ranks.
`plain` lists the rules for implementations.

Random numbers are the kernels' own, to the bit: a seed gives the same token, interpreted or not.
"""

import numpy as np
import torch

from .plain import flat, floats, in_blocks, stands_for

Grid = tuple[int, ...]
Tensor = torch.Tensor

# `_DRAFT_NOISE_SALT` of vLLM's gumbel.py: added to the position, it keeps a draft's noise apart from the target's.
_DRAFT_NOISE_SALT = 1 << 30
_UINT32 = 0xFFFFFFFF


def _murmur3_mix(h: np.ndarray, key: np.ndarray) -> np.ndarray:
    """`_murmur3_mix` on uint32 arrays, whose arithmetic wraps as the kernel's does."""
    key = key * np.uint32(0xCC9E2D51)
    key = (key << np.uint32(15)) | (key >> np.uint32(17))
    h = h ^ (key * np.uint32(0x1B873593))
    h = (h << np.uint32(13)) | (h >> np.uint32(19))
    return h * np.uint32(5) + np.uint32(0xE6546B64)


def murmur3_hash32(seed: int, pos: int, offsets: np.ndarray, domain: int = 0) -> np.ndarray:
    """`murmur3_hash32` of vLLM's gumbel.py: uint32 noise for each uint32 offset, of one seed and position."""
    h = np.array([domain], np.uint32)
    for word in (seed, seed >> 32, pos):
        h = _murmur3_mix(h, np.array([word & _UINT32], np.uint32))
    h = _murmur3_mix(h, offsets) ^ np.uint32(16)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def gumbel_noise(seed: int, pos: int, num_tokens: int, fp64: bool) -> np.ndarray:
    """The Gumbel noise `gumbel_noised_argmax` adds to the logits of tokens [0, num_tokens)."""
    offsets = np.arange(num_tokens, dtype=np.uint32)
    random32 = murmur3_hash32(seed, pos, offsets)
    if fp64:
        high = murmur3_hash32(seed, pos, offsets, domain=0x9E3779B9).astype(np.uint64)
        random53 = ((high << np.uint64(32)) | random32) >> np.uint64(11)
        u = (random53.astype(np.float64) + 0.5) * 1.1102230246251565e-16
        u = np.where(u == 1.0, u - 1.1102230246251565e-16, u)
        return -np.log(-np.log(u))
    high = (random32 >> np.uint32(16)).astype(np.float32) * np.float32(1.52587890625e-05)
    low = (random32 & np.uint32(0xFFFF)).astype(np.float32)
    u = high + (low + np.float32(0.5)) * np.float32(2.3283064365386963e-10)
    return -np.log(-_log1p_neg(u))


def _log1p_neg(u: np.ndarray) -> np.ndarray:
    """`_log1p_neg_stable`: log(1 - u) in float32, by its series where u is small."""
    polynomial = np.float32(1.0 / 8.0)
    for n in range(7, 0, -1):
        polynomial = np.float32(1.0 / n) + u * polynomial
    direct = np.log(np.maximum(np.float32(1.0) - u, np.float32(5.960464477539063e-08)))
    return np.where(u < np.float32(0.25), -u * polynomial, direct)


def block_argmax(values: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """[..., n] -> the index in n and the value of each block's maximum, [..., num_blocks] both. NaN never wins."""
    blocks = np.fmax(in_blocks(values, min(block_size, values.shape[-1]), -np.inf), -np.inf)
    index = blocks.argmax(axis=-1)
    value = np.take_along_axis(blocks, index[..., None], axis=-1)[..., 0]
    return index + np.arange(blocks.shape[-2]) * block_size, value


@stands_for("sample.gumbel._gumbel_sample_kernel")
def gumbel_sample(
    grid: Grid,
    local_argmax_ptr: Tensor,
    local_argmax_stride: int,
    local_max_ptr: Tensor,
    local_max_stride: int,
    logits_cache_ptr: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: Tensor | None,
    logits_cache_source_ptr: Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    seeds_ptr: Tensor,
    pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """`_gumbel_sample_kernel`: each block's argmax of the logits plus Gumbel noise; without noise for a row of
    temperature 0 or without a request (index < 0). Rows with a request leave their logits, before temperature, in the
    cache.
    """
    local_argmax, local_max = local_argmax_ptr.numpy(), local_max_ptr.numpy()
    for row, req_idx in enumerate(expanded_idx_mapping_ptr[: grid[0]].tolist()):
        temperature, seed = 0.0, 0
        if req_idx >= 0:
            temperature, seed = float(temp_ptr[req_idx]), int(seeds_ptr[req_idx])
            if logits_cache_ptr is not None:
                col = int(flat(logits_cache_col_ptr)[row if PER_TOKEN_COL else 0])
                logits_cache_ptr[req_idx, col, :vocab_size] = logits_cache_source_ptr[row, :vocab_size]
        logits = floats(logits_ptr[row, :vocab_size])
        if temperature != 0.0 and APPLY_TEMPERATURE:
            logits = logits / np.float32(temperature)
        if USE_FP64:
            logits = logits.astype(np.float64)
        if temperature != 0.0:
            pos = int(pos_ptr[row]) + (_DRAFT_NOISE_SALT if IS_DRAFTING else 0)
            logits = logits + gumbel_noise(seed, pos, vocab_size, USE_FP64)
        local_argmax[row], local_max[row] = block_argmax(logits, BLOCK_SIZE)


@stands_for("sample.logprob._topk_log_softmax_kernel")
def topk_log_softmax(
    grid: Grid,
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    topk_ids_ptr: Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """`_topk_log_softmax_kernel`: log-probabilities of the given tokens, [grid[0], topk]."""
    logits = floats(logits_ptr[: grid[0], :vocab_size])
    max_logit = np.fmax.reduce(logits, axis=-1, keepdims=True)
    block_sums = in_blocks(np.exp(logits - max_logit), BLOCK_SIZE, 0.0).sum(axis=-1)
    # accumulate() adds from the left, as the kernel does; sum() would add in pairs.
    log_sum = np.log(np.add.accumulate(block_sums, axis=-1)[:, -1:])
    chosen = np.take_along_axis(logits, topk_ids_ptr.numpy()[: grid[0], :topk], axis=-1)
    output_ptr.numpy()[: grid[0], :topk] = chosen - max_logit - log_sum


@stands_for("sample.logprob._ranks_kernel")
def ranks(
    grid: Grid,
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    token_ids_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """`_ranks_kernel`: how many tokens are at least as likely as the given one; if its logit is -inf, the padding of
    the last block counts too, as it does in the kernel.
    """
    logits = floats(logits_ptr[: grid[0], :vocab_size])
    chosen = np.take_along_axis(logits, token_ids_ptr.numpy()[: grid[0], None], axis=-1)
    at_least = in_blocks(logits, BLOCK_SIZE, -np.inf) >= chosen[..., None]
    output_ptr.numpy()[: grid[0]] = at_least.sum(axis=(-2, -1))


@stands_for("sample.logprob._fill_logprob_token_ids_kernel")
def fill_logprob_token_ids(
    grid: Grid,
    out_token_ids_ptr: Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: Tensor,
    topk_indices_ptr: Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    num_per_req_token_ids_ptr: Tensor,
    per_req_token_ids_ptr: Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """`_fill_logprob_token_ids_kernel`: the tokens whose log-probabilities a row returns: the sampled one, then those
    the request asks for, or else the top ones. Marks them valid, and leaves the rest of the row.
    """
    token_ids, is_valid = out_token_ids_ptr.numpy(), out_valid_mask_ptr.numpy()
    for row, req_idx in enumerate(expanded_idx_mapping_ptr[: grid[0]].tolist()):
        token_ids[row, 0] = sampled_token_ids_ptr[row]
        num_ids = int(num_per_req_token_ids_ptr[req_idx])
        source = per_req_token_ids_ptr[req_idx] if num_ids > 0 else topk_indices_ptr[row]
        num_ids = num_ids if num_ids > 0 else NUM_TOPK
        token_ids[row, 1 : 1 + num_ids] = source[:num_ids].numpy()
        is_valid[row, : 1 + num_ids] = True
