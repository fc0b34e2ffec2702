"""Plain implementations of the kernels that change logits before a token is drawn: penalties, biases, bad words,
temperature, min-p, top-k and top-p, grammar masks. `plain` lists the rules for implementations.
"""

import itertools

import numpy as np
import torch

from .plain import floats, stands_for

Grid = tuple[int, ...]
Tensor = torch.Tensor


def unpack_bits(words: np.ndarray, num_bits: int) -> np.ndarray:
    """int32 words, the lowest bit first -> bool [num_bits]."""
    return np.unpackbits(words.view(np.uint8), count=num_bits, bitorder="little").view(bool)


def store(row: Tensor, values: np.ndarray) -> None:
    """Write a row of logits back, rounded to its own type. A float32 row shares its memory with `floats` of it."""
    row.copy_(torch.from_numpy(values))


@stands_for("sample.penalties._bincount_kernel")
def bincount(
    grid: Grid,
    expanded_idx_mapping_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    prefill_len_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """`_bincount_kernel`: set the bits of the prompt's tokens, and count the output tokens that a resumed request
    brings in its prefill. Adds to what is there.
    """
    for req_idx in expanded_idx_mapping_ptr[: grid[0]].tolist():
        tokens = all_token_ids_ptr[req_idx].numpy()
        prompt_len, prefill_len = int(prompt_len_ptr[req_idx]), int(prefill_len_ptr[req_idx])
        words, bits = np.divmod(tokens[:prompt_len], 32)
        np.bitwise_or.at(prompt_bin_mask_ptr[req_idx].numpy(), words, np.int32(1) << bits.astype(np.int32))
        np.add.at(output_bin_counts_ptr[req_idx].numpy(), tokens[prompt_len:prefill_len], 1)


@stands_for("sample.penalties._penalties_kernel")
def penalties(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    token_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    repetition_penalty_ptr: Tensor,
    frequency_penalty_ptr: Tensor,
    presence_penalty_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """`_penalties_kernel`: repetition, frequency and presence penalties; a row after drafts counts those drafts as
    output.
    """
    req_idx, positions = expanded_idx_mapping_ptr.numpy()[: grid[0]], expanded_local_pos_ptr.numpy()
    token_ids = token_ids_ptr.numpy()
    repetition, frequency = floats(repetition_penalty_ptr)[req_idx], floats(frequency_penalty_ptr)[req_idx]
    presence = floats(presence_penalty_ptr)[req_idx]
    for row in np.flatnonzero((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)):
        logits = floats(logits_ptr[row, :vocab_size])
        counts = output_bin_counts_ptr[req_idx[row], :vocab_size].numpy()
        drafts = token_ids[row - positions[row] + 1 : row + 1]
        counts = counts + np.bincount(drafts[drafts >= 0], minlength=vocab_size)[:vocab_size]
        is_output = counts > 0
        if repetition[row] != 1.0:
            is_prompt = unpack_bits(prompt_bin_mask_ptr[req_idx[row]].numpy(), vocab_size)
            scale = np.where(is_prompt | is_output, repetition[row], np.float32(1.0))
            logits = logits * np.where(logits > 0, np.float32(1.0) / scale, scale)
        logits = logits - frequency[row] * counts.astype(np.float32)
        logits = logits - presence[row] * is_output.astype(np.float32)
        store(logits_ptr[row, :vocab_size], logits)


@stands_for("sample.logit_bias._bias_kernel")
def bias(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: Tensor,
    num_allowed_token_ids_ptr: Tensor,
    allowed_token_ids_ptr: Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: Tensor,
    bias_token_ids_ptr: Tensor,
    bias_token_ids_stride: int,
    bias_ptr: Tensor,
    bias_stride: int,
    pos_ptr: Tensor,
    min_lens_ptr: Tensor,
    num_stop_token_ids_ptr: Tensor,
    restore_when_all_masked_ptr: Tensor,
    stop_token_ids_ptr: Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """`_bias_kernel`: mask all but the allowed tokens, add the biases, then mask the stop tokens of a request that is
    still shorter than its minimum; if that leaves nothing, and the request asks for it, restore them.
    """
    for row, req_idx in enumerate(expanded_idx_mapping_ptr[: grid[0]].tolist()):
        logits = floats(logits_ptr[row, :vocab_size])
        num_allowed = int(num_allowed_token_ids_ptr[req_idx])
        if num_allowed > 0:
            allowed = allowed_token_ids_ptr[req_idx, :num_allowed].numpy()
            masked = np.full_like(logits, -np.inf)
            masked[allowed] = logits[allowed]
            logits = masked
        num_biases = int(num_logit_bias_ptr[req_idx])
        if num_biases > 0:
            logits[bias_token_ids_ptr[req_idx, :num_biases].numpy()] += bias_ptr[req_idx, :num_biases].numpy()
        num_stops = int(num_stop_token_ids_ptr[req_idx])
        if num_stops > 0 and int(pos_ptr[row]) + 1 < int(min_lens_ptr[req_idx]):
            stops = stop_token_ids_ptr[req_idx, :num_stops].numpy()
            saved = logits[stops]
            logits[stops] = -np.inf
            if CHECK_ALL_MASKED_ROWS and restore_when_all_masked_ptr[req_idx] and not (logits > -np.inf).any():
                logits[stops] = np.where(np.isfinite(saved), saved, np.float32(-np.inf))
        store(logits_ptr[row, :vocab_size], logits)


@stands_for("sample.bad_words._bad_words_kernel")
def bad_words(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    bad_word_token_ids_ptr: Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    total_len_ptr: Tensor,
    input_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
) -> None:
    """`_bad_words_kernel`: mask the last token of each bad word whose other tokens end the output, which for a row
    after drafts includes those drafts.
    """
    positions = expanded_local_pos_ptr[: grid[0]].tolist()
    for row, req_idx in enumerate(expanded_idx_mapping_ptr[: grid[0]].tolist()):
        num_words = min(int(num_bad_words_ptr[req_idx]), grid[1])
        if num_words <= 0:
            continue
        output = all_token_ids_ptr[req_idx, int(prompt_len_ptr[req_idx]) : int(total_len_ptr[req_idx])].tolist()
        output += input_ids_ptr[row - positions[row] + 1 : row + 1].tolist()
        for start, end in itertools.pairwise(bad_word_offsets_ptr[req_idx, : num_words + 1].tolist()):
            *prefix, last = bad_word_token_ids_ptr[req_idx, start:end].tolist()
            if output[len(output) - len(prefix) :] == prefix:
                logits_ptr[row, last] = -torch.inf


@stands_for("vllm.v1.sample.ops.topk_topp_triton._topk_topp_kernel")
def topk_topp(
    grid: Grid,
    LOGITS: Tensor,
    LOGITS_STRIDE_0: int,
    BUFFER: Tensor,
    PERCENTILE_TO_STD_TABLE: Tensor,
    NORMAL_CDF_TO_SIGMA_TABLE: Tensor,
    K: Tensor,
    P: Tensor,
    BATCH_SIZE: int,
    VOCAB_SIZE: int,
    MASK_VALUE: float,
    BLOCK_SIZE: int,
    BLOCK_SIZE_TRUNC: int,
    TOPK_ENABLED: bool,
    TOPP_ENABLED: bool,
    SPLIT_COVERS_PONLY: bool,
) -> object:
    """`_topk_topp_kernel`: keep the k highest logits, and of these the fewest whose probabilities reach p; of equal
    ones the first. Leaves BUFFER, which is scratch.

    The kernel itself fails in the interpreter, which has no tensor for its loop variable ("'int' object has no
    attribute 'to'"). It looks for the boundary in at most 18 bisections, so that it may keep a few tokens more where p
    ends among tokens less probable than about 4e-6 times the most probable one; this implementation does not.
    """
    if SPLIT_COVERS_PONLY:
        return NotImplemented
    for row in range(BATCH_SIZE):
        k = int(K[row]) if TOPK_ENABLED else VOCAB_SIZE
        p = float(P[row]) if TOPP_ENABLED else 1.0
        logits = LOGITS[row, :VOCAB_SIZE].numpy()
        kept = top_k_top_p(logits, k, p)
        masked = np.full_like(logits, MASK_VALUE)
        masked[kept] = logits[kept]
        logits[:] = masked
    return None


def top_k_top_p(logits: np.ndarray, k: int, p: float) -> np.ndarray:
    """The indices of what is kept of a row."""
    candidates = np.flatnonzero(logits > -np.inf)
    if (k >= len(candidates) and p >= 1.0) or not len(candidates):
        return np.arange(len(logits))
    if k < len(candidates):
        candidates = np.flatnonzero(logits >= np.partition(logits, -k)[-k])
    highest_first = candidates[np.argsort(-logits[candidates], kind="stable")][:k]
    if p < 1.0:
        probabilities = np.exp(logits[highest_first].astype(np.float64) - logits[highest_first[0]])
        cumulative = np.cumsum(probabilities / probabilities.sum())
        highest_first = highest_first[: np.searchsorted(cumulative, p) + 1]
    return highest_first


@stands_for("sample.gumbel._temperature_kernel")
def temperature(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    temperature_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """`_temperature_kernel`: divide each row by its request's temperature, unless that is 0 or 1."""
    temperatures = floats(temperature_ptr)[expanded_idx_mapping_ptr.numpy()[: grid[0]]]
    for row in np.flatnonzero((temperatures != 0.0) & (temperatures != 1.0)):
        logits = logits_ptr[row, :vocab_size]
        store(logits, floats(logits) / temperatures[row])


@stands_for("sample.min_p._min_p_kernel")
def min_p(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    min_p_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """`_min_p_kernel`: mask the tokens less probable than min_p times the most probable one."""
    all_min_p = floats(min_p_ptr)[expanded_idx_mapping_ptr.numpy()[: grid[0]]]
    for row in np.flatnonzero(all_min_p != 0.0):
        logits = logits_ptr[row, :vocab_size]
        values = floats(logits)
        threshold = np.fmax.reduce(values) + np.log(all_min_p[row])
        logits.masked_fill_(torch.from_numpy(values < threshold), -torch.inf)


@stands_for("structured_outputs._apply_grammar_bitmask_kernel")
def apply_grammar_bitmask(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    logits_indices_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    bitmask_ptr: Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """`_apply_grammar_bitmask_kernel`: mask, in each position's row of logits, the tokens whose bit is not set. A
    position which its request no longer has is skipped.
    """
    starts = cu_num_logits_ptr.tolist()
    for i, place in enumerate(logits_indices_ptr[: grid[0]].tolist()):
        req_idx, position = divmod(place, MASK_STRIDE)
        if position < starts[req_idx + 1] - starts[req_idx]:
            is_allowed = unpack_bits(bitmask_ptr[i].numpy(), vocab_size)
            row = logits_ptr[starts[req_idx] + position, :vocab_size]
            row.masked_fill_(torch.from_numpy(~is_allowed), -torch.inf)
