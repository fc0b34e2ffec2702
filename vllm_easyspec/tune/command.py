"""The command `vllm-easyspec tune`, from its options to its files."""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_easyspec import plugin
from vllm_easyspec.bench.llm import parse_engine_args
from vllm_easyspec.bench.plot import require_matplotlib
from vllm_easyspec.bench.prompts import read_prompts
from vllm_easyspec.bench.results import check_writable, machine, surroundings, write
from vllm_easyspec.documents import write_whole
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.metrics import plan_json
from vllm_easyspec.tune.options import TuneOptions
from vllm_easyspec.tune.planner import Point
from vllm_easyspec.tune.report import html_report
from vllm_easyspec.tune.tuned_yaml import read_fields, tuned_yaml
from vllm_easyspec.tune.tuner import Findings, Tuner

# Engine arguments that tune sets, and by which of its own options.
TUNES_OWN = {"model": "--model", "tensor_parallel_size": "--tensor-parallel-size", "max_num_seqs": "--batch-sizes"}


def run(options: TuneOptions) -> str:
    """Tune, and write the files that `options` names; returns a summary. Raises `ConfigError` or `BenchmarkError`."""
    plugin.register()
    out = options.out
    for path in (out, options.report, options.json):
        check_writable(path)
    require_matplotlib("--report", options.report)
    if out.resolve() == options.config.resolve():
        raise ConfigError(f"-o {out} is the untuned configuration itself, with which the tuned one is compared")
    engine_args = _engine_args(options.model, options.tensor_parallel_size, options.engine_arguments)
    prompts = read_prompts(options.prompts, engine_args.tokenizer or options.model, options.prompt_tokens)
    tuner = Tuner(engine_args, options, [{"prompt_token_ids": ids} for ids in prompts])
    about = surroundings() | {"target": options.model, "drafter": read_fields(options.config)["model"]}

    def keep(found: Findings) -> None:
        text = tuned_yaml(options.config, out, found.ranges(), _head(found, about, options), _notes(found))
        write_whole(out, text)
        if options.report:
            write_whole(options.report, html_report(found, about, text))
        write(options.json, about | findings_json(found))

    try:
        found = tuner.tune()
        keep(found)
        tuner.compare(out)
        keep(found)  # again, with the comparison
    finally:
        tuner.progress.close()
    return "\n".join([*_results(found), f"Written: {out}" + (f", {options.report}" if options.report else "")])


def _engine_args(model: str, ranks: int, arguments: Sequence[str]) -> EngineArgs:
    engine_args = parse_engine_args("tune", arguments)
    if engine_args.speculative_config is not None:
        raise ConfigError("--speculative-config is not allowed after --: tune tries its own. Give --config")
    for field, instead in TUNES_OWN.items():
        if getattr(engine_args, field) != getattr(EngineArgs, field):
            option = f"--{field.replace('_', '-')}"
            raise ConfigError(f"{option} is not allowed after --. Give tune's own {instead}, before it")
    engine_args.model = model
    engine_args.tensor_parallel_size = ranks
    return engine_args


def _head(found: Findings, about: dict[str, Any], options: TuneOptions) -> list[str]:
    versions = about["versions"]
    ranks = f"--tensor-parallel-size {options.tensor_parallel_size}"
    return [
        "Serve with:",
        f"  vllm serve {options.model} {ranks} --speculative-config {options.out}",
        f"Tuned by: {about['command']}",
        f"On {machine(about)}, vllm {versions['vllm']}, torch {versions['torch']}. Tokens per second "
        + ("by wall-clock:" if found.by_wall else "of the stages' time (calibrate, draft, verify):"),
        *_results(found),
    ]


def _results(found: Findings) -> Iterator[str]:
    """Lines about what was chosen and how it compares."""
    for size, point in found.chosen().items():
        rates = found.rates(size)
        untuned = rates.get(found.untuned[size])
        against = f", {rates[point] / untuned:.2f} times the untuned {found.untuned[size]}" if untuned else ""
        yield f"batch size {size:4}: {point}: {rates[point]:.1f} tokens/s{against}"
    for name, by_size in found.baselines.items():
        rates_of_arm = ", ".join(f"{rate:.1f} at {size}" for size, rate in by_size.items())
        yield f"Engines one after another, by wall-clock: {name} {rates_of_arm}"
    if found.coverage is not None:
        yield f"draft_vocabulary covers {found.coverage:.1%} of the target's answers"
    yield from (f"Mind: {warning}" for warning in found.warnings())
    yield from (f"Not finished: {part}" for part in found.unfinished)
    yield from (f"{name} failed: {why}" for name, why in found.failed.items())


def _notes(found: Findings) -> dict[Point, str]:
    sizes: dict[Point, list[str]] = {}
    for size, point in found.chosen().items():
        sizes.setdefault(point, []).append(str(size))
    return {point: f"measured at batch size {', '.join(measured)}" for point, measured in sizes.items()}


def findings_json(found: Findings) -> dict[str, Any]:
    """All that was measured, as plain JSON."""

    def plan(one: DraftPlan) -> dict[str, Any]:
        return plan_json(one) | {"steps": one.sequential_steps}

    def point(one: Point) -> dict[str, Any]:
        return plan(one.plan) | {"num_speculative_tokens": one.num_drafts}

    return {
        "rates": "wall-clock" if found.by_wall else "of the stages",
        "plans": [
            plan(one) | {"score": found.costs.get(one), "acceptance": acceptance}
            for one, acceptance in found.acceptance.items()
        ],
        "correction_by_k": found.correction,
        "coverage_of_draft_vocabulary": found.coverage,
        "same_answers": found.same_answers,
        "times": [
            {"batch_size": size, "calibrate_ms": t.calibrate, "verify_ms": t.verify, "other_ms": t.other}
            | {"steps": [plan(one) | {"step_ms": took} for one, took in t.step.items()]}
            for size, t in found.times.items()
        ],
        "confirmed": [
            {"batch_size": size} | point(one) | vars(seen)
            for size, points in found.confirmed.items()
            for one, seen in points.items()
        ],
        "chosen": [{"batch_size": size} | point(one) for size, one in found.chosen().items()],
        "untuned": [{"batch_size": size} | point(one) for size, one in found.untuned.items()],
        "wall_clock": found.baselines,
        "failed": found.failed,
        "unfinished": found.unfinished,
    }
