"""Says, once, when drafting has stopped helping: what would otherwise only show as slow answers."""

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.easyspec")

ROUNDS = 256  # between two looks
LEAST_TESTED = 200  # requests' rounds in which drafts were tested, for a judgement
# Of first drafts. Unlike pairs of one vocabulary agree on some: on ends of words, indentation, punctuation.
LEAST_ACCEPTED = 0.02


class AcceptanceWatch:
    """Reads the counts of accepted drafts now and then, without ever waiting for the device."""

    def __init__(self, device: torch.device):
        self.rounds = 0
        self.seen = (0, 0)  # requests' rounds with tested drafts, and with the first one accepted, at the last look
        self.coming: torch.Tensor | None = None  # a copy of the counts that is on its way to the host
        self.has_come = torch.cuda.Event() if device.type == "cuda" else None

    def after_round(self, stood: torch.Tensor) -> None:
        """stood: `[2, K + 2] int64`, `DraftStatistics.stood`."""
        self.rounds += 1
        if self.rounds % ROUNDS:
            return
        if self.coming is not None and (self.has_come is None or self.has_come.query()):
            self._judge(self.coming[1].tolist())
        # On CUDA the copy is there long before the next look; elsewhere at once.
        self.coming = stood.to("cpu", non_blocking=True, copy=True)
        if self.has_come is not None:
            self.has_come.record()

    def _judge(self, tested_by_stood: list[int]) -> None:
        """tested_by_stood: requests' rounds whose drafts were tested, by the tokens that stood: none accepted is 1."""
        tested, accepted = sum(tested_by_stood), sum(tested_by_stood[2:])
        if tested < self.seen[0]:  # counted from zero again
            self.seen = (0, 0)
        new, new_accepted = tested - self.seen[0], accepted - self.seen[1]
        if new < LEAST_TESTED:
            return
        self.seen = (tested, accepted)
        if new_accepted < LEAST_ACCEPTED * new:
            logger.warning_once(
                "easyspec: hardly a draft is accepted (the first of %d in %d), so this server is slower than without "
                "speculation. Answers are right all the same. Check that the drafter is of the target's family and its "
                "files are sound (vllm-easyspec doctor), or serve without --speculative-config.",
                new_accepted,
                new,
            )
