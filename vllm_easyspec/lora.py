"""LoRA adapters of the target: every row of logits gets its request's adapter.

vLLM 0.32's Model Runner V2 gives the LM head one adapter per request, for one row of logits. A request with drafts to
verify has another row for each draft. With any speculative method vLLM then fails with a shape error on a CPU; on a
GPU it computes those rows without the adapter's LM head. Remove this when `LoraState` counts the drafts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState


class VerifyingLoraState(LoraState):
    """vLLM's record of the requests' adapters, which also knows how many drafts each request verifies in this step."""

    def __init__(self, max_num_reqs: int):
        super().__init__(max_num_reqs)
        self.drafts: Mapping[str, Sequence[int]] = {}

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """The adapter of each row of logits, the adapter of each token, and all active adapters."""
        of_requests, of_tokens, active = super().make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        num_logits = [1 + len(self.drafts.get(req_id, ())) for req_id in req_ids]
        return tuple(np.repeat(of_requests, num_logits)), of_tokens, active
