"""Operators and helpers that tell which tokens a pass reads, and where their keys and values lie."""

from typing import Any

import torch

from vllm_easyspec.ops.registry import operator


@operator(
    "advance_draft_inputs(Tensor sampled, Tensor(a!) positions, Tensor live, Tensor block_table, Tensor(b!) input_ids, "
    "Tensor(c!) query_positions, Tensor(d!) seq_lens, Tensor(e!) slots, int block_size, int num_blocks, int max_len) "
    "-> ()"
)
def advance_draft_inputs(
    sampled: torch.Tensor,
    positions: torch.Tensor,
    live: torch.Tensor,
    block_table: torch.Tensor,
    input_ids: torch.Tensor,
    query_positions: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    num_blocks: int,
    max_len: int,
) -> None:
    """The inputs of the next draft step of all local layers, from the last step's drafts, in one launch and in place.

    Read: sampled `[rows] int64` of any stride, the drafts; live `[rows] bool`, rows whose K/V is written; block_table
    `[at least rows, width] int32`, its rows contiguous; block_size; num_blocks, pages of a layer; max_len, the
    drafter's context.

    Read and written: positions `[rows] int64`, of the tokens read last, each advanced by one, also past `max_len`. A
    negative position marks a row that pads the batch; it becomes -1.

    Written: input_ids `[rows] int64`, the drafts (0 in padding rows); and for `layers` layers one after another, in
    contiguous tensors of `layers * rows` elements of which a smaller group takes a prefix: query_positions `int64`,
    clamped to `max_len - 1` (0 in padding rows); seq_lens `int32`, one more than that (so that no kernel meets an empty
    sequence); slots `int64`, shifted by `num_blocks * block_size` a layer, and -1 for padding rows, rows that are not
    live and positions past `max_len`.

    Raises RuntimeError (native only) for another dtype, size or layout.
    """
    rows = positions.shape[0]
    if rows == 0:
        return
    padding = positions < 0
    positions.add_(~padding)
    query = positions.clamp(min=0, max=max_len - 1)
    written = live & ~padding & (positions < max_len)
    of_row = torch.arange(rows, device=query.device)
    own = torch.where(written, slots_of(block_table, of_row, query, block_size), -1)
    input_ids.copy_(sampled.masked_fill(padding, 0))
    query_positions.view(-1, rows).copy_(query)
    seq_lens.view(-1, rows).copy_(query + 1)
    slots.copy_(shift_slots(own, slots.numel() // rows, num_blocks * block_size).view_as(slots))


def _fake_calibration_inputs(*arguments: Any) -> tuple[torch.Tensor, ...]:
    of_req, starts = arguments[7], arguments[10]
    reqs = starts.shape[0] - 1
    of_rows = (torch.empty_like(of_req) for _ in range(3))
    return (*of_rows, starts.new_empty(reqs), of_req.new_empty(reqs), of_req.new_empty(reqs))


@operator(
    "calibration_inputs(Tensor read, Tensor query_starts, Tensor start_positions, Tensor num_valid, Tensor sampled, "
    "Tensor newest, Tensor block_table, Tensor of_req, Tensor offset, Tensor known, Tensor starts, int block_size, "
    "int max_len, int vocab_size, bool write) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_calibration_inputs,
)
def calibration_inputs(
    read: torch.Tensor,
    query_starts: torch.Tensor,
    start_positions: torch.Tensor,
    num_valid: torch.Tensor,
    sampled: torch.Tensor,
    newest: torch.Tensor,
    block_table: torch.Tensor,
    of_req: torch.Tensor,
    offset: torch.Tensor,
    known: torch.Tensor,
    starts: torch.Tensor,
    block_size: int,
    max_len: int,
    vocab_size: int,
    write: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of a calibration pass, from what the target read and how much of it is kept.

    read: `[tokens] int32`, what the target read; query_starts, start_positions, num_valid, newest: `[reqs] int64`;
    sampled: `[reqs] bool`; block_table: `[at least reqs, width] int32`, its rows contiguous (these as in `DraftBatch`);
    of_req, offset: `[rows] int64`, known: `[reqs] int64`, starts: `[reqs + 1] int32` (these as in
    `CalibrationLayout`); max_len: the drafter's context; write: False for a batch that owns no pages.

    Returns input_ids, positions (clamped to `max_len - 1`) and slots (-1 for rows past the newest token and positions
    past `max_len`), `[rows] int64`; seq_lens `[reqs] int32`, up to the last row, padding or not; and newest_rows and
    newest_positions `[reqs] int64`, the row and position of each request's newest token.

    Raises RuntimeError (native only) for another dtype, size or layout.
    """
    num_tokens = num_valid - known + sampled
    source = offset + known[of_req]
    ids = read[(query_starts[of_req] + source).clamp_(max=read.shape[0] - 1)].long()
    ids = torch.where(source == num_valid[of_req], newest[of_req], ids).clamp_(0, vocab_size - 1)
    first = start_positions + known
    positions = first[of_req] + offset
    slots = slots_of(block_table, of_req, positions, block_size)
    written = (offset < num_tokens[of_req]) & (positions < max_len) & write
    return (
        ids,
        positions.clamp(max=max_len - 1),
        torch.where(written, slots, -1),
        first.int() + starts.diff(),
        (starts[:-1] + num_tokens - 1).clamp_(min=0),  # a row that a graph adds has no token
        first + num_tokens - 1,
    )


def slots_of(block_table: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Cache slots `int64` of positions of the requests `rows`; a position past the table takes its last block."""
    columns = (positions // block_size).clamp(max=block_table.shape[1] - 1)
    return block_table[rows, columns].long() * block_size + positions % block_size


def shift_slots(slots: torch.Tensor, num_layers: int, layer_stride: int) -> torch.Tensor:
    """Cache slots of `num_layers` layers, one after another: `[tokens] int64` to `[num_layers * tokens] int64`.

    Padding stays `-1`: kernels skip only negative slots, and a shifted `-1` would be a live slot of the layer before.
    layer_stride: slots from one layer's pages to the next.
    """
    shifts = torch.arange(num_layers, device=slots.device).unsqueeze(1) * layer_stride
    return torch.where(slots < 0, -1, slots + shifts).view(-1)


def shift_block_table(block_table: torch.Tensor, num_layers: int, num_blocks: int) -> torch.Tensor:
    """Block tables of `num_layers` layers, one after another: `[reqs, width]` to `[num_layers * reqs, width]` int32."""
    shifts = torch.arange(num_layers, device=block_table.device, dtype=block_table.dtype) * num_blocks
    return (block_table + shifts[:, None, None]).view(-1, block_table.shape[1])
