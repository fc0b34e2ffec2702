"""What a rank counts and times while it drafts."""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median

import torch

from vllm_easyspec.drafter.plan import LayerPlan, Scope

STAGES = ("calibrate", "draft", "verify")


@dataclass
class PassCounters:
    """What the passes of one stage did on this rank. All counts are of calls, none of bytes or tokens."""

    passes: int = 0
    attention_calls: int = 0
    cache_writes: int = 0
    attention_collectives: int = 0  # one a group: its attention outputs reach every rank
    mlp_collectives: int = 0  # one an MLP (attention scope) or one a group (block scope)


class StageClock:
    """Times the stages of a round: on CUDA by events on the current stream, elsewhere by the host's clock.

    Keeps the newest `window` times of each stage, in seconds. Never synchronises before `medians` is called.
    """

    def __init__(self, device: torch.device, window: int = 512):
        self.on_cuda = device.type == "cuda"
        self.window = window
        self.spans: dict[str, list] = {stage: [] for stage in STAGES}
        self.open: dict[str, object] = {}

    def _now(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, stage: str) -> None:
        self.open[stage] = self._now()

    def stop(self, stage: str) -> None:
        """Ends the stage's running time. A stage that was not started (a dummy run in between) is not counted."""
        began = self.open.pop(stage, None)
        if began is not None:
            spans = self.spans[stage]
            spans.append((began, self._now()))
            del spans[: -self.window]

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
        self.stages = {"calibrate": PassCounters(), "draft": PassCounters()}
        self.clock = StageClock(self.device)
        self.rounds = 0
        self.rounds_by_plan: Counter[tuple[int, LayerPlan, Scope]] = Counter()
        # Totals over requests: [verified rounds of a request, drafts tested at position 1.., accepted at position 1..].
        self.verified = torch.zeros((), dtype=torch.int64, device=self.device)
        self.accepted_at = torch.zeros(self.max_drafts, dtype=torch.int64, device=self.device)
        self.calibrated_decode_tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self.calibrated_prefill_tokens = torch.zeros((), dtype=torch.int64, device=self.device)

    def count_round(self, num_drafts: int, plan: LayerPlan, scope: Scope) -> None:
        """A round of K = `num_drafts`, whose fuzzy steps (from K = 2 on) run `plan`."""
        self.rounds += 1
        self.rounds_by_plan[num_drafts, plan, scope] += 1

    def count_verdict(self, decoding: torch.Tensor, num_accepted: torch.Tensor) -> None:
        """decoding: `[reqs] bool`, requests whose drafts were tested; num_accepted: `[reqs] int64`."""
        self.verified += decoding.sum()
        reached = num_accepted.unsqueeze(1) > torch.arange(self.max_drafts, device=self.device)
        self.accepted_at += (reached & decoding.unsqueeze(1)).sum(0)

    def snapshot(self) -> dict:
        """Plain numbers for an RPC reply: acceptance by position; tokens a round, the target's own included."""
        verified = int(self.verified)
        accepted = self.accepted_at.tolist()
        return {
            "rounds": self.rounds,
            "rounds_by_plan": [
                {"num_speculative_tokens": drafts, "scope": scope, "group_sizes": list(plan.group_sizes), "rounds": n}
                for (drafts, plan, scope), n in self.rounds_by_plan.items()
            ],
            "verified": verified,
            "accepted_at": accepted,
            "acceptance": [round(a / verified, 4) if verified else None for a in accepted],
            "tokens_a_round": round(1 + sum(accepted) / verified, 4) if verified else None,
            "calibrated_decode_tokens": int(self.calibrated_decode_tokens),
            "calibrated_prefill_tokens": int(self.calibrated_prefill_tokens),
            "stages": {name: asdict(counters) for name, counters in self.stages.items()},
            "stage_ms": self.clock.medians(),
        }
