"""A vLLM plugin for the rehearsal: writes the numbers by which the host advances, which no stub kernel computes.

Each function first runs in earnest, with all of its launches; then its result is overwritten. Every sampled token is
`TOKEN`, and of a request's drafts none to all are accepted, in turn. Device memory is host memory here, and copies are
real.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch

TOKEN = 5  # in every vocabulary
steps = count(1)


def write(tensor: torch.Tensor, values: Any) -> None:
    """Only copies between tensors of one layout and type are real: a kernel would do any other."""
    tensor.copy_(torch.as_tensor(np.asarray(values)).to(tensor.dtype).expand(tensor.shape).contiguous())


def write_logprobs(found: Any) -> None:
    columns = np.arange(found.logprob_token_ids.shape[1])
    write(found.logprob_token_ids, TOKEN + columns)
    write(found.logprobs, -1.0 - columns)
    write(found.selected_token_ranks, 1)


def sampled(found: tuple[Any, ...], runner: Any, hidden_states: Any, batch: Any, *_: Any) -> tuple[Any, ...]:
    output, num_sampled, num_rejected = found
    drafts = batch.num_draft_tokens_per_req
    drafts = np.zeros(batch.num_reqs, dtype=np.int32) if drafts is None else drafts
    accepted = (np.arange(batch.num_reqs) + next(steps)) % (drafts + 1)
    has_read_all = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
    write(num_sampled, has_read_all * (accepted + 1))
    write(num_rejected, has_read_all * (drafts - accepted))
    write(output.sampled_token_ids, TOKEN)
    if output.logprobs_tensors is not None:
        write_logprobs(output.logprobs_tensors)
    return found


def prompt_logprobs(found: dict[str, Any], *_: Any) -> dict[str, Any]:
    whole = {
        name: tensors._replace(
            logprob_token_ids=tensors.logprob_token_ids.contiguous(), logprobs=tensors.logprobs.contiguous()
        )
        for name, tensors in found.items()
    }
    for tensors in whole.values():
        write_logprobs(tensors)
    return whole


def counted(_: None, statistics: Any, batch: Any, tested: np.ndarray, paused: bool) -> None:
    """One draft of each request was accepted, in each round."""
    if statistics.rounds == 1:
        statistics.kept = np.zeros(statistics.by_kept_tokens.shape, dtype=np.int64)
    statistics.kept[1, 2] += tested.sum()
    write(statistics.by_kept_tokens, statistics.kept)


def spans_behind(_: list[Any], marks: Any, batch: Any) -> list[Any]:
    """All that each request has computed."""
    from vllm_easyspec.uncalibrated import Span

    marks.any = False
    computed = np.minimum(batch.seq_lens_bound - batch.query_lens, marks.max_len)
    return [Span(req, 0, int(end)) for req, end in enumerate(computed) if end > 0]


def calibrated_tokens(_: tuple[int, int], index: int, runner: Any, speculator: Any) -> tuple[int, int]:
    return min(int(runner.req_states.num_computed_tokens_np[index]), speculator.runtime.bounds.max_len), 0


def steer(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """From now on `owner.name` returns what `change` makes of its result and its arguments."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args: change(original(*args), *args))


def register() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    from vllm_easyspec import audit
    from vllm_easyspec.drafter import weights
    from vllm_easyspec.metrics import DraftStatistics
    from vllm_easyspec.uncalibrated import UncalibratedBlocks

    steer(GPUModelRunner, "sample", sampled)
    steer(PromptLogprobsWorker, "compute_prompt_logprobs", prompt_logprobs)
    steer(DraftStatistics, "count_round", counted)
    steer(UncalibratedBlocks, "_spans_behind", spans_behind)
    steer(audit, "_calibrated_tokens", calibrated_tokens)
    steer(audit, "_page_difference", lambda *_: 0.0)
    # Sums are whatever lay in memory, so this can't even run.
    setattr(weights, "_check_finite", lambda model: None)  # noqa: B010
