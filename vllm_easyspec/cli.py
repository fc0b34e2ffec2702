"""The command `vllm-easyspec`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_easyspec.config import ConfigError, EasySpecConfig, LayerParallelConfig
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


def _add_fit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fit = commands.add_parser("fit", help="fit look-ahead maps, which let more layers run side by side")
    fit.add_argument("--drafter", metavar="PATH", required=True, help="a checkpoint's folder")
    fit.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", required=True, help="plain text, or JSONL of prompts"
    )
    fit.add_argument("--output", "-o", metavar="FILE", type=Path, default=Path("lookahead.safetensors"))
    fit.add_argument(
        "--plans",
        metavar="SIZES",
        type=_integers("-"),
        nargs="+",
        help="plans to fit for, such as 1-4-4-1 1-8-1 (default: groups of 4); maps serve shorter groups too",
    )
    fit.add_argument(
        "--longest-group", metavar="N", type=int, default=1, help="also maps for every group of up to N layers"
    )
    fit.add_argument("--rank", metavar="R", type=int, help="of the maps (default: the lowest that fits nearly as well)")
    fit.add_argument("--ranks", metavar="T", type=int, default=1, help="tensor-parallel processes (default: 1)")
    fit.add_argument("--tokens", metavar="N", type=int, default=40_000, help="tokens to read (default: 40000)")
    fit.add_argument("--length", metavar="N", type=int, default=256, help="tokens a sequence (default: 256)")
    fit.add_argument("--num-speculative-tokens", metavar="K", type=int, default=5, help="drafts a round (default: 5)")
    fit.add_argument(
        "--own",
        metavar="SHARE",
        type=float,
        default=0.5,
        help="share of the sequences that the drafter goes on with itself after a quarter (default: 0.5)",
    )
    fit.add_argument("--ridge", type=float, default=1e-3, help="penalty, as a share of a feature's variance")
    fit.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    fit.set_defaults(run=_fit)


def _fit(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_easyspec.support import read_drafter
    from vllm_easyspec.tune.fit import FitSettings, fit

    plan = LayerParallelConfig().plan(read_drafter(args.drafter, None).num_layers)
    settings = FitSettings(
        plans=tuple(map(tuple, args.plans)) if args.plans else (plan.group_sizes,),
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
    print("layer | group start | R2 of the attention map | R2 of the MLP map (block scope)")
    for name, r2 in report["r2"].items():
        kind, start, layer = name.split(".")
        if kind == "attention":
            print(f"{layer:>5} | {start:>11} | {r2:23.2f} | {report['r2'][f'mlp.{start}.{layer}']:.2f}")
    print("plan      | scope     | drafts confirmed by the precise pass: without maps | with")
    for row in report["own_rate"]:
        plan_name = "-".join(map(str, row["group_sizes"]))
        print(f"{plan_name:9} | {row['scope']:9} | {row['without']:50.1%} | {row['with']:.1%}")
    by_rank = ", ".join(f"{r2:.3f} at {rank}" for rank, r2 in report["r2_by_rank"].items())
    print(f"rank {report['rank']} (mean held-out R2 by rank: {by_rank})")
    print(f"wrote {args.output}, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
