"""`LiveSettings`: what may be changed in a running engine between two rounds, and the checks of a change."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from vllm.config import VllmConfig
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_easyspec.config import Calibration
from vllm_easyspec.drafter.plan import SCOPES, DraftPlan, PlanTable, parse_grouping
from vllm_easyspec.lookahead import LookaheadFile
from vllm_easyspec.metrics import plan_json


@dataclass(frozen=True)
class DraftSettings:
    """How rounds draft until the next change."""

    plans: PlanTable
    num_drafts: int  # K, at most the configured one
    calibration: Calibration = "every_round"
    lookahead: bool = False  # whether groups use their look-ahead maps

    def to_json(self) -> dict[str, Any]:
        """For the reply of an RPC. The plan is that of the largest batches."""
        table = self.plans.ranges if len(self.plans.ranges) > 1 else ()
        return plan_json(self.plans.largest) | {
            "by_batch_size": [{"up_to": entry.up_to} | plan_json(entry.plan) for entry in table],
            "num_speculative_tokens": self.num_drafts,
            "calibration": self.calibration,
            "lookahead": self.lookahead,
        }


class LiveSettings:
    """The settings in force. A round reads `current` once."""

    def __init__(self, configured: DraftSettings, lookahead_file: LookaheadFile | None):
        """Raises `ConfigError` for a plan that the file of look-ahead maps doesn't cover."""
        self.configured = configured
        self.lookahead_file = lookahead_file
        self._check_maps(configured)
        self.current = configured

    def change(
        self,
        scope: str | None = None,
        plan: str | Sequence[int] | None = None,
        num_drafts: int | None = None,
        calibration: str | None = None,
        lookahead: bool | None = None,
        restore: bool = False,
    ) -> None:
        """Change what is given, from the next round on. Raises ValueError for what the drafter can't do.

        plan: such as `1-4-4-1`, or its group sizes. A scope or a plan holds for all batch sizes, whatever
        `by_batch_size` says; restore: first go back to the configuration.
        """
        settings = self.configured if restore else self.current
        if scope is not None or plan is not None:
            present = settings.plans.largest
            one_of("scope", scope, (None, *SCOPES))
            sizes = present.group_sizes if plan is None else _group_sizes(plan)
            chosen = DraftPlan.of_sizes(present.num_layers, sizes, scope or present.scope)  # type: ignore[arg-type]
            settings = replace(settings, plans=PlanTable.of(chosen))
        if num_drafts is not None:
            one_of("num_speculative_tokens", num_drafts, range(1, self.configured.num_drafts + 1))
            settings = replace(settings, num_drafts=num_drafts)
        if calibration is not None:
            one_of("calibration", calibration, get_args(Calibration))
            settings = replace(settings, calibration=calibration)  # type: ignore[arg-type]
        if lookahead is not None:
            one_of("lookahead", lookahead, (False, True) if self.lookahead_file else (False,))
            settings = replace(settings, lookahead=lookahead)
        self._check_maps(settings)
        self.current = settings

    def _check_maps(self, settings: DraftSettings) -> None:
        if settings.lookahead and self.lookahead_file is not None:
            for plan in settings.plans.plans:
                self.lookahead_file.check_plan(plan)


def scheduled_num_drafts(vllm_config: VllmConfig) -> list[int]:
    """Every K that vLLM's scheduler may choose."""
    spec = vllm_config.speculative_config
    if not spec.uses_dynamic_speculative_decoding():
        return [spec.num_speculative_tokens]
    schedule = build_dynamic_sd_schedule_lookup(
        spec.num_speculative_tokens_per_batch_size,
        vllm_max_batch_size=vllm_config.scheduler_config.max_num_seqs,
        vllm_num_speculative_tokens=spec.num_speculative_tokens,
    )
    return sorted(set(schedule[1:]))


def _group_sizes(plan: str | Sequence[int]) -> Sequence[int]:
    return parse_grouping(plan) if isinstance(plan, str) else plan


def one_of(field: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise ValueError for a value that is not allowed."""
    if value not in allowed:
        names = ", ".join(str(each) for each in allowed if each is not None)
        raise ValueError(f"{field}={value!r} is not one of {names}")
