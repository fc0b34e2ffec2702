"""The command `vllm-easyspec`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_easyspec.bench import BenchmarkError
from vllm_easyspec.config import EasySpecConfig, LayerParallelConfig
from vllm_easyspec.drafter.plan import DraftPlan, parse_grouping
from vllm_easyspec.errors import CommandError, ConfigError
from vllm_easyspec.versions import UnsupportedVllmError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 after an error of one line on standard error, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (CommandError, ConfigError, UnsupportedVllmError) as error:
        print(f"vllm-easyspec {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vllm-easyspec {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-easyspec", description="Layer-parallel speculative decoding for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_doctor(commands)
    _add_schema(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_fit(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser("doctor", help="check a configuration without starting an engine")
    doctor.add_argument("config", metavar="CONFIG", help="a path to YAML or JSON, or inline JSON")
    doctor.add_argument("--model", metavar="TARGET", help="the target, to compare vocabularies: a folder or a hub name")
    doctor.add_argument("--tensor-parallel-size", "-tp", metavar="T", type=int, default=1, help="ranks (default: 1)")
    doctor.add_argument("--drafter", metavar="PATH", help="take the drafter from here in place of CONFIG's model")
    doctor.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    doctor.add_argument("--device", choices=["cuda", "cpu"], help="where it will run (default: what vLLM finds here)")
    doctor.add_argument(
        "--prompts", metavar="FILE", type=Path, help="JSON lines, of which to tell what draft_vocabulary covers"
    )
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: the report is the output
    from huggingface_hub.utils import logging

    from vllm_easyspec.bench.prompts import read_prompts
    from vllm_easyspec.doctor import diagnose

    logging.set_verbosity_error()
    config = EasySpecConfig.parse(args.config)
    if args.drafter is not None:
        config = config.model_copy(update={"model": args.drafter})
    prompts = read_prompts(args.prompts, args.model or config.model) if args.prompts else []
    for line in diagnose(config, args.tensor_parallel_size, args.model, args.dtype, args.device, prompts):
        print(line)


def _add_schema(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    schema = commands.add_parser("schema", help="print the JSON schema of a configuration")
    schema.set_defaults(run=_schema)


def _schema(args: argparse.Namespace) -> None:
    print(json.dumps(EasySpecConfig.model_json_schema(), indent=2))


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    benchmarks = commands.add_parser("bench", help="time the drafter").add_subparsers(dest="benchmark", required=True)
    step = benchmarks.add_parser(
        "draft-step", help="one step of the drafter alone, in real ranks with real pages: fuzzy plans against precise"
    )
    step.add_argument("--drafter", metavar="PATH", required=True, help="a checkpoint's folder")
    step.add_argument("--ranks", metavar="T", type=_at_least(1), default=1, help="processes (default: 1)")
    step.add_argument(
        "--plans", metavar="PLAN", type=_grouping, nargs="+", help="such as 1-4-4-1 1-8-1 (default: groups of 4)"
    )
    step.add_argument("--batch", metavar="B,...", type=_integers(","), default=[1, 4, 8, 32])
    step.add_argument(
        "--context", metavar="N,...", type=_integers(","), help="(default: 256,2048, as far as the drafter's goes)"
    )
    step.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    step.add_argument("--load-format", default="auto", help="vLLM's, such as dummy for random weights")
    step.add_argument("--mlp", default="auto", choices=["auto", "tensor", "replicate"])
    step.add_argument(
        "--draft-vocabulary",
        metavar="N",
        type=_at_least(1),
        help="draft from the N lowest ids (default: from all tokens)",
    )
    step.add_argument("--repetitions", type=_at_least(1), default=60)
    _add_output(step)
    step.set_defaults(run=_bench_draft_step)
    engine = benchmarks.add_parser(
        "engine", help="the same prompts through real engines in turn: easyspec against its baselines"
    )
    engine.add_argument("--model", metavar="TARGET", required=True, help="the target: a folder or a hub name")
    engine.add_argument("--config", required=True, help="easyspec's: a path to YAML or JSON, or inline JSON")
    engine.add_argument(
        "--baselines",
        metavar="ARM,...",
        type=_names,
        default=["none", "draft_model", "precise"],
        help="of none, draft_model, precise; all by default. Losslessness is checked against none",
    )
    engine.add_argument("--prompts", metavar="FILE.jsonl", type=Path, help="(default: random token ids)")
    engine.add_argument("--concurrency", metavar="C,...", type=_integers(","), default=[1, 4, 16, 64])
    engine.add_argument("--requests", metavar="N", type=int, default=16, help="at least; two per slot (default: 16)")
    engine.add_argument("--output-tokens", metavar="N", type=int, default=128)
    engine.add_argument(
        "--input-tokens", metavar="N", type=int, help="of a random prompt (default: 256); with --prompts, at most"
    )
    engine.add_argument(
        "--turns", metavar="N", type=int, default=2, help="of each arm, forward and backward (default: 2)"
    )
    engine.add_argument("--tensor-parallel-size", "-tp", metavar="T", type=int, default=1, help="ranks (default: 1)")
    engine.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    engine.add_argument("--load-format", default="auto", help="vLLM's, such as dummy for random weights")
    engine.add_argument(
        "--engine", metavar="JSON", default="{}", help="more of vLLM's engine arguments, for all arms alike"
    )
    _add_output(engine)
    engine.set_defaults(run=_bench_engine)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the result here")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw it, such as result.svg (needs matplotlib)")


def _integers(separator: str) -> Callable[[str], list[int]]:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(separator)]

    return integers


def _grouping(text: str) -> tuple[int, ...]:
    try:
        return parse_grouping(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def _bench_draft_step(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_easyspec.bench import plot, report
    from vllm_easyspec.bench.draft_step import ROOM, measure
    from vllm_easyspec.support import read_drafter

    report.check_writable(args.json)
    plot.check(args.plot)
    shape = read_drafter(args.drafter, None)
    longest = shape.max_position_embeddings - ROOM
    args.context = args.context or [tokens for tokens in (256, 2048) if tokens <= longest] or [longest]
    if max(args.context) > longest:
        raise BenchmarkError(f"--context {max(args.context)} is more than {longest}, for which the drafter has room")
    for sizes in args.plans or []:
        try:
            DraftPlan.of_sizes(shape.num_layers, sizes, name="--plans")
        except ValueError as error:
            raise BenchmarkError(str(error)) from error
    rows = measure(
        args.drafter,
        args.ranks,
        args.plans,
        args.batch,
        args.context,
        dtype=args.dtype,
        load_format=args.load_format,
        mlp=args.mlp,
        repetitions=args.repetitions,
        draft_vocabulary=args.draft_vocabulary,
    )
    report.write(args.json, report.surroundings() | {"settings": _settings(args), "rows": rows})
    if args.plot:
        plot.draft_step(rows, args.plot)
    header = ("scope", "plan", "ranks", "batch", "context", "step ms", "precise ms", "speedup", "floor ms")
    cells = (
        (
            row["scope"],
            row["plan"],
            row["ranks"],
            row["batch"],
            row["context"],
            f"{row['step_ms']:.3f}",
            f"{row['precise_ms']:.3f}",
            f"{row['speedup']:.2f}",
            f"{row['floor_ms']:.3f}",
        )
        for row in rows
    )
    print(report.table(header, cells))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON, without those that say where the result goes."""
    hidden = ("run", "json", "plot")
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in hidden
    }


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _bench_engine(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_easyspec.bench import engine, plot, report

    report.check_writable(args.json)
    plot.check(args.plot)
    config, workload, arguments = engine.prepare(args)
    result = report.surroundings() | {"settings": _settings(args)}

    def keep(measured: dict[str, Any]) -> None:
        result.update(measured)
        report.write(args.json, result)

    stopped: BenchmarkError | None = None
    try:
        configs = engine.speculative_configs(config, args.baselines)
        engine.run(args.model, configs, workload, arguments, args.turns, keep, _progress)
    except BenchmarkError as error:
        stopped = error
    except KeyboardInterrupt:
        stopped = BenchmarkError("interrupted")
    if "rows" in result:
        print(engine.describe(result))
        if args.plot:
            plot.engine(result["rows"], args.plot)
        if lossy := engine.lossy_arms(result):
            raise BenchmarkError(f"in float32 outputs of {', '.join(lossy)} differ from the target's own; see above")
    if stopped:
        kept = f" ({args.json} holds what was measured until then)" if args.json and "rows" in result else ""
        raise BenchmarkError(f"{stopped}{kept}")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tune = commands.add_parser(
        "tune", help="find the plan and the K that draft fastest for a pair, by batch size, and write them as YAML"
    )
    tune.add_argument("--model", metavar="TARGET", required=True, help="a folder or a hub name")
    tune.add_argument("--config", metavar="YAML", type=Path, required=True, help="the untuned configuration")
    tune.add_argument(
        "--prompts", metavar="FILE", type=Path, required=True, help="JSON lines with prompt, text or turns"
    )
    tune.add_argument(
        "-o", dest="out", metavar="YAML", type=Path, required=True, help="write the tuned configuration here"
    )
    tune.add_argument("--report", metavar="HTML", type=Path, help="write a report with plots here (needs matplotlib)")
    tune.add_argument("--json", metavar="FILE", type=Path, help="keep all that was measured here")
    tune.add_argument("--batch-sizes", metavar="B,...", type=_integers(","), default=[1, 2, 4, 8, 16])
    tune.add_argument("--time-budget", metavar="SECONDS", type=float, help="for all, engine starts included")
    tune.add_argument("--tensor-parallel-size", "-tp", metavar="T", type=int, default=1, help="ranks (default: 1)")
    tune.add_argument(
        "--max-drafts", metavar="K", type=_at_least(2), help="largest K tried (default: the YAML's, at least 8)"
    )
    tune.add_argument("--plans", metavar="N", type=_at_least(0), default=12, help="plans to measure (default: 12)")
    tune.add_argument(
        "--max-group", metavar="N", type=_at_least(1), default=8, help="layers in a group (default: at most 8)"
    )
    tune.add_argument(
        "--prompt-tokens", metavar="N", type=_at_least(1), default=256, help="of a prompt (default: at most 256)"
    )
    tune.add_argument(
        "--new-tokens", metavar="N", type=_at_least(8), default=64, help="to answer a prompt with (default: 64)"
    )
    tune.add_argument("--rounds", metavar="N", type=_at_least(1), default=8, help="of a plan at a time (default: 8)")
    tune.add_argument("--turns", metavar="N", type=_at_least(1), default=3, help="that plans take (default: 3)")
    tune.add_argument("--temperature", type=float, default=0.0, help="of the target's sampling (default: 0, greedy)")
    tune.add_argument(
        "--rate", choices=["wall", "stages"], help="time that choices rest on (default: wall; on a CPU stages)"
    )
    tune.add_argument(
        "--baselines",
        metavar="NAME,...",
        default="untuned,draft_model,none",
        help="engines to compare with at the end (default: untuned,draft_model,none; an empty text for no comparison)",
    )
    tune.add_argument("engine_arguments", nargs="*", metavar="-- VLLM_OPTION", help="such as -- --dtype bfloat16")
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_easyspec.tune.command import run

    print(run(args))


def _add_fit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fit = commands.add_parser(
        "fit",
        help="fit look-ahead maps, which let more layers run side by side; with --vocabulary, count the tokens that "
        "are worth drafting",
    )
    fit.add_argument("--drafter", metavar="PATH", required=True, help="a checkpoint's folder")
    fit.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", required=True, help="plain text, or JSONL of prompts"
    )
    fit.add_argument(
        "--output", "-o", metavar="FILE", type=Path, help="(default: lookahead.safetensors, or vocabulary.json)"
    )
    fit.add_argument(
        "--vocabulary", metavar="N", type=_at_least(1), help="write a draft vocabulary of N tokens in place of maps"
    )
    fit.add_argument("--target", metavar="TARGET", help="with --vocabulary: count in this model's answers to the text")
    fit.add_argument(
        "--plans",
        metavar="PLAN",
        type=_grouping,
        nargs="+",
        help="plans to fit for, such as 1-4-4-1 1-8-1 (default: groups of 4); maps serve shorter groups too",
    )
    fit.add_argument(
        "--longest-group", metavar="N", type=_at_least(1), default=1, help="also maps for every group of up to N layers"
    )
    fit.add_argument("--rank", metavar="R", type=_at_least(1), help="(default: the lowest that fits nearly as well)")
    fit.add_argument("--ranks", metavar="T", type=_at_least(1), default=1, help="processes (default: 1)")
    fit.add_argument("--tokens", metavar="N", type=_at_least(1), default=40_000, help="tokens to read (default: 40000)")
    fit.add_argument("--length", metavar="N", type=int, default=256, help="tokens a sequence (default: 256)")
    fit.add_argument(
        "--num-speculative-tokens", metavar="K", type=_at_least(2), default=5, help="drafts per round (default: 5)"
    )
    fit.add_argument(
        "--own",
        metavar="SHARE",
        type=float,
        default=0.5,
        help="share of the sequences that the drafter goes on with itself after a quarter (default: 0.5)",
    )
    fit.add_argument("--ridge", type=float, default=1e-3, help="penalty, as a share of a feature's variance")
    fit.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    fit.add_argument(
        "engine_arguments",
        nargs="*",
        metavar="-- VLLM_OPTION",
        help="of the target's engine, such as -- --dtype bfloat16",
    )
    fit.set_defaults(run=_fit)


