"""`SpeculativeWorker`: vLLM's worker of this platform, with easyspec's speculator in its model runner, and its RPCs.

The RPCs are reached by `LLM.collective_rpc("easyspec_stats")` and the like; each returns one value per rank.
"""

from dataclasses import asdict
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_easyspec.audit import audit
from vllm_easyspec.compat import install_lora_state, install_speculator
from vllm_easyspec.drafter.plan import Scope
from vllm_easyspec.drafter.products import choose_products
from vllm_easyspec.drafter.update import ReceivedWeights
from vllm_easyspec.fidelity import group_costs
from vllm_easyspec.speculator import EasySpecSpeculator

logger = init_logger("vllm.easyspec")


def _platform_worker() -> type:
    if current_platform.is_cpu():
        # Importing this changes torch for the whole process, so only on a CPU.
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


class SpeculativeWorker(_platform_worker()):  # type: ignore[misc]
    """One rank's worker. Its `easyspec_...` methods are RPCs, which raise ValueError for unusable arguments."""

    received: ReceivedWeights | None = None  # of the drafter's update, between its start and its end
    drafter_is_lost = False  # asleep, without a copy of the drafter's weights

    @property
    def speculator(self) -> EasySpecSpeculator:
        return self.model_runner.speculator

    def init_device(self) -> None:
        super().init_device()
        token_ids = self.model_runner.req_states.all_token_ids.gpu
        install_speculator(self.model_runner, lambda: EasySpecSpeculator(self.vllm_config, self.device, token_ids))
        install_lora_state(self.model_runner, self.scheduler_config.max_num_seqs)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        choose_products(self.speculator.model)  # outside of the memory that sleep mode discards

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        logger.info("easyspec %s", self.speculator.runtime.describe(self.speculator.settings))

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.speculator.statistics.reset()
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        self.speculator.statistics.clock.start("verify")
        self.model_runner.lora_state.drafts = scheduler_output.scheduled_spec_decode_tokens
        if scheduler_output.kv_cache_block_copies:
            self.speculator.runtime.uncalibrated.copied(scheduler_output.kv_cache_block_copies)
        return super().execute_model(scheduler_output)

    # ---- sleep, and new weights for the drafter ----

    def sleep(self, level: int = 1) -> None:
        super().sleep(level)
        discards = self.model_config.enable_sleep_mode or self.model_config.enable_cumem_allocator
        kept = self._sleep_saved_parameters  # sleep_preserve_parameter_names
        names = (f"draft.{name}" for name, _ in self.speculator.model.named_parameters())
        self.drafter_is_lost = level == 2 and discards and not all(name in kept for name in names)

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        if self.drafter_is_lost and (tags is None or "weights" in tags):
            self.drafter_is_lost = False
            with set_current_vllm_config(self.vllm_config):
                self.speculator.read_again()

    def _set_draft_weight_update_target(self) -> None:
        super()._set_draft_weight_update_target()
        engine = self.weight_transfer_engine
        self.received = ReceivedWeights()
        engine.set_weight_update_target(self.received, engine.model_config)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        if self._weight_update_is_draft:
            received, self.received = self.received, None
            assert received is not None
            with set_current_vllm_config(self.vllm_config):
                self.speculator.replace_weights(received.tensors.items())

    def easyspec_reload_drafter(self, model: str | None = None) -> None:
        """Load the drafter's weights from the folder or hub name `model`, a drafter of the same shape, or again those
        of the start. All or nothing: where they can't be used, the drafter keeps its present weights."""
        with set_current_vllm_config(self.vllm_config):
            self.speculator.read_again(model)

    # ---- RPCs ----

    def easyspec_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counters and times since the last reset, by rank."""
        snapshot = self.speculator.statistics.snapshot() | self.speculator.settings.current.to_json()
        snapshot |= {
            "rank": self.speculator.model.rank,
            "graphs": {
                "captured": len(self.speculator.graphs.graphs) if self.speculator.graphs else 0,
                "replays": self.speculator.statistics.replays,
                "eager_rounds": self.speculator.statistics.eager_rounds,
            },
        }
        if reset:
            self.speculator.statistics.reset()
        return snapshot

    def easyspec_configure(
        self,
        scope: str | None = None,
        plan: str | None = None,
        num_speculative_tokens: int | None = None,
        calibration: str | None = None,
        lookahead: bool | None = None,
        restore: bool = False,
        group_sizes: list[int] | None = None,
    ) -> dict[str, Any]:
        """Change scope, plan, K (up to the configured one), calibration or the use of look-ahead maps from the next
        round on, and reset the counters.

        plan: such as "1-4-4-1"; group_sizes: the same as a list. A scope or a plan holds for all batch sizes; `restore`
        first goes back to the configuration, its table by batch size included.
        """
        if plan is not None and group_sizes is not None:
            raise ValueError(f"plan={plan!r} is given together with group_sizes={group_sizes}. Remove group_sizes")
        chosen = group_sizes if plan is None else plan
        self.speculator.settings.change(scope, chosen, num_speculative_tokens, calibration, lookahead, restore)
        self.speculator.statistics.reset()
        return self.easyspec_stats()

    def easyspec_capture(self, batch_sizes: list[int], num_speculative_tokens: list[int]) -> dict[str, Any]:
        """Record CUDA graphs for what `easyspec_configure` set, which runs without them until then.

        Requests wait meanwhile, for seconds. Without graphs (on a CPU, or with enforce_eager) it does nothing.
        """
        self.speculator.capture_for(batch_sizes, num_speculative_tokens)
        return self.easyspec_stats()

    def easyspec_group_costs(self, token_ids: list[int], scope: Scope, max_size: int) -> list[tuple[int, int, float]]:
        """The score of each group of 2 to `max_size` layers on a prompt (`fidelity.py`): first layer, size, score."""
        ids = torch.tensor(token_ids, device=self.device)
        return group_costs(self.speculator.model, ids, scope, max_size)

    def easyspec_audit(self) -> list[dict[str, Any]]:
        """Largest difference between this rank's drafter pages and a precise recomputation, for each live request."""
        return [asdict(request) for request in audit(self.model_runner, self.speculator)]
