"""Plain implementations of the kernels that keep the batch's state: block tables, staged writes, inputs, and what a
step's sampled tokens change. `plain` lists the rules for implementations.
"""

import numpy as np
import torch

from .plain import at_address, flat, ranges, stands_for

Grid = tuple[int, ...]
Tensor = torch.Tensor


@stands_for("buffer_utils._apply_write_kernel")
def apply_write(
    grid: Grid,
    output_ptr: Tensor,
    output_stride: Tensor | int,
    write_indices_ptr: Tensor,
    write_starts_ptr: Tensor,
    write_contents_ptr: Tensor,
    write_cu_lens_ptr: Tensor,
    write_group_ids_ptr: Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """`_apply_write_kernel`: each staged write, a run of elements from (row, start) on. With MULTI_GROUP the output
    is an array of addresses of int32 tables and the stride an array, both indexed by the write's group.
    """
    contents, begin = write_contents_ptr.numpy(), 0
    for i in range(grid[0]):
        row, start, end = int(write_indices_ptr[i]), int(write_starts_ptr[i]), int(write_cu_lens_ptr[i])
        if MULTI_GROUP:
            group = int(write_group_ids_ptr[i])
            first = row * int(output_stride[group]) + start
            at_address(int(output_ptr[group]) + 4 * first, np.int32, (end - begin,))[:] = contents[begin:end]
        else:
            first = row * output_stride + start
            flat(output_ptr)[first : first + end - begin] = contents[begin:end]
        begin = end


@stands_for("block_table._gather_block_tables_kernel")
def gather_block_tables(
    grid: Grid,
    batch_idx_to_req_idx: Tensor,
    src_block_table_ptrs: Tensor,
    dst_block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    num_blocks_ptr: Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """`_gather_block_tables_kernel`: the batch's rows of each group's block table, up to each request's number of
    blocks (what lies beyond stays); rows [num_reqs, grid[1]) are zeroed.
    """
    num_groups, num_rows = grid
    req_indices = batch_idx_to_req_idx[: min(num_reqs, num_rows)].tolist()
    num_blocks = flat(num_blocks_ptr)
    for group in range(num_groups):
        stride = int(block_table_strides[group])
        src = at_address(src_block_table_ptrs[group], np.int32, (max(req_indices, default=-1) + 1, stride))
        dst = at_address(dst_block_table_ptrs[group], np.int32, (num_rows, stride))
        for row, req_idx in enumerate(req_indices):
            n = num_blocks[group * num_blocks_stride + req_idx]
            dst[row, :n] = src[req_idx, :n]
        dst[num_reqs:] = 0


@stands_for("block_table._compute_slot_mappings_kernel")
def compute_slot_mappings(
    grid: Grid,
    max_num_tokens: int,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    pos: Tensor,
    block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    block_sizes: Tensor,
    slot_mapping_enabled: Tensor,
    dcp_sharded: Tensor,
    slot_mappings_ptr: Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """`_compute_slot_mappings_kernel`: the cache slot of every token in [query_start_loc[0],
    query_start_loc[num_reqs]), PAD_ID in [query_start_loc[num_reqs], max_num_tokens). PAD_ID too for the tokens of a
    row without a request (idx_mapping < 0), of a group without slots, and of another context-parallel rank.
    """
    num_groups, num_reqs = grid[0], grid[1] - 1
    starts = query_start_loc.numpy()[: num_reqs + 1]
    tokens = slice(starts[0], starts[num_reqs])
    req_idx = np.repeat(idx_mapping.numpy()[:num_reqs], np.diff(starts))
    is_real = req_idx >= 0
    req_idx = np.where(is_real, req_idx, 0)
    positions = np.where(is_real, pos.numpy()[tokens], 0)
    num_rows = int(req_idx.max(initial=-1)) + 1

    for group in range(num_groups):
        slots = slot_mappings_ptr[group].numpy()
        slots[starts[num_reqs] : max_num_tokens] = PAD_ID
        if not slot_mapping_enabled[group] or not is_real.any():
            slots[tokens] = PAD_ID
            continue
        block_size = int(block_sizes[group])
        local, is_local = positions, is_real
        if CP_SIZE != 1 and dcp_sharded[group]:
            virtual_block, offset = np.divmod(positions, block_size * CP_SIZE)
            is_local = is_real & (offset // CP_INTERLEAVE % CP_SIZE == cp_rank)
            local_offset = offset // (CP_INTERLEAVE * CP_SIZE) * CP_INTERLEAVE + offset % CP_INTERLEAVE
            local = virtual_block * block_size + local_offset
        table = at_address(block_table_ptrs[group], np.int32, (num_rows, int(block_table_strides[group])))
        block, offset = np.divmod(local, block_size)
        slots[tokens] = np.where(is_local, table[req_idx, block].astype(np.int64) * block_size + offset, PAD_ID)


@stands_for("input_batch._prepare_prefill_inputs_kernel")
def prepare_prefill_inputs(
    grid: Grid,
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """`_prepare_prefill_inputs_kernel` (input_batch): for requests still in their prefill, the step's input tokens,
    and the num_lookahead tokens that follow them (0 past the prefill's end).
    """
    input_ids, starts = input_ids_ptr.numpy(), query_start_loc_ptr.tolist()
    for i, req_idx in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        prefill_len, first = int(prefill_lens_ptr[req_idx]), int(num_computed_tokens_ptr[req_idx])
        if first >= prefill_len:
            continue
        tokens = all_token_ids_ptr[req_idx].numpy()
        last = first + starts[i + 1] - starts[i]
        input_ids[starts[i] : starts[i + 1]] = tokens[first:last]
        following = tokens[last : min(last + num_lookahead, prefill_len)]
        lookahead = next_prefill_tokens_ptr[:, req_idx].numpy()
        lookahead[: len(following)] = following
        lookahead[len(following) : num_lookahead] = 0


@stands_for("input_batch._prepare_pos_seq_lens_kernel")
def prepare_pos_seq_lens(
    grid: Grid,
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """`_prepare_pos_seq_lens_kernel`: each token's position, and the length of each sequence after the step; seq_lens
    is zeroed in [num_reqs, max_num_reqs).
    """
    num_reqs = grid[0] - 1
    starts = query_start_loc_ptr.numpy()[: num_reqs + 1]
    query_lens = np.diff(starts)
    num_computed = num_computed_tokens_ptr.numpy()[idx_mapping_ptr.numpy()[:num_reqs]]
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = num_computed + query_lens
    seq_lens[num_reqs:max_num_reqs] = 0
    pos_ptr.numpy()[starts[0] : starts[num_reqs]] = ranges(num_computed, query_lens)


@stands_for("input_batch._combine_sampled_and_draft_tokens_kernel")
def combine_sampled_and_draft_tokens(
    grid: Grid,
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """`_combine_sampled_and_draft_tokens_kernel`: the tokens whose logits are wanted (the last of each query), and,
    for requests past their prefill, the last sampled token and the draft tokens as their inputs.
    """
    input_ids, logits_indices = input_ids_ptr.numpy(), logits_indices_ptr.numpy()
    last_sampled, query_starts = flat(last_sampled_tokens_ptr), query_start_loc_ptr.tolist()
    logits_starts, seq_lens = cu_num_logits_ptr.tolist(), seq_lens_ptr[: grid[0]].tolist()
    for i, req_idx in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        query_end, num_logits = query_starts[i + 1], logits_starts[i + 1] - logits_starts[i]
        logits_indices[logits_starts[i] : logits_starts[i + 1]] = np.arange(query_end - num_logits, query_end)
        prefill_len = int(prefill_len_ptr[req_idx])
        if seq_lens[i] <= prefill_len:
            continue
        # The first of these tokens may still be the prompt's: it stays.
        if NUM_NEW_SAMPLED_TOKENS > 0 and seq_lens[i] - num_logits >= prefill_len:
            input_ids[query_end - num_logits] = last_sampled[req_idx]
        num_drafts = num_logits - NUM_NEW_SAMPLED_TOKENS
        if num_drafts > 0:
            input_ids[query_end - num_drafts : query_end] = draft_tokens_ptr[req_idx, :num_drafts].numpy()


@stands_for("input_batch._get_num_sampled_and_rejected_kernel")
def get_num_sampled_and_rejected(
    grid: Grid,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    seq_lens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    prefill_len_ptr: Tensor,
) -> None:
    """`_get_num_sampled_and_rejected_kernel`: nothing is sampled or rejected while a prefill is in chunks; otherwise
    what was not sampled was rejected.
    """
    n = grid[0]
    num_sampled = num_sampled_ptr.numpy()[:n]
    in_prefill = seq_lens_ptr.numpy()[:n] < prefill_len_ptr.numpy()[idx_mapping_ptr.numpy()[:n]]
    num_sampled[in_prefill] = 0
    num_logits = np.diff(cu_num_logits_ptr.numpy()[: n + 1])
    num_rejected_ptr.numpy()[:n] = np.where(in_prefill, 0, num_logits - num_sampled)


@stands_for("input_batch._post_update_kernel")
def post_update(
    grid: Grid,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
) -> None:
    """`_post_update_kernel`: append the sampled tokens to the requests' state and count them, and advance the number
    of computed tokens by the query less what was rejected. Rows with a negative index are skipped.
    """
    last_sampled, total_len = flat(last_sampled_tokens_ptr), total_len_ptr.numpy()
    num_computed, all_num_sampled = num_computed_tokens_ptr.numpy(), num_sampled_ptr.tolist()
    all_num_rejected = num_rejected_ptr.tolist()
    starts = query_start_loc_ptr.tolist() if query_start_loc_ptr is not None else [0] * (grid[0] + 1)
    for i, req_idx in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        if req_idx < 0:
            continue
        num_sampled = all_num_sampled[i]
        if num_sampled > 0:
            tokens, first = sampled_tokens_ptr[i, :num_sampled].numpy(), total_len[req_idx]
            all_token_ids_ptr[req_idx].numpy()[first : first + num_sampled] = tokens
            last_sampled[req_idx] = tokens[-1]
            total_len[req_idx] += num_sampled
            if output_bin_counts_ptr is not None:
                np.add.at(output_bin_counts_ptr[req_idx].numpy(), tokens, 1)
        num_computed[req_idx] += starts[i + 1] - starts[i] - all_num_rejected[i]


@stands_for("input_batch._post_update_num_computed_tokens_kernel")
def post_update_num_computed_tokens(
    grid: Grid, idx_mapping_ptr: Tensor, num_computed_tokens_ptr: Tensor, query_start_loc_ptr: Tensor
) -> None:
    """`_post_update_num_computed_tokens_kernel`: advance each request's number of computed tokens by its query."""
    query_lens = np.diff(query_start_loc_ptr.numpy()[: grid[0] + 1])
    np.add.at(num_computed_tokens_ptr.numpy(), idx_mapping_ptr.numpy()[: grid[0]], query_lens)


@stands_for("input_batch._expand_idx_mapping_kernel")
def expand_idx_mapping(
    grid: Grid,
    idx_mapping_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    BLOCK_SIZE: int,
) -> None:
    """`_expand_idx_mapping_kernel`: for each row of logits, its request and its place among the request's rows."""
    starts = cu_num_logits_ptr.numpy()[: grid[0] + 1]
    num_logits, rows = np.diff(starts), slice(starts[0], starts[grid[0]])
    expanded_idx_mapping_ptr.numpy()[rows] = np.repeat(idx_mapping_ptr.numpy()[: grid[0]], num_logits)
    expanded_local_pos_ptr.numpy()[rows] = ranges(np.zeros_like(num_logits), num_logits)


@stands_for("spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel")
def prepare_draft_prefill_inputs(
    grid: Grid,
    target_input_ids_ptr: Tensor,
    target_positions_ptr: Tensor,
    last_sampled_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    out_input_ids_ptr: Tensor,
    out_positions_ptr: Tensor,
    last_token_indices_ptr: Tensor,
    out_query_start_loc_ptr: Tensor,
    out_seq_lens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    num_rejected_ptr: Tensor,
    max_num_reqs: int,
    max_model_len: int,
    BLOCK_SIZE: int,
) -> None:
    """`_prepare_prefill_inputs_kernel` (standalone_ar): the drafter's first query of a round, one token longer than
    the target's: the accepted tokens, the correction token, zeros for rejected slots; positions stop at max_model_len
    - 1. Past the last request, query_start_loc (to max_num_reqs, inclusive) repeats the end, seq_lens and
    last_token_indices are zeroed.
    """
    num_reqs, last_sampled = grid[0], flat(last_sampled_ptr)
    target_ids, target_positions = target_input_ids_ptr.numpy(), target_positions_ptr.numpy()
    out_ids, out_positions = out_input_ids_ptr.numpy(), out_positions_ptr.numpy()
    last_indices, out_starts = last_token_indices_ptr.numpy(), out_query_start_loc_ptr.numpy()
    out_seq_lens = out_seq_lens_ptr.numpy()
    starts, seq_lens, num_rejected = query_start_loc_ptr.tolist(), seq_lens_ptr.tolist(), num_rejected_ptr.tolist()
    out_end = 0
    for i, req_idx in enumerate(idx_mapping_ptr[:num_reqs].tolist()):
        num_valid = starts[i + 1] - starts[i] - num_rejected[i]
        out_start, out_end = starts[i] + i, starts[i + 1] + i + 1
        out_ids[out_start:out_end] = 0
        out_ids[out_start : out_start + num_valid] = target_ids[starts[i] : starts[i] + num_valid]
        out_ids[out_start + num_valid] = last_sampled[req_idx]
        first = target_positions[starts[i]]
        out_positions[out_start:out_end] = np.minimum(np.arange(first, first + out_end - out_start), max_model_len - 1)
        last_indices[i] = out_start + num_valid
        out_starts[i] = out_start
        out_seq_lens[i] = min(seq_lens[i] + 1, max_model_len)
    out_starts[num_reqs : max_num_reqs + 1] = out_end
    out_seq_lens[num_reqs:max_num_reqs] = 0
    last_indices[num_reqs:max_num_reqs] = 0


@stands_for("spec_decode.rejection_sampler._gather_draft_sampled_kernel")
def gather_draft_sampled(
    grid: Grid,
    draft_sampled_ptr: Tensor,
    pos_ptr: Tensor,
    input_ids_ptr: Tensor,
    positions_ptr: Tensor,
    logits_indices_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    prefill_len_ptr: Tensor,
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    """`_gather_draft_sampled_kernel`: the token and the position of each row of logits; -1 for a draft whose step
    starts within the prefill, which can only be a placeholder.
    """
    tokens = logits_indices_ptr.numpy()[:num_logits]
    positions = positions_ptr.numpy()[tokens]
    local_pos = expanded_local_pos_ptr.numpy()[:num_logits]
    prefill_len = prefill_len_ptr.numpy()[expanded_idx_mapping_ptr.numpy()[:num_logits]]
    is_placeholder = (local_pos > 0) & (positions - local_pos < prefill_len)
    draft_sampled_ptr.numpy()[:num_logits] = np.where(is_placeholder, -1, input_ids_ptr.numpy()[tokens])
    pos_ptr.numpy()[:num_logits] = positions


@stands_for("spec_decode.rejection_sampler._flatten_sampled_kernel")
def flatten_sampled(
    grid: Grid,
    flat_sampled_ptr: Tensor,
    sampled_ptr: Tensor,
    sampled_stride: int,
    num_sampled_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
) -> None:
    """`_flatten_sampled_kernel`: each request's sampled tokens, from its first row of logits on."""
    flat_sampled, sampled, starts = flat_sampled_ptr.numpy(), sampled_ptr.numpy(), cu_num_logits_ptr.tolist()
    for i, n in enumerate(num_sampled_ptr[: grid[0]].tolist()):
        flat_sampled[starts[i] : starts[i] + n] = sampled[i, :n]


@stands_for("sample.prompt_logprob._prompt_logprobs_token_ids_kernel")
def prompt_logprobs_token_ids(
    grid: Grid,
    prompt_logprobs_token_ids_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """`_prompt_logprobs_token_ids_kernel`: for each token of the step, the token that follows it."""
    starts = query_start_loc_ptr.numpy()[: grid[0] + 1]
    query_lens, idx_mapping = np.diff(starts), idx_mapping_ptr.numpy()[: grid[0]]
    rows = np.repeat(idx_mapping, query_lens).astype(np.int64)
    positions = ranges(num_computed_tokens_ptr.numpy()[idx_mapping] + 1, query_lens)
    token_ids = flat(all_token_ids_ptr)[rows * all_token_ids_stride + positions]
    prompt_logprobs_token_ids_ptr.numpy()[starts[0] : starts[grid[0]]] = token_ids
