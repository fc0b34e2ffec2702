"""LoRA adapters of the target: every row of logits gets its request's adapter.

vLLM 0.32's Model Runner V2 names one adapter per request for the LM head, which is one row of logits per request. A
verifying request has a row for each draft as well. On a CPU vLLM then stops with a shape error, with any speculative
method; on a GPU those rows go without the adapter's LM head. Remove this when `LoraState` counts the drafts.
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
        """The adapters of rows of logits, of tokens, and all that are active."""
        of_requests, of_tokens, active = super().make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        num_logits = [1 + len(self.drafts.get(req_id, ())) for req_id in req_ids]
        return tuple(np.repeat(of_requests, num_logits)), of_tokens, active
