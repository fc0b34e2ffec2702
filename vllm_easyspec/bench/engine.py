"""`bench engine`: the same prompts through real engines in turn, one alive at a time.

Arms, in this order: `none` (the target alone), `draft_model` (vLLM's own, the same drafter), `precise` (easyspec with
groups of one), `easyspec` (the configuration as given). Turns go through the arms forward, then backward, and so on, so
that drift of the machine affects all alike; an arm at the end of one turn and the start of the next keeps its engine.
A turn of an arm measures all concurrency levels, each after warm-up requests. Decoding is greedy, to a fixed
number of tokens. The expected outputs are those of `none`'s first turn at the same concurrency, so its later turns
show whether the target alone is repeatable.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_hf_text_config
from vllm.usage.usage_lib import UsageContext

from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.bench.llm import Engine, bind_cpus
from vllm_easyspec.bench.options import EngineOptions
from vllm_easyspec.bench.prompts import random_prompts, read_prompts
from vllm_easyspec.bench.results import from_here, table
from vllm_easyspec.bench.serving import Level, compare, serve, summary
from vllm_easyspec.bench.step_clock import StepClock
from vllm_easyspec.compat import remove_worker_extension
from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.support import read_hf_config

WARM_UP_TOKENS = 16
ON_CPU = (
    "On a CPU vLLM's Triton kernels run as plain PyTorch or in Triton's interpreter, and there are no CUDA graphs: the "
    "times say little about a GPU's."
)
SYNTHETIC = "Acceptance is synthetic, so outputs can't be the target's own: losslessness is not checked."
ENGINE_EXAMPLE = 'Write vLLM\'s engine arguments as JSON, such as {"kv_cache_memory_bytes": 268435456}'
NOTHING_EXPECTED = "Losslessness is not checked: it needs the baseline none."


@dataclass(frozen=True)
class Workload:
    """The requests for every arm."""

    prompts: list[list[int]]
    concurrency: Sequence[int]
    output_tokens: int
    requests: int  # at least this many per level, and at least two per slot

    def level(self, concurrency: int) -> list[list[int]]:
        """The prompts of a level, repeated from the first if there are fewer."""
        count = max(self.requests, 2 * concurrency)
        return list(itertools.islice(itertools.cycle(self.prompts), count))


@dataclass
class Measured:
    """Results of one arm at one concurrency, a value per turn."""

    levels: list[Level] = field(default_factory=list)
    speculation: list[dict[str, Any]] = field(default_factory=list)


Results = dict[tuple[str, int], Measured]  # by arm and concurrency


def speculative_configs(config: EasySpecConfig, baselines: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Each arm's `speculative_config`, in the order of a turn."""
    # As the user gave them: easyspec's defaults for vLLM's fields are not part of the baseline.
    draft_model = config.draft_model()
    options = {name: value for name, value in config.to_json().items() if name != "lookahead"}
    one_by_one = {"group_size": 1, "mlp": config.layer_parallel.mlp}
    arms: dict[str, dict[str, Any] | None] = {
        "none": None,
        "draft_model": draft_model,
        "precise": draft_model | options | {"method": "easyspec", "layer_parallel": one_by_one},
    }
    return {name: arm for name, arm in arms.items() if name in baselines} | {"easyspec": config.to_dict()}


def prepare(options: EngineOptions) -> tuple[EasySpecConfig, Workload, dict[str, Any]]:
    """The configuration, the work, and vLLM's engine arguments.

    Raises `BenchmarkError` or `ConfigError` for what can't be measured.
    """
    config = EasySpecConfig.parse(options.config)
    config.check_model()
    count = max(options.requests, 2 * max(options.concurrency))
    prompts = load_prompts(options.prompts, options.model, config.model, count, options.input_tokens)
    arguments = {
        "tensor_parallel_size": options.tensor_parallel_size,
        "dtype": options.dtype,
        "load_format": options.load_format,
        "max_model_len": longest_sequence(options.model, prompts, options.output_tokens, config.num_speculative_tokens),
    } | _more_arguments(options.engine)
    return config, Workload(prompts, options.concurrency, options.output_tokens, options.requests), arguments


def _more_arguments(text: str) -> dict[str, Any]:
    try:
        more = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"--engine {text} is not JSON ({error.msg}). {ENGINE_EXAMPLE}") from error
    if not isinstance(more, dict):
        raise BenchmarkError(f"--engine {text} is not a mapping. {ENGINE_EXAMPLE}")
    if ours := sorted({"model", "speculative_config", "worker_extension_cls", "disable_log_stats"} & set(more)):
        raise BenchmarkError(f"--engine holds {', '.join(ours)}, which the benchmark sets itself. Remove it")
    return more


