"""Warns once of what would otherwise show only as slow answers: drafts that are rejected, or cost more than they save.

`DraftWatch` runs in rank 0's worker, `PayoffWatch` in the API server.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.easyspec")

ROUNDS = 256  # between two checks
LEAST_TESTED = 200  # tested drafts of requests, one per request and round, for a verdict
# Share of first drafts. Unrelated models with one vocabulary agree on some: word endings, indentation, punctuation.
LEAST_ACCEPTED = 0.02


class DraftWatch:
    """Checks drafts now and then, without ever waiting for the device."""

    def __init__(self, device: torch.device):
        self.rounds = 0
        self.seen = (0, 0)  # at the last check: tested first drafts, and accepted ones
        self.copy: torch.Tensor | None = None  # of what the next check reads, on the host once `copied` says so
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def after_round(self, by_kept_tokens: torch.Tensor, hidden: torch.Tensor) -> Counter[str]:
        """The warnings that this round gives reason for, by name.

        by_kept_tokens: `[2, K + 2] int64`, of `DraftStatistics`; hidden: `[reqs, hidden]`, the drafter's final hidden
        states.
        """
        self.rounds += 1
        if self.rounds % ROUNDS:
            return Counter()
        found: Counter[str] = Counter()
        if self.copy is not None and (self.copied is None or self.copied.query()):
            *tested_by_kept, broken = self.copy.tolist()
            found["not_finite"] = self._judge_hidden(broken)
            # Of a broken drafter it is no news that its drafts are not accepted.
            found["low_acceptance"] = not broken and self._judge(tested_by_kept)
        # On CUDA the copy has arrived long before the next check; elsewhere it is immediate.
        broken = (~hidden.isfinite()).any(1).sum()
        self.copy = torch.cat([by_kept_tokens[1], broken.view(1)]).to("cpu", non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return +found

    def _judge_hidden(self, broken: int) -> bool:
        """broken: requests with NaN or infinity in a hidden state."""
        if broken:
            logger.warning_once(
                "easyspec: the drafter computes NaN or infinity, so its drafts are arbitrary and this server is slower "
                "than without speculation. Answers are still correct. Its files may be damaged (vllm-easyspec doctor), "
                "or its numbers too large for float16: serve with --dtype bfloat16, or without --speculative-config."
            )
        return broken > 0

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


class PayoffWatch:
    """Compares what rounds cost with what they bring, a window of rounds at a time."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.seconds: Counter[str] = Counter()  # by stage
        self.drafts = self.accepted = self.rounds = 0

    def count_drafts(self, drafts: int, accepted: int) -> None:
        """drafts: one per request and round; accepted: tokens of theirs."""
        self.drafts += drafts
        self.accepted += accepted

    def add(self, stage_seconds: Iterable[tuple[str, float]]) -> bool:
        """Whether the window that ends here cost time. stage_seconds: of stages that ended since the last call.

        A step without speculation takes at most the time of a verification. So if a round takes more verifications than
        it gives tokens to a request, speculation costs time; otherwise it may save some.
        """
        for stage, seconds in stage_seconds:
            self.seconds[stage] += seconds  # type: ignore[assignment]
            self.rounds += stage == "draft"
        if self.rounds < ROUNDS or self.drafts < LEAST_TESTED:
            return False
        tokens = 1 + self.accepted / self.drafts
        verifications = sum(self.seconds.values()) / max(self.seconds["verify"], 1e-9)
        self._begin()
        if verifications > tokens:
            logger.warning_once(
                "easyspec: rounds take %.2f times their verification and bring %.2f tokens per request, so this server "
                "is slower than without speculation. See vllm-easyspec doctor --live for what to change; vllm-easyspec "
                "tune finds the plan and K for each batch size.",
                verifications,
                tokens,
            )
        return verifications > tokens
