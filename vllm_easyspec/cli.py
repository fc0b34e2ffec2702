"""The command `vllm-easyspec`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

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


if __name__ == "__main__":
    sys.exit(main())
