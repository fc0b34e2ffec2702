"""Options of `vllm-easyspec bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vllm_easyspec.config import Quantization
from vllm_easyspec.options import DTYPES, at_least, grouping, integers, names, option

BASELINES = ("none", "draft_model", "precise")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The files of a result."""

    json: Path | None = option("save the result here", default=None, metavar="FILE")
    plot: Path | None = option("draw it, such as result.svg (needs matplotlib)", default=None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class DraftStepOptions(OutputOptions):
    """Options of `bench draft-step`."""

    drafter: str = option("a checkpoint's folder", metavar="PATH")
    ranks: int = option("processes", default=1, metavar="T", type=at_least(1))
    plans: tuple[tuple[int, ...], ...] | None = option(
        "such as 1-4-4-1 1-8-1 (default: groups of 4)", default=None, metavar="PLAN", type=grouping, nargs="+"
    )
    batch: tuple[int, ...] = option("requests in the batch", default=(1, 4, 8, 32), metavar="B,...", type=integers)
    context: tuple[int, ...] | None = option(
        "tokens before the drafts (default: 256,2048, as far as the drafter has positions)",
        default=None,
        metavar="N,...",
        type=integers,
    )
    dtype: str = option(default="float32", choices=DTYPES)
    load_format: str = option("vLLM's, such as dummy for random weights", default="auto")
    mlp: str = option(default="auto", choices=["auto", "tensor", "replicate"])
    draft_vocabulary: int | None = option(
        "draft from the N lowest ids (default: from all tokens)", default=None, metavar="N", type=at_least(1)
    )
    quantization: str | None = option("of the drafter's weights", default=None, choices=get_args(Quantization))
    repetitions: int = option("loops of each plan", default=60, type=at_least(1))


@dataclass(frozen=True, kw_only=True)
class EngineOptions(OutputOptions):
    """Options of `bench engine`."""

    model: str = option("the target: a folder or a hub name", metavar="TARGET")
    config: str = option("easyspec's: a path to YAML or JSON, a name in configs/, or inline JSON")
    baselines: tuple[str, ...] = option(
        "some of the defaults; losslessness is checked against the arm none",
        default=BASELINES,
        metavar="ARM,...",
        type=names(*BASELINES),
    )
    prompts: Path | None = option("prompts to send (default: random token ids)", default=None, metavar="FILE.jsonl")
    concurrency: tuple[int, ...] = option("requests at a time", default=(1, 4, 16, 64), metavar="C,...", type=integers)
    requests: int = option(
        "least number of requests per level, and two per slot", default=16, metavar="N", type=at_least(1)
    )
    output_tokens: int = option("tokens to generate for each request", default=128, metavar="N", type=at_least(1))
    input_tokens: int | None = option(
        "tokens of a random prompt (default: 256); with --prompts, the most to use of each",
        default=None,
        metavar="N",
        type=at_least(1),
    )
    turns: int = option("turns of each arm, forward and backward", default=2, metavar="N", type=at_least(1))
    tensor_parallel_size: int = option(
        "ranks", "--tensor-parallel-size", "-tp", default=1, metavar="T", type=at_least(1)
    )
    dtype: str = option(default="auto", choices=("auto", *DTYPES))
    load_format: str = option("vLLM's, such as dummy for random weights", default="auto")
    engine: str = option("more of vLLM's engine arguments as JSON, for all arms alike", default="{}", metavar="JSON")
