"""`DraftBatch`: everything that a round of drafting needs from vLLM, converted once, frozen."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch


@dataclass(frozen=True)
class DraftBatch:
    """One engine step after the target's forward pass and sampling.

    A request is *prefilling* while the target reads tokens that it was given: the prompt, and after a preemption also
    the request's earlier output. Otherwise it is *decoding*: its step held the token sampled in the last round, for
    which the drafter has precise K/V already, followed by drafts.
    """

    num_reqs: int
    num_drafts: int  # K of this round, 0 included
    idx_mapping: torch.Tensor  # [reqs] int64: the request's index in vLLM's request state; -1 in a dummy batch
    input_ids: torch.Tensor  # [tokens] int32: what the target just read, rejected drafts included
    query_starts: torch.Tensor  # [reqs] int64: the request's first token in input_ids
    start_positions: torch.Tensor  # [reqs] int64: the position of that token
    num_valid: torch.Tensor  # [reqs] int64: tokens of the request that are kept, all but rejected drafts
    sampled: torch.Tensor  # [reqs] bool: the target sampled a token; false in the middle of a chunked prompt
    newest: torch.Tensor  # [reqs] int64: that token
    block_table: torch.Tensor  # [reqs, width] int32
    query_lens: np.ndarray  # [reqs] int32, host: tokens that the scheduler gave it; adaptive verification reads fewer
    prefilling: np.ndarray  # [reqs] bool, host
    seq_lens_bound: np.ndarray  # [reqs] int32, host: upper bound on sequence lengths, this step's tokens included
    dummy: bool  # warm-up: requests own no pages

    @classmethod
    def from_vllm(
        cls,
        batch: InputBatch,
        num_rejected: torch.Tensor,
        num_sampled: torch.Tensor,
        last_sampled: torch.Tensor,
        block_table: torch.Tensor,
        num_drafts: int,
        dummy: bool,
    ) -> "DraftBatch":
        """num_rejected, num_sampled: `[reqs]`; last_sampled: `[max_reqs, 1]`, by index in vLLM's request state."""
        reqs = batch.num_reqs
        starts = batch.query_start_loc[: reqs + 1].long()
        idx_mapping = batch.idx_mapping[:reqs]
        return cls(
            num_reqs=reqs,
            num_drafts=num_drafts,
            idx_mapping=torch.full_like(idx_mapping, -1) if dummy else idx_mapping,
            input_ids=batch.input_ids,
            query_starts=starts[:-1],
            start_positions=batch.positions[starts[:-1]],
            num_valid=starts.diff() - num_rejected[:reqs].long(),
            sampled=num_sampled[:reqs] > 0,
            newest=last_sampled.view(-1)[idx_mapping].long(),
            block_table=block_table,
            query_lens=batch.num_scheduled_tokens[:reqs],
            prefilling=batch.is_prefilling_np[:reqs],
            seq_lens_bound=batch.seq_lens_cpu_upper_bound.numpy()[:reqs],
            dummy=dummy,
        )


@dataclass(frozen=True)
class DraftBounds:
    """Limits of a round."""

    max_drafts: int  # K, the configured one
    max_len: int  # positions that the drafter may hold, `[0, max_len)`
    # Graphs also serve requests beyond `max_len`: where the target's context is longer than the drafter's, a request
    # may go on beyond the latter, and must not slow the others down.
    graphs_test_room: bool

    def has_room(self, batch: DraftBatch) -> bool:
        """Whether the host can tell that no request reaches `max_len` in this round."""
        return self.max_seq_len(batch) < self.max_len

    def max_seq_len(self, batch: DraftBatch) -> int:
        """An upper bound on the sequence lengths at the end of the round."""
        return int(batch.seq_lens_bound.max()) + 1 + self.max_drafts
