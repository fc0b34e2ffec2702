"""Times the steps of a worker with any speculator: vLLM's `worker_extension_cls` in every arm."""

from typing import Any

from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, has_compiled_submodule

from vllm_easyspec.metrics import StageClock


class StepClock:
    """Times of all arms alike: `verify` is the target's pass and sampling, `draft` the whole `propose`."""

    model_runner: Any
    vllm_config: Any
    bench_clock: StageClock

    def bench_attach(self) -> dict[str, Any]:
        """Start timing steps. Returns how vLLM runs this arm, as it resolved the configuration."""
        runner = self.model_runner
        if runner.speculator is not None:
            self._time_steps(runner)
        return self._resolved(runner)

    def bench_times(self) -> dict[str, Any]:
        """Median milliseconds of a step since the last call, None if there was none."""
        times = self.bench_clock.medians() if self.model_runner.speculator is not None else {}
        self.bench_clock = StageClock(self.model_runner.device)
        return {stage: times.get(stage) for stage in ("draft", "verify")}

    def _time_steps(self, runner: Any) -> None:
        execute_model, inner_propose = runner.execute_model, runner.speculator.propose
        self.bench_clock = StageClock(runner.device)

        def timed_execute_model(*args: Any, **kwargs: Any) -> Any:
            self.bench_clock.start("verify")
            return execute_model(*args, **kwargs)

        def timed_propose(*args: Any, **kwargs: Any) -> Any:
            self.bench_clock.stop("verify")
            self.bench_clock.start("draft")
            drafts = inner_propose(*args, **kwargs)
            self.bench_clock.stop("draft")
            return drafts

        runner.execute_model, runner.speculator.propose = timed_execute_model, timed_propose

    def _resolved(self, runner: Any) -> dict[str, Any]:
        config, speculator = self.vllm_config, runner.speculator
        found = {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "num_gpu_blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "attention_backend": sorted(
                {group.backend.get_name() for groups in runner.attn_groups for group in groups}
            ),
            "compilation_mode": config.compilation_config.mode.name,
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        }
        if speculator is None:
            return found
        managers = [value for value in vars(speculator).values() if isinstance(value, CudaGraphManager)]
        return found | {
            "speculator": type(speculator).__name__,
            "speculator_compiled": has_compiled_submodule(speculator.model),
            "speculator_graphs": sum(len(manager.graphs) for manager in managers),
        }
