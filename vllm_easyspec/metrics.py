"""What a rank counts and times while it drafts."""

import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_easyspec.batch import DraftBatch
from vllm_easyspec.drafter.plan import DraftPlan

STAGES = ("calibrate", "draft", "verify")
MOST_UNREPORTED = 4096


def plan_json(plan: DraftPlan) -> dict[str, Any]:
    """A plan in the reply of an RPC or in a result."""
    return {"scope": plan.scope, "plan": plan.grouping, "group_sizes": list(plan.group_sizes)}


@dataclass
class PassCounters:
    """What the passes of one stage did on this rank. All counts are of calls, none of bytes or tokens."""

    passes: int = 0
    attention_calls: int = 0
    cache_writes: int = 0
    attention_collectives: int = 0  # one per group: its attention outputs reach every rank
    mlp_collectives: int = 0  # one per MLP (attention scope) or one per group (block scope)

    def add(self, other: "PassCounters") -> None:
        for counter in fields(self):
            setattr(self, counter.name, getattr(self, counter.name) + getattr(other, counter.name))


class StageClock:
    """Times the stages of a round: on CUDA by events on the current stream, elsewhere by the host's clock.

    Keeps the newest `window` times of each stage, in seconds. Never synchronises before `medians` is called.
    """

    def __init__(self, device: torch.device, window: int = 512):
        self.on_cuda = device.type == "cuda"
        self.window = window
        self.spans: dict[str, list[Any]] = {stage: [] for stage in STAGES}
        self.open: dict[str, object] = {}
        self.unreported: deque[tuple[str, Any, Any]] = deque(maxlen=MOST_UNREPORTED)  # stage, begin, end

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, stage: str) -> None:
        self.open[stage] = self._now()

    def stop(self, stage: str) -> None:
        """End the stage's measurement. A stage that was not started (a dummy run in between) is not counted."""
        began = self.open.pop(stage, None)
        if began is not None:
            spans = self.spans[stage]
            spans.append((began, self._now()))
            del spans[: -self.window]
            self.unreported.append((stage, *spans[-1]))

    def take_finished(self) -> list[tuple[str, float]]:
        """Stage and seconds of what the device has finished since the last call. Never waits for it."""
        taken = []
        while self.unreported and (not self.on_cuda or self.unreported[0][2].query()):
            stage, began, ended = self.unreported.popleft()
            seconds = began.elapsed_time(ended) / 1e3 if self.on_cuda else ended - began
            taken.append((stage, round(seconds, 7)))
        return taken

    def medians(self) -> dict[str, float | None]:
        """Median time of each stage in milliseconds, None where it never ran."""
        if self.on_cuda:
            torch.cuda.synchronize()
            took = {stage: [a.elapsed_time(b) for a, b in spans] for stage, spans in self.spans.items()}
        else:
            took = {stage: [1e3 * (b - a) for a, b in spans] for stage, spans in self.spans.items()}
        return {stage: round(median(times), 4) if times else None for stage, times in took.items()}


@dataclass
class DraftStatistics:
    """Counts since the last reset; tensors stay on the device until `snapshot` so that counting never waits."""

    device: torch.device
    max_drafts: int
    stages: dict[str, PassCounters] = field(init=False)
    clock: StageClock = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting and timing from zero."""
        self.stages = {"calibrate": PassCounters(), "draft": PassCounters()}
        self.clock = StageClock(self.device)
        self.rounds = 0
        self.rounds_by_plan: Counter[tuple[int, DraftPlan]] = Counter()  # by K, 0 included
        self.paused_rounds = 0  # of K = 0, in which the drafter read nothing
        self.caught_up_tokens = 0  # that paused rounds had skipped, or old weights had read, and later rounds read
        self.eager_rounds = 0  # rounds whose fuzzy steps did not come from a graph
        self.replays = 0
        self.warnings: Counter[str] = Counter()  # of `DraftWatch`, by name
        # Decoding requests by the tokens of their step that were kept (1 to K + 1); without drafts [0] and with [1].
        self.by_kept_tokens = torch.zeros(2, self.max_drafts + 2, dtype=torch.int64, device=self.device)
        self.ones = torch.ones(1, dtype=torch.int64, device=self.device)
        self.calibrated_prefill_tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self.paused_decode_tokens = torch.zeros((), dtype=torch.int64, device=self.device)

    def count_round(self, batch: DraftBatch, tested: np.ndarray, paused: bool) -> None:
        """tested: `[reqs] bool`, requests whose drafts the target tested. Never waits for the device."""
        self.rounds += 1
        self.paused_rounds += paused
        if paused and not batch.prefilling.any() and not tested.any():
            return  # a token of each request, neither drafted for nor calibrated
        if not batch.prefilling.any() and tested.all():
            self.by_kept_tokens[1].scatter_add_(0, batch.num_valid, self.ones.expand(batch.num_reqs))
            if paused:
                self.paused_decode_tokens += batch.num_valid.sum()
            return
        masks = async_tensor_h2d(np.stack([batch.prefilling, tested]), self.device)
        prefilling, read_drafts = masks
        if paused:
            self.paused_decode_tokens += (batch.num_valid * ~prefilling).sum()
        else:
            self.calibrated_prefill_tokens += ((batch.num_valid + batch.sampled) * prefilling).sum()
        cells = read_drafts * self.by_kept_tokens.shape[1] + batch.num_valid.clamp(max=self.max_drafts + 1)
        self.by_kept_tokens.view(-1).scatter_add_(0, cells * ~prefilling, (~prefilling).long())

    def snapshot(self) -> dict[str, Any]:
        """Plain numbers for an RPC reply: acceptance by position; tokens per round, the target's own included."""
        untested, tested = self.by_kept_tokens.tolist()
        verified = sum(tested)
        # Of n kept tokens the first was sampled a round before, the others are accepted drafts.
        accepted = [sum(tested[index + 2 :]) for index in range(self.max_drafts)]
        calibrated = sum(kept * (a + b) for kept, (a, b) in enumerate(zip(untested, tested, strict=True)))
        return {
            "rounds": self.rounds,
            "rounds_by_plan": [
                {"num_speculative_tokens": num_drafts} | plan_json(plan) | {"rounds": rounds}
                for (num_drafts, plan), rounds in self.rounds_by_plan.items()
            ],
            "verified": verified,
            "accepted_at": accepted,
            "acceptance": [round(a / verified, 4) if verified else None for a in accepted],
            "tokens_a_round": round(1 + sum(accepted) / verified, 4) if verified else None,
            "calibrated_decode_tokens": calibrated - int(self.paused_decode_tokens),
            "calibrated_prefill_tokens": int(self.calibrated_prefill_tokens),
            "paused_rounds": self.paused_rounds,
            "caught_up_tokens": self.caught_up_tokens,
            "stages": {name: asdict(counters) for name, counters in self.stages.items()},
            "stage_ms": self.clock.medians(),
        }
