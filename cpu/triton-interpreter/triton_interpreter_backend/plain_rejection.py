"""Plain implementations of the kernels that verify drafts: rejection sampling in its three methods (standard,
synthetic, block), and the draw of the token that follows what was accepted. `plain` lists the rules for
implementations.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .plain import floats, in_blocks, stands_for
from .plain_sampling import block_argmax, gumbel_noise

Grid = tuple[int, ...]
Tensor = torch.Tensor

_UINT32 = 0xFFFFFFFF


def philox_uniform(seed: int, offset: int) -> np.float32:
    """`tl.rand(seed, offset)` of Triton for an int64 offset: the first word of Philox 4x32-10, as a float32 in [0,
    1).
    """
    c0, c1, c2, c3 = offset & _UINT32, (offset >> 32) & _UINT32, 0, 0
    k0, k1 = seed & _UINT32, (seed >> 32) & _UINT32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _UINT32, (a >> 32) ^ c3 ^ k1, a & _UINT32
        k0, k1 = (k0 + 0x9E3779B9) & _UINT32, (k1 + 0xBB67AE85) & _UINT32
    # The word as a signed integer, negative ones reflected.
    return np.float32(c0 if c0 < 1 << 31 else _UINT32 - c0) * np.float32(4.6566127342e-10)


def uniform_above_zero(seed: int, pos: int) -> np.float32:
    """`tl_rand32(seed, pos, includes_zero=False)` of vLLM's gumbel.py."""
    return max(philox_uniform(seed, pos), np.float32(4.6566127342e-10))


