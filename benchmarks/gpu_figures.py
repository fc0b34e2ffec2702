"""The figures of `tools/gpu_check.py`: drafting against vLLM's draft_model, and whole engines, at published shapes.

Weights are dummies, so acceptance is vLLM's synthetic one and only times count. `stages DRAFTER`: a target of two
layers, so that drafting dominates; vLLM's `draft_model` and easyspec under three plans, in turn. The drafting stage is
what `propose` takes on the device, both timed by the same clock. `engine ARM`: a target of Qwen2.5 32B's shape with a
drafter of Qwen2.5 0.5B's shape, K=5, a synthetic acceptance length of 4. The target gets the drafter's vocabulary of
151,936 (its own has 128 rows more), since vLLM refuses draft_model otherwise.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vllm_easyspec.bench.processes import alone
from vllm_easyspec.bench.report import surroundings
from vllm_easyspec.drafter.plan import LayerPlan
from vllm_easyspec.metrics import StageClock

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "tests" / "fixtures" / "hf_configs"
TARGET, DRAFTER = "Qwen2.5-Coder-32B-Instruct", "Qwen2.5-0.5B-Instruct"
DRAFTS = 5
ACCEPTANCE_LENGTH = 4.0
TINY = dict(  # a CPU's rehearsal
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
)
BANDWIDTH_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}


class DraftTimer:
    """vLLM's `worker_extension_cls`: times `propose` of whichever speculator the worker has."""

    def time_propose(self) -> None:
        """Time every later call, and forget the earlier ones."""
        speculator = self.model_runner.speculator  # type: ignore[attr-defined]
        if not hasattr(self, "propose_clock"):
            self.propose = speculator.propose
            speculator.propose = self._timed_propose
        self.propose_clock = StageClock(speculator.device, window=1 << 20)

    def _timed_propose(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.propose_clock.start("draft")
        drafts = self.propose(*args, **kwargs)
        self.propose_clock.stop("draft")
        return drafts

    def propose_ms(self) -> float | None:
        """The median since `time_propose`."""
        return self.propose_clock.medians()["draft"]

    def read_bandwidth(self) -> float:
        """Bytes a second that a sum reads from the device's memory, the best of ten."""
        device = self.model_runner.speculator.device  # type: ignore[attr-defined]
        data = torch.ones(BANDWIDTH_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        clocks = []
        for _ in range(10):
            clock = StageClock(device)
            clock.start("draft")
            data.sum()
            clock.stop("draft")
            clocks.append(clock)
        return data.nbytes / (min(clock.medians()["draft"] or 1e9 for clock in clocks) / 1e3)

    def step_bytes(self, batch: int, context: int) -> int:
        """What one step of easyspec's drafter reads: its weights but for unused rows of the embedding, and the K/V."""
        from vllm_easyspec.bench.draft_step import _bytes_a_step

        return _bytes_a_step(self.model_runner.speculator, batch, context)  # type: ignore[attr-defined]

    def drafter_state(self) -> dict:
        """How vLLM runs the drafter: whether anything of it is compiled or captured."""
        compilation = self.vllm_config.compilation_config  # type: ignore[attr-defined]
        return {
            "compilation_mode": str(compilation.mode),
            "cudagraph_mode": str(compilation.cudagraph_mode),
            "speculator": type(self.model_runner.speculator).__qualname__,  # type: ignore[attr-defined]
        }


@contextmanager
def shape(name: str, device: str, **changes: Any) -> Iterator[str]:
    """A folder with a published configuration, tiny on a CPU, and nothing else."""
    config = json.loads((SHAPES / name / "config.json").read_text())
    config |= (TINY if device == "cpu" else {}) | changes
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


@contextmanager
def engine(target: str, device: str, speculative: dict | None, batch: int, length: int) -> Iterator[Any]:
    from vllm import LLM

    synthetic = dict(rejection_sample_method="synthetic", synthetic_acceptance_length=ACCEPTANCE_LENGTH)
    where = dict(kv_cache_memory_bytes=1 << 28) if device == "cpu" else dict(gpu_memory_utilization=0.6)
    llm = LLM(
        target,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32" if device == "cpu" else "bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        worker_extension_cls="benchmarks.gpu_figures.DraftTimer",
        speculative_config=speculative and speculative | synthetic | dict(num_speculative_tokens=DRAFTS),
        **where,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generate(llm: Any, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds for `batch` requests together."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=random).tolist()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outs = llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
    took = time.perf_counter() - began
    assert all(len(out.outputs[0].token_ids) == new_tokens for out in outs)
    return took


def plans(layers: int) -> dict[str, dict]:
    grouped = list(LayerPlan.grouped(layers, 4, 1, 1).group_sizes)
    return {
        "precise": dict(scope="attention", group_sizes=[1] * layers),
        "attention": dict(scope="attention", group_sizes=grouped),
        "block": dict(scope="block", group_sizes=grouped),
    }


def measure_stages(name: str, device: str, save: Any) -> None:
    """Rows: the drafting stage and its steps of one drafter, by batch size."""
    with shape(name, device) as drafter, shape(name, device, num_hidden_layers=2) as target:
        rows = alone(time_draft_model, target, drafter, device)
        save(name, rows)
        baseline = {row["batch"]: row["stage_ms"] for row in rows}
        for row in alone(time_easyspec, target, drafter, device):
            rows.append(row | {"draft_model_over_stage": round(baseline[row["batch"]] / row["stage_ms"], 2)})
        save(name, rows)


def stage_sizes(device: str) -> tuple[int, int, int, tuple[int, ...]]:
    """Tokens of a prompt, generated tokens, turns, batch sizes."""
    return (256, 128, 3, (1, 8)) if device == "cuda" else (32, 16, 1, (1, 2))


def time_draft_model(target: str, drafter: str, device: str) -> list[dict]:
    context, new_tokens, turns, batches = stage_sizes(device)
    rows = []
    spec = dict(method="draft_model", model=drafter)
    with engine(target, device, spec, max(batches), context + new_tokens + 16) as llm:
        state = llm.collective_rpc("drafter_state")[0]
        for batch in batches:
            generate(llm, batch, context, new_tokens)  # warms up
            llm.collective_rpc("time_propose")
            for _ in range(turns):
                generate(llm, batch, context, new_tokens)
            stage = llm.collective_rpc("propose_ms")[0]
            rows.append({"arm": "draft_model", "batch": batch, "stage_ms": round(stage, 4)} | state)
    return rows


def time_easyspec(target: str, drafter: str, device: str) -> list[dict]:
    """Plans take turns, and the first turn warms up."""
    context, new_tokens, turns, batches = stage_sizes(device)
    rows = []
    spec = dict(method="easyspec", model=drafter)
    with engine(target, device, spec, max(batches), context + new_tokens + 16) as llm:
        chosen = plans(json.loads((Path(drafter) / "config.json").read_text())["num_hidden_layers"])
        bandwidth = llm.collective_rpc("read_bandwidth")[0]
        for batch in batches:
            taken: dict[str, list[tuple]] = {arm: [] for arm in chosen}
            graphs = {}
            for turn in range(turns + 1):
                for arm, plan in chosen.items():
                    llm.collective_rpc("easyspec_configure", kwargs=plan)
                    llm.collective_rpc("time_propose")
                    generate(llm, batch, context, new_tokens)
                    counted = llm.collective_rpc("easyspec_stats")[0]
                    times, graphs[arm] = counted["stage_ms"], counted.get("graphs")
                    if turn:
                        stage = llm.collective_rpc("propose_ms")[0]
                        taken[arm].append((stage, times["calibrate"], times["draft"] / (DRAFTS - 1)))
            moved = llm.collective_rpc("step_bytes", args=(batch, context + new_tokens // 2))[0]
            floor = 1e3 * moved / bandwidth
            precise = median(step for _, _, step in taken["precise"])
            for arm, measured in taken.items():
                stage, calibrate, step = (median(times) for times in zip(*measured, strict=True))
                rows.append(
                    {
                        "arm": arm,
                        "batch": batch,
                        "stage_ms": round(stage, 4),
                        "calibrate_ms": round(calibrate, 4),
                        "step_ms": round(step, 4),
                        "floor_ms": round(floor, 4),
                        "step_over_floor": round(step / floor, 2),
                        "precise_over_step": round(precise / step, 2),
                        "bandwidth_tb_s": round(bandwidth / 1e12, 3),
                        "graphs": graphs[arm],
                    }
                )
    return rows


def measure_engine(arm: str, device: str, save: Any) -> None:
    """Rows: tokens a second of a whole engine, the prompt's time included."""
    prompt_tokens, new_tokens, turns = (128, 256, 3) if device == "cuda" else (16, 16, 1)
    batches = (1, 8) if device == "cuda" else (1, 2)
    rows: list[dict] = []
    with shape(DRAFTER, device) as drafter, shape(TARGET, device, vocab_size=vocabulary(drafter)) as target:
        spec = None if arm == "none" else dict(method=arm, model=drafter)
        with engine(target, device, spec, max(batches), prompt_tokens + new_tokens + 16) as llm:
            layers = json.loads((Path(drafter) / "config.json").read_text())["num_hidden_layers"]
            chosen: dict[str, dict] = plans(layers) if arm == "easyspec" else {arm: {}}
            for batch in batches:
                taken: dict[str, list[float]] = {name: [] for name in chosen}
                for turn in range(turns + 1):
                    for name, plan in chosen.items():
                        if plan:
                            llm.collective_rpc("easyspec_configure", kwargs=plan)
                        took = generate(llm, batch, prompt_tokens, new_tokens)
                        if turn:
                            taken[name].append(took)
                for name, seconds in taken.items():
                    rate = batch * new_tokens / median(seconds)
                    rows.append({"arm": name, "batch": batch, "tokens_a_second": round(rate, 1)})
                save(DRAFTER, rows)


def vocabulary(folder: str) -> int:
    return json.loads((Path(folder) / "config.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["stages", "engine"])
    parser.add_argument("of", metavar="DRAFTER|ARM", help="a folder of tests/fixtures/hf_configs, or an engine's arm")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    around = surroundings()

    def save(drafter: str, rows: list[dict]) -> None:
        named = [{"drafter": drafter} | row for row in rows]
        args.json.write_text(json.dumps(around | {"rows": named}, indent=1) + "\n")

    {"stages": measure_stages, "engine": measure_engine}[args.figure](args.of, args.device, save)


if __name__ == "__main__":
    main()
