"""The command `vllm-easyspec`: its parser, and the function of each command, which imports vLLM if it needs it."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_easyspec.bench.options import DraftStepOptions, EngineOptions
from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.errors import CommandError, ConfigError
from vllm_easyspec.options import DTYPES, add_options, option, parsed
from vllm_easyspec.tune.options import FitOptions, TuneOptions
from vllm_easyspec.versions import UnsupportedVllmError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 after an error of one line on standard error, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: the report is the output
    try:
        print(arguments.run(parsed(arguments.options, arguments)))
    except (CommandError, ConfigError, UnsupportedVllmError) as error:
        print(f"vllm-easyspec {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vllm-easyspec {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-easyspec", description="Layer-parallel speculative decoding for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(within: Any, name: str, help: str, options: type, run: Callable[..., str]) -> None:
        command = within.add_parser(name, help=help)
        add_options(command, options)
        command.set_defaults(run=run, options=options)

    doctor = "check a configuration without starting an engine, or a running server"
    add(commands, "doctor", doctor, DoctorOptions, _doctor)
    add(commands, "schema", "print the JSON schema of a configuration", NoOptions, _schema)
    benchmarks = commands.add_parser("bench", help="time the drafter").add_subparsers(dest="benchmark", required=True)
    step = "one step of the drafter alone, in real ranks with real pages: fuzzy plans against precise"
    add(benchmarks, "draft-step", step, DraftStepOptions, _bench_draft_step)
    engine = "the same prompts through real engines in turn: easyspec against its baselines"
    add(benchmarks, "engine", engine, EngineOptions, _bench_engine)
    tune = "find the plan and the K that draft fastest for a pair, by batch size, and write them as YAML"
    add(commands, "tune", tune, TuneOptions, _tune)
    fit = (
        "fit look-ahead maps, which let more layers run side by side; with --vocabulary, count the tokens that are "
        "worth drafting"
    )
    add(commands, "fit", fit, FitOptions, _fit)
    return parser


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a command that has none."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `doctor`."""

    config: str | None = option(
        "a path to YAML or JSON, a name in configs/, or inline JSON",
        "config",
        default=None,
        nargs="?",
        metavar="CONFIG",
    )
    live: str | None = option(
        "in place of CONFIG: the address of a running server, to tell from its metrics whether speculation pays",
        default=None,
        metavar="URL",
    )
    model: str | None = option(
        "the target, to compare vocabularies: a folder or a hub name", default=None, metavar="TARGET"
    )
    tensor_parallel_size: int = option("ranks", "--tensor-parallel-size", "-tp", default=1, metavar="T")
    drafter: str | None = option("take the drafter from here in place of CONFIG's model", default=None, metavar="PATH")
    dtype: str = option(default="auto", choices=("auto", *DTYPES))
    device: str | None = option(
        "where it will run (default: what vLLM finds here)", default=None, choices=["cuda", "cpu"]
    )
    prompts: Path | None = option(
        "JSON lines, of which to tell what draft_vocabulary covers", default=None, metavar="FILE"
    )


def _doctor(options: DoctorOptions) -> str:
    if options.live is not None and options == DoctorOptions(live=options.live):
        from vllm_easyspec.live import diagnose_live

        return "\n".join(diagnose_live(options.live))
    if options.config is None or options.live is not None:
        raise CommandError("give either CONFIG, with its options, or --live URL, which has none")

    config = EasySpecConfig.parse(options.config)
    if options.drafter is not None:
        config = config.model_copy(update={"model": options.drafter})

    from huggingface_hub.utils import logging

    from vllm_easyspec.bench.prompts import read_prompts
    from vllm_easyspec.doctor import diagnose

    logging.set_verbosity_error()
    prompts = read_prompts(options.prompts, options.model or config.model) if options.prompts else []
    ranks = options.tensor_parallel_size
    return "\n".join(diagnose(config, ranks, options.model, options.dtype, options.device, prompts))


def _schema(_: NoOptions) -> str:
    return json.dumps(EasySpecConfig.model_json_schema(), indent=2)


def _bench_draft_step(options: DraftStepOptions) -> str:
    from vllm_easyspec.bench.command import draft_step

    return draft_step(options)


def _bench_engine(options: EngineOptions) -> str:
    from vllm_easyspec.bench.command import engines

    table, error = engines(options, _progress)
    if error is not None:
        print(table, end="\n" if table else "")
        raise error
    return table


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tune(options: TuneOptions) -> str:
    from vllm_easyspec.tune.command import run

    return run(options)


def _fit(options: FitOptions) -> str:
    if options.vocabulary is not None:
        from vllm_easyspec.tune.vocabulary import run as count

        return count(options)
    from vllm_easyspec.tune.fit import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
