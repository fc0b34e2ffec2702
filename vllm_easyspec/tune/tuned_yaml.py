"""The tuned configuration as commented YAML, ready for `vllm serve --speculative-config`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.drafter.plan import DraftPlan
from vllm_easyspec.tune.planner import Point, Range

# A value that begins with ./ or ../ is relative to the file.
PATH_FIELDS = ("model", "lookahead", "draft_vocabulary")
WRITTEN_HERE = ("method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "layer_parallel")


def tuned_yaml(
    source: Path, out: Path, ranges: Sequence[Range], comments: Sequence[str], notes: Mapping[Point, str]
) -> str:
    """The configuration in `source` with the plans and K of `ranges`, to be written to `out`.

    comments: lines for the head of the file; notes: a comment for each point.
    """
    given = read_fields(source)
    for name in PATH_FIELDS:
        if str(given.get(name)).startswith(("./", "../")):
            given[name] = _from_folder(source.parent / given[name], out.parent)
    max_drafts = max(1, *(one.point.num_drafts for one in ranges))
    lines = [f"# {line}" for line in comments]
    lines += ["method: easyspec", _line("model", given.pop("model"))]
    lines.append(f"num_speculative_tokens: {max_drafts} # K, tokens drafted per round")
    lines.append("layer_parallel:")
    lines += _plans(ranges, max_drafts, notes)
    if (mlp := (given.get("layer_parallel") or {}).get("mlp")) is not None:
        lines.append(f"  mlp: {mlp}")
    rest = {name: value for name, value in given.items() if name not in WRITTEN_HERE}
    text = "\n".join(lines) + "\n" + (yaml.safe_dump(rest, sort_keys=False) if rest else "")
    EasySpecConfig.parse(yaml.safe_load(text), source=str(out))  # it must read back
    return text


def read_fields(source: Path) -> dict[str, Any]:
    """The fields of a configuration in YAML or JSON, with paths as written."""
    return {str(key).replace("-", "_"): value for key, value in yaml.safe_load(source.read_text()).items()}


def _from_folder(path: Path, folder: Path) -> str:
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return relative if relative.startswith("../") else f"./{relative}"


def _line(name: str, value: Any) -> str:
    return yaml.safe_dump({name: value}).rstrip()


def _plans(ranges: Sequence[Range], max_drafts: int, notes: Mapping[Point, str]) -> list[str]:
    """The plan of the largest batches that draft, and in `by_batch_size` what other batches do.

    max_drafts: the configuration's K, which the largest batches needn't repeat.
    """
    drafting = [one.point.plan for one in ranges if one.point.num_drafts]
    if not drafting:
        lines, table = ["  scope: attention # has no effect: nothing is drafted at any batch size"], list(ranges)
    else:
        beside, last = drafting[-1], ranges[-1].point
        lines = [f"  {field}" for field in _plan_fields(beside, notes.get(last) if last.plan == beside else None)]
        table = list(ranges[:-1] if last.num_drafts == max_drafts else ranges)
    if table:
        lines.append("  by_batch_size:")
    for one in table:
        fields = [f"up_to: {one.up_to}"] if one.up_to else []
        if one.point.num_drafts and one.point.plan != drafting[-1]:
            fields += _plan_fields(one.point.plan, notes.get(one.point))
        fields.append(f"num_speculative_tokens: {one.point.num_drafts}")
        lines += [f"    {'-' if index == 0 else ' '} {field}" for index, field in enumerate(fields)]
    return lines


def _plan_fields(plan: DraftPlan, note: str | None) -> list[str]:
    return [
        f"scope: {plan.scope}" + (f" # {note}" if note else ""),
        f"plan: {plan.grouping} # {plan.num_layers} layers in {plan.sequential_steps} sequential steps, precise has "
        f"{2 * plan.num_layers}",
    ]
