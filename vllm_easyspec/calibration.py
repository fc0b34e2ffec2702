"""Which positions of which request a round's calibration rewrites, and the inputs of that pass.

After the target's step a decoding request has `accepted + 1` tokens without precise K/V in the drafter's pages: the
accepted drafts, whose K/V is fuzzy or missing, and the newest token, which has none. A prefilling request has the
tokens that the target just read, and the newest one if its prompt is complete. One pass over exactly these tokens makes
every position up to the newest token precise, and the newest token's hidden state gives the round's first draft.

The host doesn't know how many drafts were rejected, and waiting for the number would stall the device. So the pass has
room for as many tokens of a request as it may need; those past its newest token are padding: slot -1, result unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.drafter.paged_kv import Sequences
from vllm_easyspec.ops import calibration_inputs, slots_of
from vllm_easyspec.uncalibrated import Span


@dataclass(frozen=True)
class CalibrationLayout:
    """Where each request's tokens are in a calibration pass, whatever the number of accepted drafts."""

    of_req: torch.Tensor  # [tokens] int64: the request of each token, padding included
    offset: torch.Tensor  # [tokens] int64: its index within the request
    num_calibrated: torch.Tensor  # [reqs] int64: first tokens whose K/V is precise already, 0 or 1
    starts: torch.Tensor  # [reqs + 1] int32
    starts_cpu: torch.Tensor  # the same on the host
    max_query_len: int  # of one request


@dataclass(frozen=True)
class CalibrationStep:
    """A calibration pass, ready to run."""

    input_ids: torch.Tensor  # [tokens] int64
    sequences: Sequences
    newest_indices: torch.Tensor  # [reqs] int64: index of each request's newest token among them
    newest_positions: torch.Tensor  # [reqs] int64


class CalibrationScheduler:
    """Decides which tokens of each request a round's calibration reads, and where their K/V goes.

    For a decoding request: the accepted drafts and the newest token. For a prefilling request: what the target has just
    read, and the newest token if the prompt is complete. For a request that paused rounds left behind: what
    `UncalibratedBlocks` says. It runs no pass and holds no state of any request.
    """

    def __init__(self, vocab_size: int, max_len: int, block_size: int, device: torch.device):
        """max_len: positions that the drafter may hold, `[0, max_len)`; block_size: tokens per cache block."""
        self.vocab_size = vocab_size
        self.max_len = max_len
        self.block_size = block_size
        self.device = device
        self._recent_layouts = lru_cache(maxsize=16)(self._layout)  # most rounds decode the same requests as the last

    def layout(self, query_lens: np.ndarray, prefilling: np.ndarray) -> CalibrationLayout:
        """The layout of a batch. query_lens: `[reqs]`, tokens that the target read; prefilling: `[reqs] bool`."""
        return self._recent_layouts(tuple(query_lens.tolist()), tuple(prefilling.tolist()))

    def _layout(self, query_lens: tuple[int, ...], prefilling: tuple[bool, ...]) -> CalibrationLayout:
        # A decoding request's first token was calibrated when it was sampled; a prefilling one may end in a new token.
        num_calibrated = 1 - np.array(prefilling, dtype=np.int64)
        lens = np.array(query_lens) + 1 - num_calibrated
        starts = np.concatenate([[0], np.cumsum(lens)])
        reqs = np.repeat(np.arange(len(lens)), lens)
        offsets = np.arange(starts[-1]) - starts[:-1][reqs]
        of_req, offset = async_tensor_h2d(np.stack([reqs, offsets]), self.device)
        starts_cpu = torch.from_numpy(starts.astype(np.int32))
        return CalibrationLayout(
            of_req=of_req,
            offset=offset,
            num_calibrated=async_tensor_h2d(num_calibrated, self.device),
            starts=async_tensor_h2d(starts_cpu, self.device),
            starts_cpu=starts_cpu,
            max_query_len=int(lens.max()),
        )

    def plan(self, batch: DraftBatch, layout: CalibrationLayout | None = None) -> CalibrationStep:
        """The pass for `batch`. If its layout is given, nothing is copied from the host: a CUDA graph can record it."""
        layout = layout or self.layout(batch.query_lens, batch.prefilling)
        input_ids, positions, slots, seq_lens, newest_indices, newest_positions = calibration_inputs(
            batch.input_ids,
            batch.query_starts,
            batch.start_positions,
            batch.num_valid,
            batch.sampled,
            batch.newest,
            batch.block_table,
            layout.of_req,
            layout.offset,
            layout.num_calibrated,
            layout.starts,
            self.block_size,
            self.max_len,
            self.vocab_size,
            not batch.dummy,
        )
        sequences = Sequences(
            positions=positions,
            slots=slots,
            query_start_loc=layout.starts,
            query_start_loc_cpu=layout.starts_cpu,
            seq_lens=seq_lens,
            seq_lens_bound=torch.from_numpy(batch.seq_lens_bound.astype(np.int32) + 1),
            block_table=batch.block_table,
            max_query_len=layout.max_query_len,
            max_seq_len=int(batch.seq_lens_bound.max()) + 1,
        )
        return CalibrationStep(input_ids, sequences, newest_indices, newest_positions)

    def catching_up(
        self, batch: DraftBatch, spans: Sequence[Span], token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Sequences]:
        """A pass over tokens of earlier rounds: their ids `[tokens] int64`, and their sequences.

        token_ids: `[max_reqs, positions] int32`, by index in vLLM's request state.
        """
        reqs = np.array([span.req for span in spans])
        begins, ends = (np.array([getattr(span, which) for span in spans]) for which in ("begin", "end"))
        lens = ends - begins
        starts_cpu = torch.from_numpy(np.concatenate([[0], np.cumsum(lens)]).astype(np.int32))
        places = np.stack([np.repeat(reqs, lens), np.concatenate([np.arange(s.begin, s.end) for s in spans])])
        of_req, positions = async_tensor_h2d(places, self.device)
        reqs_on_device, seq_lens = async_tensor_h2d(np.stack([reqs, ends]), self.device)
        sequences = Sequences(
            positions=positions,
            slots=slots_of(batch.block_table, of_req, positions, self.block_size),
            query_start_loc=async_tensor_h2d(starts_cpu, self.device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=seq_lens.int(),
            seq_lens_bound=torch.from_numpy(ends.astype(np.int32)),
            block_table=batch.block_table[reqs_on_device],
            max_query_len=int(lens.max()),
            max_seq_len=int(ends.max()),
        )
        ids = token_ids[batch.idx_mapping[of_req], positions].to(self.device).long()
        return ids.clamp_(0, self.vocab_size - 1), sequences

    def only(self, step: CalibrationStep, batch: DraftBatch, prefilling: bool) -> CalibrationStep:
        """The same pass, in which only the prefilling (or only the decoding) requests write K/V."""
        query_lens = np.diff(step.sequences.query_start_loc_cpu)
        chosen = torch.from_numpy(np.repeat(batch.prefilling == prefilling, query_lens)).to(self.device)
        slots = torch.where(chosen, step.sequences.slots, -1)
        return replace(step, sequences=replace(step.sequences, slots=slots))