def run(
    model: str,
    configs: Mapping[str, dict[str, Any] | None],
    workload: Workload,
    engine_arguments: dict[str, Any],
    turns: int,
    report: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all arms. Returns `{arms, notes, rows}`, and gives it to `report` after each level.

    configs: each arm's `speculative_config`, in the order of a turn; None is no speculation.
    Raises `BenchmarkError` if an engine doesn't start.
    """
    synthetic = any(arm and arm.get("rejection_sample_method") == "synthetic" for arm in configs.values())
    notes = [
        note
        for applies, note in (
            (current_platform.is_cpu(), ON_CPU),
            (synthetic, SYNTHETIC),
            ("none" not in configs and not synthetic, NOTHING_EXPECTED),
        )
        if applies
    ]
    bind_cpus(engine_arguments.get("tensor_parallel_size", 1))
    arms: dict[str, Any] = {}
    results: Results = {}

    def result() -> dict[str, Any]:
        return {"arms": arms, "notes": notes, "rows": _rows(results, checked=not synthetic)}

    for name, visits in itertools.groupby(visiting_order(list(configs), turns)):
        say(f"{name}: starting")
        with _started(name, model, configs[name], engine_arguments) as engine:
            arms[name] = {"speculative_config": _shown(configs[name])} | engine.rpc("bench_attach")
            for _, concurrency in itertools.product(visits, workload.concurrency):
                measured = _measure(engine, name, workload, concurrency)
                kept = results.setdefault((name, concurrency), Measured())
                kept.levels.append(measured[0])
                kept.speculation.append(measured[1])
                say(f"{name}: concurrency {concurrency}: {measured[0].tokens_a_second:.1f} tokens/s")
                report(result())
    return result()


def visiting_order(arms: Sequence[str], turns: int) -> list[str]:
    """Arms forward, backward, forward ..."""
    return [arm for turn in range(turns) for arm in (arms if turn % 2 == 0 else reversed(arms))]


def lossy_arms(result: dict[str, Any]) -> list[str]:
    """Arms that were not lossless: in float32 every output must be the target's own."""
    return sorted(
        {
            row["arm"]
            for row in result["rows"]
            if row["lossless"] is False and result["arms"][row["arm"]]["dtype"] == "float32"
        }
    )


def load_prompts(path: Path | None, model: str, drafter: str, count: int, tokens: int | None) -> list[list[int]]:
    """The file's prompts, or `count` random ones of `tokens` ids that both models have."""
    if path is not None:
        return read_prompts(path, model, tokens)
    sizes = [_text_config(name).vocab_size for name in (model, drafter)]
    return random_prompts(count, tokens or 256, min(sizes))


def longest_sequence(model: str, prompts: list[list[int]], output_tokens: int, drafts: int) -> int:
    """Room for the longest answer and the drafts after it, within the model's own limit.

    Raises `BenchmarkError` if the longest answer doesn't fit.
    """
    needed = max(map(len, prompts)) + output_tokens
    limit = getattr(_text_config(model), "max_position_embeddings", None) or needed + drafts
    if needed > limit:
        raise BenchmarkError(
            f"the longest prompt and its answer are {needed} tokens, and {model} has {limit} positions. Lower "
            "--input-tokens or --output-tokens"
        )
    return min(needed + drafts, limit)


def _shown(config: dict[str, Any] | None) -> dict[str, Any] | None:
    return config and {name: from_here(value) if isinstance(value, str) else value for name, value in config.items()}


def _text_config(model: str) -> Any:
    return get_hf_text_config(read_hf_config(model, revision=None))


@contextmanager
def _started(
    name: str, model: str, speculative_config: dict[str, Any] | None, arguments: dict[str, Any]
) -> Iterator[Engine]:
    fixed: dict[str, Any] = dict(
        skip_tokenizer_init=True,
        disable_log_stats=False,  # they include acceptance, in every arm
        worker_extension_cls=f"{StepClock.__module__}.{StepClock.__name__}",
        speculative_config=speculative_config,
    )
    # Prompts repeat at every level and in every turn.
    defaults: dict[str, Any] = dict(enable_prefix_caching=False, use_tqdm_on_load=False)
    try:
        engine = Engine(EngineArgs(model, **(defaults | arguments | fixed)), usage_context=UsageContext.LLM_CLASS)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise BenchmarkError(f"the engine of {name} did not start: {' '.join(str(error).split()):.600}") from error
    try:
        with engine:
            yield engine
    finally:
        remove_worker_extension(StepClock)  # where its worker was in this process


def _measure(engine: Engine, name: str, workload: Workload, concurrency: int) -> tuple[Level, dict[str, Any]]:
    prompts = workload.level(concurrency)
    serve(engine.llm, prompts[:concurrency], concurrency, min(WARM_UP_TOKENS, workload.output_tokens))
    ours = name not in ("none", "draft_model")
    engine.rpc("bench_times")
    if ours:
        engine.rpc("easyspec_stats", reset=True)
    before = _drafted(engine.llm)
    level = serve(engine.llm, prompts, concurrency, workload.output_tokens)
    drafts, *accepted = (after - earlier for after, earlier in zip(_drafted(engine.llm), before, strict=True))
    found = {"drafts": drafts, "accepted_at": accepted, **engine.rpc("bench_times")}
    if ours:
        found["calibrate"] = engine.rpc("easyspec_stats")["stage_ms"]["calibrate"]
    return level, found


def _drafted(llm: Any) -> list[int]:
    """The counts of vLLM since the engine's start: rounds of a request in which drafts were tested, then how many of
    them were accepted at each position. Zeros for an engine that doesn't speculate."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in metrics:
        return [0]
    positions = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return [metrics["vllm:spec_decode_num_drafts"].value, *positions]


def _rows(results: Results, checked: bool) -> list[dict[str, Any]]:
    rows = []
    for (arm, concurrency), measured in results.items():
        reference = results.get(("none", concurrency)) if checked else None
        outputs = None
        if reference is not None:
            expected = reference.levels[0].outputs
            outputs = [compare(expected, level.outputs) for level in measured.levels]
        rows.append(
            {"arm": arm, "concurrency": concurrency}
            | summary(measured.levels)
            | _speculation(measured.speculation)
            | {
                "digest": _digest(measured.levels[0].outputs),
                "lossless": None if outputs is None else all(turn["first_difference"] is None for turn in outputs),
                "outputs_by_turn": outputs,
            }
        )
    return rows


def _digest(outputs: list[list[int]]) -> str:
    """A hash by which to see whether two runs gave the same tokens."""
    return hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:16]


def _speculation(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance over all turns; medians of the turns' median times of rank 0, in milliseconds."""
    drafts = sum(turn["drafts"] for turn in turns)
    accepted = [sum(counts) for counts in zip(*(turn["accepted_at"] for turn in turns), strict=True)]

    def stage(name: str) -> float | None:
        times = [turn[name] for turn in turns if turn.get(name) is not None]
        return round(median(times), 3) if times else None

    draft, verify = stage("draft"), stage("verify")
    return {
        "acceptance": [round(count / drafts, 4) for count in accepted] if drafts else None,
        "tokens_a_round": round(1 + sum(accepted) / drafts, 3) if drafts else None,
        "draft_ms": draft,
        "calibrate_ms": stage("calibrate"),
        "verify_ms": verify,
        "draft_share": round(draft / (draft + verify), 3) if draft and verify else None,
    }


def describe(result: dict[str, Any]) -> str:
    """The table, what vLLM resolved for each arm, differing outputs, and the notes."""
    header = (
        "arm", "concurrency", "tokens/s", "TTFT ms", "p99", "TPOT ms", "p99", "ITL ms", "p99", "tokens per round",
        "acceptance by position", "draft ms", "verify ms", "draft share", "equal outputs",
    )  # fmt: skip
    lines = [table(header, map(_cells, result["rows"])), ""]
    lines += [f"{name}: {_engine_state(arm)}" for name, arm in result["arms"].items()]
    lines += [difference for row in result["rows"] for difference in _differences(row)]
    return "\n".join(lines + result["notes"])


def _cells(row: dict[str, Any]) -> list[Any]:
    latencies = [row[key][which] for key in ("ttft_ms", "tpot_ms", "itl_ms") for which in ("median", "p99")]
    acceptance, outputs = row["acceptance"], row["outputs_by_turn"]
    return [
        row["arm"],
        row["concurrency"],
        f"{row['tokens_a_second']:.1f}",
        *(None if value is None else f"{value:.2f}" for value in latencies),
        None if acceptance is None else f"{row['tokens_a_round']:.2f}",
        None if acceptance is None else " ".join(f"{share:.2f}" for share in acceptance),
        *(None if row[key] is None else f"{row[key]:.2f}" for key in ("draft_ms", "verify_ms", "draft_share")),
        None if outputs is None else "{}/{}".format(*(sum(turn[key] for turn in outputs) for key in ("equal", "of"))),
    ]


def _engine_state(arm: dict[str, Any]) -> str:
    state = f"compilation {arm['compilation_mode']}, CUDA graphs {arm['cudagraph_mode']}, {arm['dtype']}"
    if "speculator" not in arm:
        return state
    compiled = "compiled" if arm["speculator_compiled"] else "not compiled"
    graphs = arm["speculator_graphs"]
    return f"{state}; {arm['speculator']}'s drafter {compiled}, {graphs or 'no'} CUDA graphs of its own"


def _differences(row: dict[str, Any]) -> Iterator[str]:
    for turn, outputs in enumerate(row["outputs_by_turn"] or [], 1):
        if first := outputs["first_difference"]:
            yield (
                f"{row['arm']}, concurrency {row['concurrency']}, turn {turn}: {outputs['of'] - outputs['equal']} of "
                f"{outputs['of']} outputs differ from the target's own, first request {first['request']} at token "
                f"{first['position']}: {first['found']} in place of {first['expected']}"
            )