def max_and_sumexp(logits: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`_compute_max_and_sumexp` of each block of a row: [n] -> [num_blocks] twice."""
    blocks = in_blocks(logits, block_size, -np.inf)
    maxes = np.fmax.reduce(blocks, axis=-1)
    with np.errstate(invalid="ignore"):
        sumexps = np.exp(blocks - maxes[:, None]).sum(axis=-1)
    return maxes, np.where(maxes > -np.inf, sumexps, np.float32(0.0))


@dataclass
class RowStats:
    """Log-sum-exps and log-probabilities of one model's rows of logits, from the statistics of their blocks."""

    maxes: Tensor  # [num_logits, num_blocks] float32
    sumexps: Tensor  # [num_logits, num_blocks] float32
    num_blocks: int
    padded_num_blocks: int

    def logsumexp(self, row: int) -> np.float32:
        """`_compute_global_logsumexp`."""
        maxes = in_blocks(self.maxes[row, : self.num_blocks].numpy(), self.padded_num_blocks, -np.inf)[0]
        sumexps = in_blocks(self.sumexps[row, : self.num_blocks].numpy(), self.padded_num_blocks, 0.0)[0]
        global_max = np.fmax.reduce(maxes)
        with np.errstate(invalid="ignore", divide="ignore"):
            return global_max + np.log((sumexps * np.exp(maxes - global_max)).sum())

    def logprob(self, row: int, logit: np.float32) -> np.float32:
        return logit - self.logsumexp(row)


def scalar(element: Tensor) -> np.float32:
    """One element, in float32."""
    return np.float32(float(element))


@stands_for("spec_decode.rejection_sampler_utils._compute_local_logits_stats_kernel")
def compute_local_logits_stats(
    grid: Grid,
    target_local_argmax_ptr: Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    num_speculative_steps: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
) -> None:
    """`_compute_local_logits_stats_kernel`: for each row of logits and block of the vocabulary, the target's argmax
    and maximum (temperature 0), or maximum and sum of exponentials, target's and, with its logits, the draft's. Rows
    of bonus tokens are not touched.
    """
    argmaxes, maxes = target_local_argmax_ptr.numpy(), target_local_max_ptr.numpy()
    sumexps = target_local_sumexp_ptr.numpy()
    draft_maxes, draft_sumexps = draft_local_max_ptr.numpy(), draft_local_sumexp_ptr.numpy()
    steps = expanded_local_pos_ptr[: grid[0]].tolist()
    for row, req_idx in enumerate(expanded_idx_mapping_ptr[: grid[0]].tolist()):
        if steps[row] >= num_speculative_steps:
            continue
        temperature = scalar(temp_ptr[req_idx])
        target_logits = floats(target_logits_ptr[row, :vocab_size])
        if temperature == 0.0:
            argmaxes[row], maxes[row] = block_argmax(target_logits, BLOCK_SIZE)
            continue
        maxes[row], sumexps[row] = max_and_sumexp(target_logits, BLOCK_SIZE)
        if HAS_DRAFT_LOGITS:
            draft_logits = floats(draft_logits_ptr[req_idx, steps[row], :vocab_size]) / temperature
            draft_maxes[row], draft_sumexps[row] = max_and_sumexp(draft_logits, BLOCK_SIZE)


@stands_for("spec_decode.rejection_sampler_utils._compute_cumulative_log_p_kernel")
def compute_cumulative_log_p(
    grid: Grid,
    cumulative_log_p_ptr: Tensor,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_sampled_ptr: Tensor,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
) -> None:
    """`_compute_cumulative_log_p_kernel` (block verification): for each draft, the log of the joint ratio of target
    to draft up to it, kept at or below 0; a placeholder carries the last one on. Greedy requests are not touched.
    """
    starts, drafts = cu_num_logits_ptr.tolist(), draft_sampled_ptr.tolist()
    target = RowStats(target_local_max_ptr, target_local_sumexp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS)
    draft = RowStats(draft_local_max_ptr, draft_local_sumexp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS)
    for i, req_idx in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        temperature, log_p = scalar(temp_ptr[req_idx]), np.float32(0.0)
        if temperature == 0.0:
            continue
        for step, row in enumerate(range(starts[i], starts[i + 1] - 1)):
            token = drafts[row + 1]
            if token >= 0:
                log_ratio = target.logprob(row, scalar(target_logits_ptr[row, token]))
                if HAS_DRAFT_LOGITS:
                    log_ratio -= draft.logprob(row, scalar(draft_logits_ptr[req_idx, step, token]) / temperature)
                log_p = np.fmin(log_p + log_ratio, np.float32(0.0))
            cumulative_log_p_ptr[row] = float(log_p)


@stands_for("spec_decode.rejection_sampler_utils._compute_local_residual_mass_kernel")
def compute_local_residual_mass(
    grid: Grid,
    local_residual_mass_ptr: Tensor,
    local_residual_mass_stride: int,
    cumulative_log_p_ptr: Tensor,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_logits_ptr: Tensor,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    draft_sampled_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    num_speculative_steps: int,
    vocab_num_blocks: int,
    BLOCK_SIZE: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
) -> None:
    """`_compute_local_residual_mass_kernel` (block verification): each block's part of sum(max(p * target - draft,
    0)), p being the joint ratio before the row. Only for a sampled request's second draft on; placeholders are left
    alone.
    """
    steps, drafts = expanded_local_pos_ptr.tolist(), draft_sampled_ptr.tolist()
    target = RowStats(target_local_max_ptr, target_local_sumexp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS)
    draft = RowStats(draft_local_max_ptr, draft_local_sumexp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS)
    for row, req_idx in enumerate(expanded_idx_mapping_ptr[: grid[0] - 1].tolist()):
        if steps[row] == 0 or steps[row] >= num_speculative_steps or drafts[row + 1] < 0:
            continue
        temperature = scalar(temp_ptr[req_idx])
        if temperature == 0.0:
            continue
        target_probs = np.exp(floats(target_logits_ptr[row, :vocab_size]) - target.logsumexp(row))
        draft_logits = floats(draft_logits_ptr[req_idx, steps[row], :vocab_size]) / temperature
        draft_probs = np.exp(draft_logits - draft.logsumexp(row))
        joint_ratio = np.exp(scalar(cumulative_log_p_ptr[row - 1]))
        excess = np.fmax(joint_ratio * target_probs - draft_probs, np.float32(0.0))
        local_residual_mass_ptr[row].numpy()[:] = in_blocks(excess, BLOCK_SIZE, 0.0).sum(axis=-1)


@stands_for("spec_decode.rejection_sampler_utils._rejection_kernel")
def reject(
    grid: Grid,
    sampled_ptr: Tensor,
    sampled_stride: int,
    rejected_steps_ptr: Tensor,
    target_rejected_logsumexp_ptr: Tensor,
    draft_rejected_logsumexp_ptr: Tensor,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_local_argmax_ptr: Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: Tensor,
    target_local_sumexp_stride: int,
    draft_sampled_ptr: Tensor,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: Tensor,
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    temp_ptr: Tensor,
    seed_ptr: Tensor,
    pos_ptr: Tensor,
    synthetic_conditional_rates_ptr: Tensor | None,
    cumulative_log_p_ptr: Tensor | None,
    local_residual_mass_ptr: Tensor | None,
    local_residual_mass_stride: int,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    SYNTHETIC_MODE: bool,
    USE_BLOCK_VERIFICATION: bool,
) -> None:
    """`_rejection_kernel`: per request, the drafts up to the one verification ends at, which is stored too (at
    temperature 0 the target's argmax in its place), the number accepted, and the log-sum-exps of the last row looked
    at, or with block verification of the rejected one (0 at temperature 0 and where there is no such row). A -1 draft
    is a placeholder, always rejected.
    """
    sampled, starts, drafts = sampled_ptr.numpy(), cu_num_logits_ptr.tolist(), draft_sampled_ptr.tolist()
    argmaxes, maxes = target_local_argmax_ptr.numpy(), target_local_max_ptr.numpy()
    target = RowStats(target_local_max_ptr, target_local_sumexp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS)
    draft = RowStats(draft_local_max_ptr, draft_local_sumexp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS)

    for i, req_idx in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        seed, temperature = int(seed_ptr[req_idx]), scalar(temp_ptr[req_idx])
        rows = range(starts[i], starts[i + 1] - 1)
        num_accepted = 0
        target_lse = draft_lse = np.float32(0.0)
        for step, row in enumerate(rows):
            token = drafts[row + 1]
            if temperature != 0.0 and token < 0:
                break
            u = uniform_above_zero(seed, int(pos_ptr[row]))
            meets_rate = SYNTHETIC_MODE and u < scalar(synthetic_conditional_rates_ptr[step])
            if temperature == 0.0:
                block = np.fmax(maxes[row, :vocab_num_blocks], -np.inf).argmax()
                target_token = int(argmaxes[row, block])
                accepted = token >= 0 and (meets_rate if SYNTHETIC_MODE else target_token == token)
                sampled[i, step] = token if accepted else target_token
            elif USE_BLOCK_VERIFICATION:
                # The whole block is looked at; the last draft that passes takes those before it with it.
                sampled[i, step] = token
                joint_ratio = np.exp(scalar(cumulative_log_p_ptr[row]))
                next_token = drafts[row + 2] if row + 1 < rows.stop else -1
                threshold = joint_ratio
                if next_token >= 0:
                    if HAS_DRAFT_LOGITS:
                        partials = local_residual_mass_ptr[row + 1, :vocab_num_blocks].numpy()
                        mass = in_blocks(partials, PADDED_VOCAB_NUM_BLOCKS, 0.0).sum()
                    else:
                        logprob = target.logprob(row + 1, scalar(target_logits_ptr[row + 1, next_token]))
                        mass = joint_ratio * (np.float32(1.0) - np.exp(logprob))
                    denominator = mass + np.float32(1.0) - joint_ratio
                    threshold = mass / denominator if denominator > 0.0 else np.float32(1.0)
                if u <= threshold:
                    num_accepted = step + 1
                continue
            else:
                target_lse = target.logsumexp(row)
                target_logprob, draft_logprob = scalar(target_logits_ptr[row, token]) - target_lse, np.float32(0.0)
                if HAS_DRAFT_LOGITS:
                    draft_lse = draft.logsumexp(row)
                    draft_logprob = scalar(draft_logits_ptr[req_idx, step, token]) / temperature - draft_lse
                accepted = meets_rate if SYNTHETIC_MODE else target_logprob > np.log(u) + draft_logprob
                sampled[i, step] = token
            if not accepted:
                break
            num_accepted += 1
        if USE_BLOCK_VERIFICATION and temperature != 0.0 and num_accepted < len(rows):
            target_lse = target.logsumexp(rows[num_accepted])
            if HAS_DRAFT_LOGITS:
                draft_lse = draft.logsumexp(rows[num_accepted])
        rejected_steps_ptr[i] = num_accepted
        target_rejected_logsumexp_ptr[i] = float(target_lse)
        draft_rejected_logsumexp_ptr[i] = float(draft_lse)


@stands_for("spec_decode.rejection_sampler_utils._resample_kernel")
def resample(
    grid: Grid,
    resampled_local_argmax_ptr: Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: Tensor,
    resampled_local_max_stride: int,
    target_logits_ptr: Tensor,
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: Tensor,
    draft_logits_ptr: Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: Tensor,
    rejected_step_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    draft_sampled_ptr: Tensor,
    temp_ptr: Tensor,
    seed_ptr: Tensor,
    pos_ptr: Tensor,
    cumulative_log_p_ptr: Tensor | None,
    contexts_ptr: Tensor | None,
    contexts_stride: int,
    watermarking_ptr: Tensor | None,
    watermarking_skip_mask_ptr: Tensor | None,
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> object:
    """`_resample_kernel`: each block's Gumbel-max draw of the token after the accepted drafts, from the target's
    distribution (bonus token, placeholder draft), or from what the draft's leaves of it. A greedy request's rejection
    is not touched: its token is known. Watermarked sampling is not covered.

    With draft logits the kernel itself fails in the interpreter, which has no libdevice, and so no `log1p`.
    """
    if WATERMARK:
        return NotImplemented
    starts, rejected_steps = cu_num_logits_ptr.tolist(), rejected_step_ptr.tolist()
    local_argmax, local_max = resampled_local_argmax_ptr.numpy(), resampled_local_max_ptr.numpy()
    for i in range(grid[0]):
        step = rejected_steps[i]
        row, is_bonus = starts[i] + step, starts[i] + step == starts[i + 1] - 1
        req_idx = int(expanded_idx_mapping_ptr[row])
        temperature = scalar(temp_ptr[req_idx]) if req_idx >= 0 else np.float32(0.0)
        if temperature == 0.0 and not is_bonus:
            continue
        logits = floats(target_logits_ptr[row, :vocab_size])
        rejected_draft = -1 if is_bonus else int(draft_sampled_ptr[row + 1])
        if rejected_draft >= 0:
            if HAS_DRAFT_LOGITS:
                draft_logits = floats(draft_logits_ptr[req_idx, step, :vocab_size]) / temperature
                target_logprobs = logits - scalar(target_rejected_logsumexp_ptr[i])
                if USE_BLOCK_VERIFICATION:
                    target_logprobs += scalar(cumulative_log_p_ptr[row - 1]) if step > 0 else np.float32(0.0)
                logits = residual(target_logprobs, draft_logits - scalar(draft_rejected_logsumexp_ptr[i]))
            else:
                logits = logits.copy()
                logits[rejected_draft] = -np.inf
        if USE_FP64:
            logits = logits.astype(np.float64)
        if temperature != 0.0:
            logits = logits + gumbel_noise(int(seed_ptr[req_idx]), int(pos_ptr[row]), vocab_size, USE_FP64)
        local_argmax[i], local_max[i] = block_argmax(logits, BLOCK_SIZE)
    return None


def residual(target_logprobs: np.ndarray, draft_logprobs: np.ndarray) -> np.ndarray:
    """log(max(p - q, 0)) from log(p) and log(q), in the kernel's stable form: log(p) + log1p(-q / p)."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratio = np.exp(draft_logprobs - target_logprobs)
        return np.where(ratio < 1.0, target_logprobs + np.log1p(-ratio), np.float32(-np.inf))


@stands_for("spec_decode.rejection_sampler_utils._insert_resampled_kernel")
def insert_resampled(
    grid: Grid,
    sampled_ptr: Tensor,
    sampled_stride: int,
    num_sampled_ptr: Tensor,
    resampled_local_argmax_ptr: Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: Tensor,
    resampled_local_max_stride: int,
    resample_num_blocks: int,
    cu_num_logits_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    temp_ptr: Tensor,
    PADDED_RESAMPLE_NUM_BLOCKS: int,
) -> None:
    """`_insert_resampled_kernel`: put the best of the blocks' draws behind the accepted drafts (a greedy rejection's
    token is there already), and count it.
    """
    sampled, starts, num_sampled = sampled_ptr.numpy(), cu_num_logits_ptr.tolist(), num_sampled_ptr.numpy()
    local_argmax, local_max = resampled_local_argmax_ptr.numpy(), resampled_local_max_ptr.numpy()
    for i, n in enumerate(num_sampled[: grid[0]].tolist()):
        row = starts[i] + n
        num_sampled[i] = n + 1
        if float(temp_ptr[int(expanded_idx_mapping_ptr[row])]) != 0.0 or row == starts[i + 1] - 1:
            block = np.fmax(local_max[i, :resample_num_blocks], -np.inf).argmax()
            sampled[i, n] = local_argmax[i, block]
