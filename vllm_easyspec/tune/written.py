"""The tuned configuration as commented YAML, which `vllm serve --speculative-config` takes as it is."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_easyspec.config import EasySpecConfig
from vllm_easyspec.tune.planner import Point, Range

PATH_FIELDS = ("model", "lookahead")  # a value that begins with ./ or ../ counts from the file's folder
WRITTEN_HERE = ("method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "layer_parallel")


def tuned_yaml(
    source: Path, out: Path, ranges: Sequence[Range], comments: Sequence[str], notes: Mapping[Point, str]
) -> str:
    """The configuration in `source` with the plans and K of `ranges`, to be written to `out`.

    comments: lines for the head; notes: what to say about a point.
    """
    given = as_written(source)
    for name in PATH_FIELDS:
        if str(given.get(name)).startswith(("./", "../")):
            given[name] = _from_folder(source.parent / given[name], out.parent)
    drafting = [one for one in ranges if one.point.num_drafts]
    most = max((one.point.num_drafts for one in drafting), default=1)
    lines = [f"# {line}" for line in comments]
    lines += ["method: easyspec", _line("model", given.pop("model"))]
    lines.append(f"num_speculative_tokens: {most} # K, tokens drafted a round")
    if len({one.point.num_drafts for one in ranges} | {most}) > 1:
        lines.append("num_speculative_tokens_per_batch_size: # first batch size, last batch size, K")
        lines += [f"  - [{first}, {last}, {k}]" for first, last, k in _drafts(ranges)]
    lines.append("layer_parallel:")
    lines += _plans(drafting, notes)
    if (mlp := (given.get("layer_parallel") or {}).get("mlp")) is not None:
        lines.append(f"  mlp: {mlp}")
    rest = {name: value for name, value in given.items() if name not in WRITTEN_HERE}
    text = "\n".join(lines) + "\n" + (yaml.safe_dump(rest, sort_keys=False) if rest else "")
    EasySpecConfig.parse(yaml.safe_load(text), source=str(out))  # it must read back
    return text


def as_written(source: Path) -> dict[str, Any]:
    """The fields of a configuration in YAML or JSON, paths as they stand there."""
    return {str(key).replace("-", "_"): value for key, value in yaml.safe_load(source.read_text()).items()}


def _from_folder(path: Path, folder: Path) -> str:
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return relative if relative.startswith("../") else f"./{relative}"


def _line(name: str, value: Any) -> str:
    return yaml.safe_dump({name: value}).rstrip()


def _drafts(ranges: Sequence[Range]) -> list[tuple[int, int, int]]:
    """vLLM's form: first and last batch size, K; it carries the last K on to all larger batches."""
    merged: list[tuple[int, int, int]] = []
    first = 1
    for one in ranges:
        last = one.up_to or first
        if merged and merged[-1][2] == one.point.num_drafts:
            merged[-1] = (merged[-1][0], last, one.point.num_drafts)
        else:
            merged.append((first, last, one.point.num_drafts))
        first = last + 1
    return merged


def _plans(drafting: Sequence[Range], notes: Mapping[Point, str]) -> list[str]:
    """One plan stands in `layer_parallel` itself; of several, the last does, and the others in `by_batch_size`."""
    if not drafting:
        return ["  scope: attention # says nothing: at no batch size is anything drafted"]
    merged = [
        one
        for one, following in zip(drafting, [*drafting[1:], None], strict=True)
        if following is None or following.point.plan != one.point.plan
    ]
    *table, last = merged
    lines = [f"  {part}" for part in _fields(last, notes)]
    if table:
        lines.append("  by_batch_size:")
    for one in table:
        first, *more = [f"up_to: {one.up_to}", *_fields(one, notes)]
        lines += [f"    - {first}", *(f"      {part}" for part in more)]
    return lines


def _fields(one: Range, notes: Mapping[Point, str]) -> list[str]:
    plan = one.point.plan
    note = notes.get(one.point)
    return [
        f"scope: {plan.scope}" + (f" # {note}" if note else ""),
        f"group_sizes: {list(plan.plan.group_sizes)} # {plan.plan.num_layers} layers as {plan.plan}: {plan.steps} "
        f"sequential steps, precise has {2 * plan.plan.num_layers}",
    ]
