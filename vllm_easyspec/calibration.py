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

    def plan(self, batch: DraftBatch) -> CalibrationStep:
        # A decoding request's first token was calibrated when it was sampled; a prefilling one may end in a new token.
        known = (~batch.prefilling).astype(np.int64)
        lens = batch.query_lens + 1 - known
        starts = np.concatenate([[0], np.cumsum(lens)])
        reqs = np.repeat(np.arange(batch.num_reqs), lens)
        offsets = np.arange(starts[-1]) - starts[:-1][reqs]
        layout = torch.from_numpy(np.stack([reqs, offsets, known[reqs]])).to(self.device, non_blocking=True)
        of_req, offset, skipped = layout.unbind(0)
        starts_cpu = torch.from_numpy(starts.astype(np.int32))
        known_of_req = torch.from_numpy(known).to(self.device, non_blocking=True)

        num_tokens = batch.num_valid - known_of_req + batch.sampled
        source = offset + skipped
        is_newest = source == batch.num_valid[of_req]
        read = batch.input_ids[(batch.query_starts[of_req] + source).clamp_(max=batch.input_ids.shape[0] - 1)]
        input_ids = torch.where(is_newest, batch.newest[of_req], read.long()).clamp_(0, self.vocab_size - 1)
        first_positions = batch.start_positions + known_of_req
        positions = first_positions[of_req] + offset
        live = offset < num_tokens[of_req]
        starts_device = starts_cpu.to(self.device, non_blocking=True)
        lens_device = starts_device.diff()
        sequences = Sequences(
            positions=positions.clamp(max=self.max_len - 1),
            slots=self.slots(batch, of_req, positions, live),
            query_start_loc=starts_device,
            query_start_loc_cpu=starts_cpu,
            seq_lens=first_positions.int() + lens_device,
            seq_lens_bound=torch.from_numpy(batch.seq_lens_bound.astype(np.int32) + 1),
            block_table=batch.block_table,
            max_query_len=int(lens.max()),
            max_seq_len=int(batch.seq_lens_bound.max()) + 1,
        )
        return CalibrationStep(
            input_ids=input_ids,
            sequences=sequences,
            newest_rows=starts_device[:-1] + num_tokens - 1,
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
