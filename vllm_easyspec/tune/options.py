"""Options of `vllm-easyspec tune` and `vllm-easyspec fit`."""

from dataclasses import dataclass
from pathlib import Path

from vllm_easyspec.documents import find
from vllm_easyspec.options import DTYPES, at_least, grouping, integers, names, option

BASELINES = ("untuned", "draft_model", "none")


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of `tune`."""

    model: str = option("the target: a folder or a hub name", metavar="TARGET")
    config: Path = option("the untuned configuration: a path, or a name in configs/", metavar="YAML", type=find)
    prompts: Path = option("JSON lines with prompt, text or turns", metavar="FILE")
    out: Path = option("write the tuned configuration here", "-o", metavar="YAML")
    report: Path | None = option("write a report with plots here (needs matplotlib)", default=None, metavar="HTML")
    json: Path | None = option("save all measurements here", default=None, metavar="FILE")
    batch_sizes: tuple[int, ...] = option(
        "batch sizes to tune for", default=(1, 2, 4, 8, 16), metavar="B,...", type=integers
    )
    time_budget: float | None = option("limit for everything, engine starts included", default=None, metavar="SECONDS")
    tensor_parallel_size: int = option("ranks", "--tensor-parallel-size", "-tp", default=1, metavar="T")
    max_drafts: int | None = option(
        "largest K tried (default: the YAML's, at least 8)", default=None, metavar="K", type=at_least(2)
    )
    plans: int = option(
        "plans to measure, in addition to the untuned and the precise one", default=12, type=at_least(0)
    )
    max_group: int = option("largest group of layers", default=8, metavar="N", type=at_least(1))
    prompt_tokens: int = option("use at most N tokens of each prompt", default=256, metavar="N", type=at_least(1))
    new_tokens: int = option("tokens to generate for each prompt", default=64, metavar="N", type=at_least(8))
    rounds: int = option("rounds of a plan or K before the next one", default=8, metavar="N", type=at_least(1))
    turns: int = option("turns of each plan", default=3, metavar="N", type=at_least(1))
    temperature: float = option("of the target's sampling; 0 is greedy", default=0.0)
    rate: str | None = option(
        "time by which to choose (default: wall; on a CPU stages)", default=None, choices=["wall", "stages"]
    )
    baselines: tuple[str, ...] = option(
        "engines to compare with at the end; an empty value for no comparison",
        default=BASELINES,
        metavar="NAME,...",
        type=names(*BASELINES),
    )
    engine_arguments: tuple[str, ...] = option(
        "such as -- --dtype bfloat16", "engine_arguments", default=(), nargs="*", metavar="-- VLLM_OPTION"
    )


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How maps are fitted."""

    plans: tuple[tuple[int, ...], ...] = option(
        "plans to fit for, such as 1-4-4-1 1-8-1 (default: groups of 4); maps serve shorter groups too",
        default=(),
        metavar="PLAN",
        type=grouping,
        nargs="+",
    )
    longest_group: int = option("also maps for every group of up to N layers", default=1, metavar="N", type=at_least(1))
    rank: int | None = option(
        "rank of the maps (default: the lowest that fits nearly as well)", default=None, metavar="R", type=at_least(1)
    )
    tokens: int = option("tokens of text to read", default=40_000, metavar="N", type=at_least(1))
    length: int = option("tokens per sequence", default=256, metavar="N")
    num_drafts: int = option("drafts per round", "--num-speculative-tokens", default=5, metavar="K", type=at_least(2))
    own: float = option(
        "share of the sequences that the drafter continues after their first quarter",
        default=0.5,
        metavar="SHARE",
    )
    ridge: float = option("penalty, as a share of a feature's variance", default=1e-3)
    dtype: str = option(default="auto", choices=("auto", *DTYPES))


@dataclass(frozen=True, kw_only=True)
class FitOptions(FitSettings):
    """Options of `fit`, with and without `--vocabulary`."""

    drafter: str = option("a checkpoint's folder", metavar="PATH")
    text: tuple[Path, ...] = option("plain text, or JSONL of prompts", metavar="FILE", type=Path, nargs="+")
    output: Path | None = option(
        "(default: lookahead.safetensors, or vocabulary.json)", "--output", "-o", default=None, metavar="FILE"
    )
    vocabulary: int | None = option(
        "write a draft vocabulary of N tokens in place of maps", default=None, metavar="N", type=at_least(1)
    )
    target: str | None = option(
        "with --vocabulary: count in this model's answers to the text", default=None, metavar="TARGET"
    )
    ranks: int = option("processes", default=1, metavar="T", type=at_least(1))
    engine_arguments: tuple[str, ...] = option(
        "of the target's engine, such as -- --dtype bfloat16",
        "engine_arguments",
        default=(),
        nargs="*",
        metavar="-- VLLM_OPTION",
    )
