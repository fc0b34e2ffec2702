"""vLLM's stat-logger plugin: easyspec's rounds as Prometheus metrics and as a line in the log.

vLLM loads it with every server; without easyspec it does nothing.
"""

import json
import socket
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_easyspec.config import OPTIONS_KEY
from vllm_easyspec.round_reports import address
from vllm_easyspec.watch import PayoffWatch

logger = init_logger("vllm.easyspec")

LARGEST_REPORT = 1 << 20  # bytes
LABELS = ("model_name", "engine")
STAGE_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# By the name in a report.
COUNTERS = {
    "paused_rounds": ("paused_rounds", "Rounds of K = 0, in which the drafter read and drafted nothing."),
    "caught_up_tokens": ("caught_up_tokens", "Tokens calibrated after paused rounds, or again after new weights."),
    "eager_rounds": ("eager_rounds", "Rounds whose drafting did not come from a CUDA graph."),
    "replays": ("graph_replays", "CUDA graphs replayed to calibrate or draft."),
    "low_acceptance": ("low_acceptance", "Times that hardly any draft of some hundred rounds was accepted."),
    "not_finite": ("not_finite", "Times that the drafter was found to compute NaN or infinity."),
    "costs_time": ("costs_time", "Times that some hundred rounds took longer than what they brought is worth."),
}


@cache
def metrics() -> dict[str, Any]:
    """This process's metrics by name. vLLM removes all of its own name before it registers those of a new engine."""
    found: dict[str, Any] = {
        name: Counter(f"vllm:easyspec_{suffix}", text, LABELS) for name, (suffix, text) in COUNTERS.items()
    }
    return found | {
        "stage_seconds": Histogram(
            "vllm:easyspec_stage_seconds",
            "Time of a round's stages: calibrate, draft, verify.",
            (*LABELS, "stage"),
            buckets=STAGE_BUCKETS,
        ),
        "rounds": Counter(
            "vllm:easyspec_rounds",
            "Rounds by draft plan and number of speculative tokens.",
            (*LABELS, "scope", "plan", "num_speculative_tokens"),
        ),
    }


class EasySpecStatLogger(StatLoggerBase):
    """Reads the reports of one engine's rounds."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self.labels = (vllm_config.model_config.served_model_name, str(engine_index))
        self.seconds: dict[str, list[float]] = {}  # by stage, since the last line in the log
        self.socket: socket.socket | None = None
        self.payoff = PayoffWatch()
        metrics.cache_clear()
        path = address(engine_index)
        if OPTIONS_KEY in (vllm_config.additional_config or {}) and path is not None:
            self.socket = _bound(path)

    def log_engine_initialized(self) -> None:
        """Create every series that needs no more labels from the beginning."""
        if self.socket is not None:
            for name in COUNTERS:
                metrics()[name].labels(*self.labels)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after every step."""
        if self.socket is None:
            return
        drafts = scheduler_stats and scheduler_stats.spec_decoding_stats
        if drafts:
            self.payoff.count_drafts(drafts.num_drafts, drafts.num_accepted_tokens)
        while True:
            try:
                report = self.socket.recv(LARGEST_REPORT)
            except BlockingIOError:
                return
            self._add(json.loads(report))

    def _add(self, report: dict[str, Any]) -> None:
        for stage, seconds in report["stage_seconds"]:
            metrics()["stage_seconds"].labels(*self.labels, stage).observe(seconds)
            self.seconds.setdefault(stage, []).append(seconds)
        report["counters"]["costs_time"] = int(self.payoff.add(report["stage_seconds"]))
        for name, count in report["counters"].items():
            metrics()[name].labels(*self.labels).inc(count)
        for num_drafts, scope, plan, count in report["rounds"]:
            metrics()["rounds"].labels(*self.labels, scope, plan, str(num_drafts)).inc(count)

    def log(self) -> None:
        """One line, next to vLLM's own, for the time since the last one."""
        stages, self.seconds = self.seconds, {}
        if stages.get("draft"):
            told = ", ".join(f"{stage} {1e3 * median(times):.2f} ms" for stage, times in sorted(stages.items()))
            logger.info("easyspec: %d rounds drafted; medians: %s", len(stages["draft"]), told)


def _bound(path: str) -> socket.socket | None:
    """None if another API server of this engine reads the reports already."""
    reader = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reader.setblocking(False)
    try:
        reader.connect(path)  # succeeds if somebody reads there
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:  # left by an engine that has ended
        Path(path).unlink(missing_ok=True)
    try:
        reader.bind(path)
    except OSError:
        reader.close()
        return None
    return reader
