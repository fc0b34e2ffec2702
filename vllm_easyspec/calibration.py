"""Which positions of which request a round's calibration rewrites, and the pass that does it.

After the target's step a decoding request has `accepted + 1` tokens without precise K/V in the drafter's pages: the
accepted drafts, whose K/V is fuzzy or missing, and the newest token, which has none. A prefilling request has the
tokens that the target just read, and the newest one if its prompt is complete. One pass over exactly these leaves
every position up to the newest token precise, and the newest token's hidden state yields the round's first draft.

The host doesn't know how many drafts were rejected, and waiting for the number would stall the device. So a request
gets as many rows as it may need, and the rows past its newest token are padding: slot -1, result unused.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.drafter.paged_kv import Sequences


@dataclass(frozen=True)
class CalibrationLayout:
    """How a batch's requests lie in a calibration pass. Known on the host: it depends on nothing that was accepted."""

    of_req: torch.Tensor  # [rows] int64: the request of each row
    offset: torch.Tensor  # [rows] int64: the row's place in its request
    known: torch.Tensor  # [reqs] int64: leading tokens of the request whose K/V is precise already, 0 or 1
    starts: torch.Tensor  # [reqs + 1] int32
    starts_cpu: torch.Tensor  # the same on the host
    max_rows: int  # of one request


@dataclass(frozen=True)
class CalibrationStep:
    """A calibration pass, ready to run."""

    input_ids: torch.Tensor  # [rows] int64
    sequences: Sequences
    newest_rows: torch.Tensor  # [reqs] int64: the row of each request's newest token
    newest_positions: torch.Tensor  # [reqs] int64
    num_tokens: torch.Tensor  # [reqs] int64: rows that are not padding


class CalibrationScheduler:
    def __init__(self, vocab_size: int, max_len: int, block_size: int, device: torch.device):
        """max_len: positions that the drafter may hold, `[0, max_len)`; block_size: tokens a cache block."""
        self.vocab_size = vocab_size
        self.max_len = max_len
        self.block_size = block_size
        self.device = device

    def layout(self, query_lens: np.ndarray, prefilling: np.ndarray) -> CalibrationLayout:
        """query_lens: `[reqs]`, tokens that the target read; prefilling: `[reqs] bool`."""
        # A decoding request's first token was calibrated when it was sampled; a prefilling one may end in a new token.
        known = (~prefilling).astype(np.int64)
        lens = query_lens + 1 - known
        starts = np.concatenate([[0], np.cumsum(lens)])
        reqs = np.repeat(np.arange(len(lens)), lens)
        offsets = np.arange(starts[-1]) - starts[:-1][reqs]
        rows = torch.from_numpy(np.stack([reqs, offsets])).to(self.device, non_blocking=True)
        starts_cpu = torch.from_numpy(starts.astype(np.int32))
        return CalibrationLayout(
            of_req=rows[0],
            offset=rows[1],
            known=torch.from_numpy(known).to(self.device, non_blocking=True),
            starts=starts_cpu.to(self.device, non_blocking=True),
            starts_cpu=starts_cpu,
            max_rows=int(lens.max()),
        )

    def plan(self, batch: DraftBatch, layout: CalibrationLayout | None = None) -> CalibrationStep:
        """The pass for `batch`. With its layout given, nothing is copied from the host: a CUDA graph can record it."""
        layout = layout or self.layout(batch.query_lens, batch.prefilling)
        of_req, offset = layout.of_req, layout.offset
        num_tokens = batch.num_valid - layout.known + batch.sampled
        source = offset + layout.known[of_req]
        is_newest = source == batch.num_valid[of_req]
        read = batch.input_ids[(batch.query_starts[of_req] + source).clamp_(max=batch.input_ids.shape[0] - 1)]
        input_ids = torch.where(is_newest, batch.newest[of_req], read.long()).clamp_(0, self.vocab_size - 1)
        first_positions = batch.start_positions + layout.known
        positions = first_positions[of_req] + offset
        live = offset < num_tokens[of_req]
        sequences = Sequences(
            positions=positions.clamp(max=self.max_len - 1),
            slots=self.slots(batch, of_req, positions, live),
            query_start_loc=layout.starts,
            query_start_loc_cpu=layout.starts_cpu,
            seq_lens=first_positions.int() + layout.starts.diff(),
            seq_lens_bound=torch.from_numpy(batch.seq_lens_bound.astype(np.int32) + 1),
            block_table=batch.block_table,
            max_query_len=layout.max_rows,
            max_seq_len=int(batch.seq_lens_bound.max()) + 1,
        )
        return CalibrationStep(
            input_ids=input_ids,
            sequences=sequences,
            newest_rows=(layout.starts[:-1] + num_tokens - 1).clamp_(min=0),  # a row that a graph adds has no token
            newest_positions=first_positions + num_tokens - 1,
            num_tokens=num_tokens,
        )

    def slots(
        self, batch: DraftBatch, of_req: torch.Tensor, positions: torch.Tensor, live: torch.Tensor
    ) -> torch.Tensor:
        """Cache slots `[rows] int64` of positions of the requests `of_req`; -1 for padding and past `max_len`."""
        if batch.dummy:
            return torch.full_like(positions, -1)
        columns = (positions // self.block_size).clamp(max=batch.block_table.shape[1] - 1)
        slots = batch.block_table[of_req, columns].long() * self.block_size + positions % self.block_size
        return torch.where(live & (positions < self.max_len), slots, -1)

    def only(self, step: CalibrationStep, batch: DraftBatch, prefilling: bool) -> CalibrationStep:
        """The same rows, but writing K/V of the prefilling (or of the decoding) requests alone."""
        rows = np.diff(step.sequences.query_start_loc_cpu)
        chosen = torch.from_numpy(np.repeat(batch.prefilling == prefilling, rows)).to(self.device)
        slots = torch.where(chosen, step.sequences.slots, -1)
        return replace(step, sequences=replace(step.sequences, slots=slots))
