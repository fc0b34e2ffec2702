"""The command `vllm-easyspec`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_easyspec.config import ConfigError, EasySpecConfig
from vllm_easyspec.versions import UnsupportedVllmError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 1 after an error of one line on standard error."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ConfigError, UnsupportedVllmError) as error:
        print(f"vllm-easyspec {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-easyspec", description="Layer-parallel speculative decoding for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_doctor(commands)
    _add_schema(commands)
    _add_bench(commands)
    _add_tune(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser("doctor", help="check a configuration without starting an engine")
    doctor.add_argument("config", metavar="CONFIG", help="a path to YAML or JSON, or inline JSON")
    doctor.add_argument("--model", metavar="TARGET", help="the target, to compare vocabularies: a folder or a hub name")
    doctor.add_argument("--tensor-parallel-size", "-tp", metavar="T", type=int, default=1, help="ranks (default: 1)")
    doctor.add_argument("--drafter", metavar="PATH", help="take the drafter from here in place of CONFIG's model")
    doctor.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    doctor.add_argument("--device", choices=["cuda", "cpu"], help="where it will run (default: what vLLM finds here)")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: the report is the output
    from huggingface_hub.utils import logging

    from vllm_easyspec.doctor import diagnose

    logging.set_verbosity_error()
    config = EasySpecConfig.parse(args.config)
    if args.drafter is not None:
        config = config.model_copy(update={"model": args.drafter})
    for line in diagnose(config, args.tensor_parallel_size, args.model, args.dtype, args.device):
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
    step.add_argument("--ranks", metavar="T", type=int, default=1, help="tensor-parallel processes (default: 1)")
    step.add_argument(
        "--plans", metavar="SIZES", type=_integers("-"), nargs="+", help="such as 1-4-4-1 1-8-1 (default: groups of 4)"
    )
    step.add_argument("--batch", metavar="B,...", type=_integers(","), default=[1, 4, 8, 32])
    step.add_argument("--context", metavar="N,...", type=_integers(","), default=[256, 2048])
    step.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    step.add_argument("--load-format", default="auto", help="vLLM's, such as dummy for random weights")
    step.add_argument("--mlp", default="auto", choices=["auto", "tensor", "replicate"])
    step.add_argument("--repetitions", type=int, default=60)
    step.add_argument("--json", metavar="FILE", help="keep the result here")
    step.set_defaults(run=_bench_draft_step)


def _integers(separator: str) -> Callable[[str], list[int]]:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(separator)]

    return integers


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def _bench_draft_step(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_easyspec.bench.draft_step import measure
    from vllm_easyspec.bench.report import surroundings

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
    )
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "json")}
    result = surroundings(" ".join(["vllm-easyspec", *sys.argv[1:]])) | {"settings": settings, "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print("scope     | plan      | ranks | batch | context | step ms | precise ms | speedup | floor ms")
    for row in rows:
        plan = "-".join(map(str, row["group_sizes"]))
        print(
            f"{row['scope']:9} | {plan:9} | {row['ranks']:5} | {row['batch']:5} | {row['context']:7} | "
            f"{row['step_ms']:7.3f} | {row['precise_ms']:10.3f} | {row['speedup']:7.2f} | {row['floor_ms']:8.3f}"
        )


def _add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tune = commands.add_parser(
        "tune", help="find the plan and the K that draft fastest for a pair, by batch size, and write them as YAML"
    )
    tune.add_argument("--model", metavar="TARGET", required=True, help="a folder or a hub name")
    tune.add_argument("--config", metavar="YAML", required=True, help="the untuned configuration")
    tune.add_argument(
        "--prompts", metavar="FILE", required=True, help="JSON lines with prompt, text or turns; or lines"
    )
    tune.add_argument("-o", dest="out", metavar="YAML", required=True, help="write the tuned configuration here")
    tune.add_argument("--report", metavar="HTML", help="write a report with plots here")
    tune.add_argument("--json", metavar="FILE", help="keep all that was measured here")
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


if __name__ == "__main__":
    sys.exit(main())
