"""`vllm-easyspec bench` from its options to its table and files."""

from collections.abc import Callable
from typing import Any

from vllm_easyspec.bench import BenchmarkError, engine, plot, results
from vllm_easyspec.bench.draft_step import ROOM, measure
from vllm_easyspec.bench.options import DraftStepOptions, EngineOptions
from vllm_easyspec.config import RuntimeOptions
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.options import as_json
from vllm_easyspec.support import read_drafter


def draft_step(options: DraftStepOptions) -> str:
    """Measure, and write the files that `options` names; returns the table. Raises `BenchmarkError`."""
    results.check_writable(options.json)
    plot.check(options.plot)
    shape = read_drafter(options.drafter, None)
    longest = shape.max_position_embeddings - ROOM
    contexts = options.context or tuple(tokens for tokens in (256, 2048) if tokens <= longest) or (longest,)
    if max(contexts) > longest:
        raise BenchmarkError(f"--context {max(contexts)} is more than {longest}, for which the drafter has room")
    for sizes in options.plans or ():
        try:
            DraftPlan.of_sizes(shape.num_layers, sizes, name="--plans")
        except ValueError as error:
            raise BenchmarkError(str(error)) from error
    rows = measure(
        options.drafter,
        options.ranks,
        options.plans,
        options.batch,
        contexts,
        dtype=options.dtype,
        load_format=options.load_format,
        options=RuntimeOptions.model_validate(
            {
                "layer_parallel": {"mlp": options.mlp},
                "draft_vocabulary": options.draft_vocabulary,
                "quantization": options.quantization,
            }
        ),
        repetitions=options.repetitions,
    )
    settings = as_json(options, "json", "plot") | {"context": contexts}
    results.write(options.json, results.surroundings() | {"settings": settings, "rows": rows})
    if options.plot:
        plot.draft_step(rows, options.plot)
    names = ("scope", "plan", "ranks", "batch", "context")
    times = {"step_ms": 3, "precise_ms": 3, "speedup": 2, "floor_ms": 3}  # and digits
    header = [*names, *(name.replace("_", " ") for name in times)]
    cells = ([*map(row.get, names), *(f"{row[name]:.{digits}f}" for name, digits in times.items())] for row in rows)
    return results.table(header, cells)


def engines(options: EngineOptions, say: Callable[[str], None]) -> tuple[str, BenchmarkError | None]:
    """Measure, and write the files that `options` names; returns the table, and what ended it early or was found wrong.

    say: called with progress messages. Raises `BenchmarkError` or `ConfigError` for what can't be measured.
    """
    results.check_writable(options.json)
    plot.check(options.plot)
    config, workload, arguments = engine.prepare(options)
    result = results.surroundings() | {"settings": as_json(options, "json", "plot")}

    def keep(measured: dict[str, Any]) -> None:
        result.update(measured)
        results.write(options.json, result)

    why = None
    try:
        configs = engine.speculative_configs(config, options.baselines)
        engine.run(options.model, configs, workload, arguments, options.turns, keep, say)
    except BenchmarkError as error:
        why = str(error)
    except KeyboardInterrupt:
        why = "interrupted"
    if "rows" not in result:
        return "", BenchmarkError(why)
    if options.plot:
        plot.engine(result["rows"], options.plot)
    if lossy := engine.lossy_arms(result):
        why = f"in float32 outputs of {', '.join(lossy)} differ from the target's own; see above"
    elif why and options.json:
        why += f" ({options.json} holds what was measured until then)"
    return engine.describe(result), BenchmarkError(why) if why else None