def _fit(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_easyspec.bench.report import check_writable, table
    from vllm_easyspec.support import read_drafter
    from vllm_easyspec.tune.fit import FitSettings, fit

    if args.vocabulary is not None:
        return _count_vocabulary(args)
    if args.target is not None or args.engine_arguments:
        given = "what stands after --" if args.target is None else f"--target {args.target}"
        raise ConfigError(f"{given} is not allowed without --vocabulary: maps are fitted on the drafter alone")
    args.output = args.output or Path("lookahead.safetensors")
    check_writable(args.output)
    plan = LayerParallelConfig().draft_plan(read_drafter(args.drafter, None).num_layers)
    settings = FitSettings(
        plans=tuple(args.plans) if args.plans else (plan.group_sizes,),
        longest_group=args.longest_group,
        rank=args.rank,
        tokens=args.tokens,
        length=args.length,
        num_drafts=args.num_speculative_tokens,
        own=args.own,
        ridge=args.ridge,
        dtype=args.dtype,
    )
    report = fit(args.drafter, args.text, args.output, args.ranks, settings)
    r2 = report["r2"]
    pairs = [name.split(".")[1:] for name in r2 if name.startswith("attention.")]
    print(
        table(
            ("layer", "group start", "R2 of the attention map", "R2 of the MLP map (block scope)"),
            [(i, g, f"{r2[f'attention.{g}.{i}']:.2f}", f"{r2[f'mlp.{g}.{i}']:.2f}") for g, i in pairs],
        )
    )
    print("\nDrafts that the drafter's own precise pass confirms:")
    print(
        table(
            ("plan", "scope", "without maps", "with"),
            [(row["plan"], row["scope"], f"{row['without']:.1%}", f"{row['with']:.1%}") for row in report["own_rate"]],
        )
    )
    by_rank = ", ".join(f"{r2:.3f} at {rank}" for rank, r2 in report["r2_by_rank"].items())
    print(f"rank {report['rank']} (mean held-out R2 by rank: {by_rank})")
    print(f"wrote {args.output}, {args.output.stat().st_size:,} bytes")


def _count_vocabulary(args: argparse.Namespace) -> None:
    from vllm_easyspec.bench.report import check_writable
    from vllm_easyspec.tune.vocabulary import CountSettings, count

    output = args.output or Path("vocabulary.json")
    check_writable(output)
    settings = CountSettings(size=args.vocabulary, tokens=args.tokens, prompt_tokens=args.length, ranks=args.ranks)
    about = count(args.drafter, args.text, output, settings, args.target, args.engine_arguments)
    what = "of the target's answers" if args.target else "of text"
    print(
        f"{about['tokens']:,} of {about['vocab_size']:,} tokens, counted in {about['counted_tokens']:,} {what}.\n"
        f"Counted in four fifths of it, they cover {about['coverage']:.2%} of the {about['held_out_tokens']:,} tokens "
        f"of the rest; as many of the lowest ids cover {about['coverage_of_lowest_ids']:.2%}.\n"
        f"wrote {output}, {output.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
