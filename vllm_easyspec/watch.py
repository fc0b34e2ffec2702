"""Warns once when hardly any draft is accepted, which would otherwise show only as slow answers."""

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.easyspec")

ROUNDS = 256  # between two checks
LEAST_TESTED = 200  # tested drafts of requests, one per request and round, for a verdict
# Share of first drafts. Unrelated models with one vocabulary agree on some: word endings, indentation, punctuation.
LEAST_ACCEPTED = 0.02


class AcceptanceWatch:
    """Checks the counts of accepted drafts now and then, without ever waiting for the device."""

    def __init__(self, device: torch.device):
        self.rounds = 0
        self.seen = (0, 0)  # at the last check: tested first drafts, and accepted ones
        self.copy: torch.Tensor | None = None  # of the counts, on the host once `copied` says so
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def after_round(self, by_kept_tokens: torch.Tensor) -> bool:
        """Whether acceptance turned out too low. by_kept_tokens: `[2, K + 2] int64`, of `DraftStatistics`."""
        self.rounds += 1
        if self.rounds % ROUNDS:
            return False
        is_low = False
        if self.copy is not None and (self.copied is None or self.copied.query()):
            is_low = self._judge(self.copy[1].tolist())
        # On CUDA the copy has arrived long before the next check; elsewhere it is immediate.
        self.copy = by_kept_tokens.to("cpu", non_blocking=True, copy=True)
        if self.copied is not None:
            self.copied.record()
        return is_low

    def _judge(self, tested_by_kept: list[int]) -> bool:
        """tested_by_kept: requests whose drafts were tested, by kept tokens; with none accepted, 1 token is kept."""
        tested, accepted = sum(tested_by_kept), sum(tested_by_kept[2:])
        if tested < self.seen[0]:  # counted from zero again
            self.seen = (0, 0)
        new, new_accepted = tested - self.seen[0], accepted - self.seen[1]
        if new < LEAST_TESTED:
            return False
        self.seen = (tested, accepted)
        is_low = new_accepted < LEAST_ACCEPTED * new
        if is_low:
            logger.warning_once(
                "easyspec: hardly a draft is accepted (the first of %d in %d), so this server is slower than without "
                "speculation. Answers are still correct. Check that the drafter is of the target's family and its "
                "files are sound (vllm-easyspec doctor), or serve without --speculative-config.",
                new_accepted,
                new,
            )
        return is_low
