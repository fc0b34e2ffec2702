"""What the drafter leaves uncalibrated while K is 0 or with new weights, and calibrates before it drafts again.

Where the scheduler's table says K = 0, speculation does not pay off, and a drafter that read along would only slow the
target down. So a round of K = 0 is *paused*: nothing is calibrated, and the blocks that hold the round's tokens are
marked as uncalibrated. Before a later round drafts, the drafter reads what its requests have in marked blocks,
precisely.

New weights for the drafter mark all blocks, whatever K is.

Marks belong to blocks, not to requests: when prefix caching gives a block to another request, the mark still tells
whether the drafter has read it. Invariant: in a block without a mark every position that the target has computed is
precise. A superfluous mark only costs reading a block once more, so blocks that vLLM frees keep their marks until a
request that drafts gets them.

A round reads at most as many tokens as an engine step may hold. A request with more keeps marks and meanwhile drafts
from uncalibrated pages: the target tests these drafts like all others, and accepts few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_easyspec.batch import DraftBatch


@dataclass(frozen=True)
class Span:
    """Positions `begin` to `end - 1` of request `req` of a batch."""

    req: int
    begin: int
    end: int


class UncalibratedBlocks:
    """The marks of all cache blocks, and the host's knowledge of them."""

    def __init__(self, num_blocks: int, block_size: int, max_len: int, device: torch.device):
        """max_len: positions that the drafter may hold, `[0, max_len)`."""
        # The mark of block 0, vLLM's null block, has no meaning.
        self.marks = torch.zeros(num_blocks, dtype=torch.bool, device=device)
        self.block_size = block_size
        self.max_len = max_len
        self.any = False  # False: no block is marked; True: some may be
        self.up_to_date: set[str] = set()  # requests of the last round, none of whose blocks are marked

    def mark(self, batch: DraftBatch) -> None:
        """Mark the blocks of the tokens that the target has just computed. Never waits for the device."""
        self.any = True
        self.up_to_date.clear()
        self.marks[self._blocks_of_step(batch)] = True

    def mark_all(self) -> None:
        """Mark every block: what the drafter wrote is not what it would write now."""
        self.any = True
        self.up_to_date.clear()
        self.marks.fill_(True)

    def spans_to_calibrate(self, batch: DraftBatch, req_ids: Sequence[str], budget: int) -> list[Span]:
        """What must be read so that the batch's calibration finds precise pages, up to about `budget` tokens.

        Call `mark_calibrated` once it is read. Sets the marks of the round's own blocks to what they will be after the
        calibration. Waits for the device where the host can't tell that a request has no marked block.
        """
        computed = batch.seq_lens_bound - batch.query_lens  # exact while prefilling
        ask = any(
            computed[req] > 0 if batch.prefilling[req] else req_ids[req] not in self.up_to_date
            for req in range(batch.num_reqs)
        )
        spans, behind, budget = [], np.zeros(batch.num_reqs, dtype=bool), max(budget, self.block_size)
        for span in self._spans_behind(batch) if ask else ():
            end = span.end
            if end - span.begin > budget:
                behind[span.req] = True
                end = span.begin + budget // self.block_size * self.block_size
            if end > span.begin:
                spans.append(Span(span.req, span.begin, end))
                budget -= end - span.begin
        self.up_to_date = {req_ids[req] for req in np.flatnonzero(~behind)}
        blocks = self._blocks_of_step(batch)
        self.marks[blocks] = async_tensor_h2d(behind, self.marks.device).unsqueeze(1).expand_as(blocks)
        return spans

    def mark_calibrated(self, slots: torch.Tensor) -> None:
        """Remove the marks of the blocks of `slots` (`[tokens] int64`), those of all tokens of `spans_to_calibrate`."""
        self.marks[slots // self.block_size] = False

    def copied(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the marks of blocks that vLLM has copied. copies: from, to."""
        if self.any:
            sources, targets = async_tensor_h2d(np.array(copies, dtype=np.int64), self.marks.device).unbind(1)
            self.marks[targets] = self.marks[sources]

    def first_uncalibrated(self, block_table: torch.Tensor, last_positions: torch.Tensor) -> torch.Tensor:
        """The first position `[reqs] int64` in a marked block, up to `last_positions` (`[reqs] int64`); if there is
        none, the first position after the table. block_table: `[reqs, width] int32`."""
        firsts = torch.arange(block_table.shape[1], device=block_table.device) * self.block_size
        marked = self.marks[block_table.long()] & (firsts <= last_positions.unsqueeze(1))
        return torch.where(marked, firsts, block_table.shape[1] * self.block_size).amin(1)

    def _spans_behind(self, batch: DraftBatch) -> list[Span]:
        """For each request that is behind: from its first marked block on, what the target computed before this round,
        and a decoding request's first token, which the round before would have calibrated."""
        width = -(-int(batch.seq_lens_bound.max()) // self.block_size)
        first = self.first_uncalibrated(batch.block_table[:, :width], batch.start_positions)
        left = self.marks[1:].any().expand_as(first)
        begins, starts, any_left = torch.stack([first, batch.start_positions, left]).tolist()
        self.any = bool(any_left[0])
        ends = np.minimum(np.array(starts) + ~batch.prefilling, self.max_len).tolist()
        return [Span(req, begin, end) for req, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < end]

    def _blocks_of_step(self, batch: DraftBatch) -> torch.Tensor:
        """`[reqs, blocks] int64`: the blocks of what the target computed in this round, filled up with 0."""
        columns = torch.arange((int(batch.query_lens.max()) - 1) // self.block_size + 2, device=self.marks.device)
        columns = batch.start_positions.unsqueeze(1) // self.block_size + columns
        inside = columns * self.block_size < (batch.start_positions + batch.num_valid).unsqueeze(1)
        blocks = batch.block_table.gather(1, columns.clamp(max=batch.block_table.shape[1] - 1))
        return torch.where(inside, blocks, 0).long()
