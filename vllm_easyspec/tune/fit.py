"""`vllm-easyspec fit`: look-ahead maps (`lookahead.py`) in closed form, from text through the drafter.

Two passes over the same sequences, in the drafter's real ranks with its real pages. The first reads them precisely and
fits every map on precise inputs. The second drafts from many positions, as a round does, with the given plans in both
scopes and the maps of the first; it fits the maps again on the inputs that drafting really sees, so that they also
correct errors of earlier groups. Each rank fits the maps of its own layers. Memory does not grow with the text: a pair
of layers has moments in two matrices, `[5 hidden + 1, 5 hidden + 1]` and `[5 hidden + 1, 2 hidden] float64`, and the
same again for held-out sequences.
"""

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import all_gather_object
from tqdm import tqdm
from vllm.distributed import get_tp_group

from vllm_easyspec.bench.prompts import read_texts
from vllm_easyspec.bench.results import check_writable, table
from vllm_easyspec.config import LayerParallelConfig
from vllm_easyspec.drafter.plan import SCOPES, DraftPlan
from vllm_easyspec.engineless import EnginelessDrafter
from vllm_easyspec.errors import ConfigError
from vllm_easyspec.lookahead import (
    KINDS,
    PARTS,
    LookaheadMaps,
    drafter_identity,
    input_features,
    rms_scaled,
    write_maps,
)
from vllm_easyspec.metrics import plan_json
from vllm_easyspec.ranks import run_ranks
from vllm_easyspec.support import read_drafter
from vllm_easyspec.tune.least_squares import PairMoments
from vllm_easyspec.tune.options import FitOptions, FitSettings

BATCH = 32  # sequences per pass
HELD_OUT = 4  # of them, the last ones, are held out to judge the fit
SHORTEST = 16  # tokens of text that a sequence begins with
# How much of the held-out R2 a lower rank may lose: enough for half the full rank on the tiny pair, which halves the
# maps' share of a step (docs/experiments.md, "Rank").
NEARLY_BEST = 0.035

Pair = tuple[int, int]  # group start, later layer
K = TypeVar("K")
V = TypeVar("V")


# ---- inputs and outputs of passes ----


@dataclass
class Seen:
    """Each group's input and each layer's attention output in one or more passes, `[requests, steps, hidden]`."""

    inputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, group: range, x: torch.Tensor, outputs: torch.Tensor) -> None:
        self.inputs.setdefault(group.start, []).append(x)
        for layer, output in zip(group, outputs, strict=True):
            self.outputs.setdefault(layer, []).append(output)

    def x(self, layer: int, requests: int) -> torch.Tensor:
        return _by_request(self.inputs[layer], requests)

    def prefix(self, start: int, layer: int, requests: int) -> torch.Tensor:
        """The input of the group from `start` on and its attentions up to `layer`."""
        attentions = (_by_request(self.outputs[j], requests) for j in range(start, layer + 1))
        return self.x(start, requests) + sum(attentions)


def _by_request(passes: list[torch.Tensor], requests: int) -> torch.Tensor:
    """Passes of `[requests * tokens, hidden]` each, one after another, to `[requests, all tokens, hidden]`."""
    return torch.cat([part.unflatten(0, (requests, -1)) for part in passes], dim=1)


@contextmanager
def seeing(drafter: EnginelessDrafter) -> Iterator[Seen]:
    """Collect the inputs and outputs of the drafter's passes within the block."""
    seen = Seen()
    drafter.model.observer = seen.add
    try:
        yield seen
    finally:
        drafter.model.observer = None


class Fit:
    """One rank's part: the moments of its own layers' maps."""

    def __init__(self, drafter: EnginelessDrafter, settings: FitSettings, progress: Callable[[], object]):
        self.drafter, self.settings, self.progress = drafter, settings, progress
        model = drafter.model
        self.hidden, self.layers, self.own_layers = model.shape.hidden_size, model.shape.num_layers, model.local_layers
        self.plans = [
            DraftPlan.of_sizes(self.layers, sizes, scope) for sizes in dict.fromkeys(settings.plans) for scope in SCOPES
        ]
        self.reach = _reach(self.plans, self.layers, settings.longest_group)
        self.pairs = [(g, i) for g, last in self.reach.items() for i in range(g + 1, last + 1)]

    def run(self, texts: list[list[list[int]]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All ranks' maps, and the report, from batches of sequences. Every rank returns the same."""
        batches = [self._written(index, batch) for index, batch in enumerate(texts)]
        moments: dict[Pair, PairMoments] = {}
        for batch in batches:
            self._precise_pass(batch, moments)
            self.progress()
        self._install(self._solved(moments, self.hidden))
        for pair in itertools.chain.from_iterable(map(_pairs, self.plans)):  # fitted again, so their matrices are freed
            moments.pop(pair, None)
        if self.plans:
            drafted: dict[Pair, PairMoments] = {}
            for batch in batches:
                for plan in self.plans:
                    self._drafting_pass(batch, plan, drafted)
                self.progress()
            moments |= drafted
        rank, r2_by_rank = self._choose_rank(moments)
        solved = self._solved(moments, rank)
        maps = self._install(solved)
        report = {"rank": rank, "r2_by_rank": r2_by_rank, "r2": self._quality(moments, solved)}
        report["own_rate"] = [self._own_rates(batches, plan) for plan in self.plans]
        self.progress()
        return maps, report

    # ---- reading ----

    def _read(self, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Tokens `[requests, tokens]` of all requests in one pass: final hidden states `[requests, tokens, hidden]`."""
        return self.drafter.read(tokens.tolist(), *arguments).unflatten(0, tuple(tokens.shape))

    def _next(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[requests, hidden]` to the drafter's own next tokens `[requests, 1]`."""
        return self.drafter.logits(hidden).argmax(-1, keepdim=True).cpu()

    def _rewind(self, length: int) -> None:
        self.drafter.rewind([length] * BATCH)

    def _written(self, index: int, batch: list[list[int]]) -> torch.Tensor:
        """`[BATCH, length]`: the text, continued with the drafter's own greedy tokens."""
        length = self.settings.length
        given = []
        for row, ids in enumerate(batch):
            number = index * BATCH + row
            own = int((number + 1) * self.settings.own) > int(number * self.settings.own)
            given.append(min(len(ids), length // 4) if own else len(ids))
        tokens = torch.tensor([ids[:count] + [0] * (length - count) for ids, count in zip(batch, given, strict=True)])
        shortest = min(given)
        if shortest == length:
            return tokens
        self._rewind(0)
        hidden = self._read(tokens[:, :shortest])[:, -1]
        for position in range(shortest, length):
            is_text = torch.tensor(given).unsqueeze(1) > position
            tokens[:, position : position + 1] = torch.where(
                is_text, tokens[:, position : position + 1], self._next(hidden)
            )
            hidden = self._read(tokens[:, position : position + 1])[:, -1]
        return tokens

    def _precise_pass(self, batch: torch.Tensor, moments: dict[Pair, PairMoments]) -> None:
        self._rewind(0)
        with seeing(self.drafter) as seen:
            final = self._read(batch)
        self._add(moments, self.pairs, seen, seen, final[:, :-1], slice(1, None))

    def _drafting_pass(self, batch: torch.Tensor, plan: DraftPlan, moments: dict[Pair, PairMoments]) -> None:
        for round_ in self._rounds(batch, plan, every=2):
            self._add(moments, _pairs(plan), round_.drafting, round_.precise, round_.previous)

    def _rounds(self, batch: torch.Tensor, plan: DraftPlan, every: int) -> Iterator["Round"]:
        """Draft as a round does, then read the same drafts precisely; in every `every`-th run of `K - 1` tokens."""
        num_drafts = self.settings.num_drafts
        self._rewind(0)
        final = self._read(batch)
        # Backwards, because drafting overwrites the pages of the following tokens.
        for newest in range(batch.shape[1] - num_drafts, SHORTEST - 1, -every * max(1, num_drafts - 1)):
            self._rewind(newest + 1)
            hidden = final[:, newest].contiguous()
            tokens, previous = [self._next(hidden)], []
            with seeing(self.drafter) as drafting:
                for _ in range(num_drafts - 1):
                    previous.append(hidden)
                    hidden = self._read(tokens[-1], plan, hidden)[:, -1]
                    tokens.append(self._next(hidden))
            self._rewind(newest + 1)
            drafted = torch.cat(tokens, dim=1)
            with seeing(self.drafter) as precise:
                true = self._read(drafted[:, :-1])
            confirmed = torch.stack([self._next(true[:, step]) for step in range(num_drafts - 1)], dim=1).squeeze(2)
            yield Round(torch.stack(previous, dim=1), drafting, precise, drafted[:, 1:] == confirmed)

    def _add(
        self,
        moments: dict[Pair, PairMoments],
        pairs: Iterable[Pair],
        drafting: Seen,
        precise: Seen,
        previous: torch.Tensor,
        steps: slice = slice(None),
    ) -> None:
        """Add the samples of this rank's pairs.

        previous: `[requests, steps, hidden]`; only the passes' tokens at `steps` are samples.
        """
        for g, i in pairs:
            if i not in self.own_layers:
                continue
            h, p = drafting.x(g, BATCH)[:, steps], drafting.prefix(g, i, BATCH)[:, steps]
            x, q = precise.x(i, BATCH)[:, steps], precise.prefix(i, i, BATCH)[:, steps]
            features = torch.cat([input_features(h, previous), rms_scaled(p)], dim=-1)
            missing = torch.cat([x - h, q - p], dim=-1)
            if (g, i) not in moments:
                moments[g, i] = PairMoments.empty(self.hidden, h.device)
            moments[g, i].fitted.add(features[:-HELD_OUT].flatten(0, 1), missing[:-HELD_OUT].flatten(0, 1))
            moments[g, i].held_out.add(features[-HELD_OUT:].flatten(0, 1), missing[-HELD_OUT:].flatten(0, 1))

    # ---- solving ----

    def _solved(self, moments: dict[Pair, PairMoments], rank: int) -> dict[tuple[str, Pair], tuple[torch.Tensor, ...]]:
        """This rank's maps."""
        return {
            (kind, pair): pair_moments.of_kind(kind)[0].solve(self.settings.ridge, rank)
            for pair, pair_moments in moments.items()
            for kind in KINDS
        }

    def _install(self, solved: dict[tuple[str, Pair], tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        """Gather all ranks' maps, in the form of a file, and let the drafter use them."""
        everyones = _gathered({key: [part.bfloat16().cpu() for part in maps] for key, maps in solved.items()})
        stacked = {
            f"{kind}.{g}.{part}": torch.stack([everyones[kind, (g, i)][number] for i in range(g + 1, last + 1)])
            for kind in KINDS
            for g, last in self.reach.items()
            for number, part in enumerate(PARTS)
        }
        model = self.drafter.model
        model.lookahead = LookaheadMaps(stacked, self.reach, model.placement, model.rank, model.final_norm)
        return stacked

    def _choose_rank(self, moments: dict[Pair, PairMoments]) -> tuple[int, dict[int, float]]:
        """The lowest rank that explains nearly as much of the held-out samples as the best; mean R2 by rank."""
        ranks = sorted({max(1, self.hidden // part) for part in (1, 2, 4, 8, 16)} | {self.settings.rank or self.hidden})
        found: dict[tuple[str, Pair, int], float] = {}
        for pair, pair_moments in moments.items():
            for kind in KINDS:
                fitted, held_out = pair_moments.of_kind(kind)
                down, up, bias = fitted.solve(self.settings.ridge)
                whole = bias + fitted.gram[-1, :-1] / fitted.count @ down @ up
                for rank in ranks:
                    mean = fitted.gram[-1, :-1] / fitted.count @ down[:, :rank] @ up[:rank]
                    found[kind, pair, rank] = held_out.r2(down[:, :rank], up[:rank], whole - mean)
        everyones = _gathered(found)
        by_rank = {
            rank: sum(r2 for (_, _, of), r2 in everyones.items() if of == rank) / (2 * len(self.pairs))
            for rank in ranks
        }
        best = max(by_rank.values())
        chosen = next(rank for rank in ranks if by_rank[rank] >= best - NEARLY_BEST)
        return self.settings.rank or chosen, by_rank

    def _quality(
        self, moments: dict[Pair, PairMoments], solved: dict[tuple[str, Pair], tuple[torch.Tensor, ...]]
    ) -> dict[str, float]:
        """Held-out R2 of every map, `attention.g.i` and `mlp.g.i`."""
        mine = {(kind, pair): moments[pair].of_kind(kind)[1].r2(*maps) for (kind, pair), maps in solved.items()}
        everyones = _gathered(mine)
        return {f"{kind}.{g}.{i}": round(everyones[kind, (g, i)], 4) for kind in KINDS for g, i in self.pairs}

    def _own_rates(self, batches: list[torch.Tensor], plan: DraftPlan) -> dict[str, Any]:
        """Share of drafts that the precise pass confirms, up to the first that it doesn't, on held-out sequences.

        Draft 1 comes from the precise pass, so it always counts.
        """
        held_out = torch.cat([batch[-HELD_OUT:] for batch in batches])
        chosen = held_out[torch.arange(BATCH) * len(held_out) // BATCH]
        maps, rates = self.drafter.model.lookahead, []
        for used in (None, maps):
            self.drafter.model.lookahead = used
            confirmed = [round_.confirmed for round_ in self._rounds(chosen, plan, every=4)]
            leading = torch.cat(confirmed).long().cumprod(1).sum(1).float().mean().item()
            rates.append(round((1 + leading) / self.settings.num_drafts, 4))
        return plan_json(plan) | {"without": rates[0], "with": rates[1]}


@dataclass(frozen=True)
class Round:
    """One round of drafting, and a precise pass over the same drafts."""

    previous: torch.Tensor  # [requests, K - 1, hidden], final hidden states that the fuzzy steps read
    drafting: Seen
    precise: Seen
    confirmed: torch.Tensor  # [requests, K - 1] bool, drafts 2..K that the precise pass would have drafted too


def _pairs(plan: DraftPlan) -> list[Pair]:
    return [(group.start, i) for group in plan.groups for i in group[1:]]


def _reach(plans: Sequence[DraftPlan], layers: int, longest_group: int) -> dict[int, int]:
    """For each layer that a group may start at, the last layer that needs a map."""
    reach = {start: min(layers, start + longest_group) - 1 for start in range(1, layers)}
    for group in (group for plan in plans for group in plan.groups):
        reach[group.start] = max(reach.get(group.start, 0), group[-1])
    return {start: last for start, last in sorted(reach.items()) if last > start}


def _gathered(mine: dict[K, V]) -> dict[K, V]:
    """All ranks' entries in one dict."""
    group = get_tp_group()
    parts: list[dict[K, V]] = [{}] * group.world_size
    all_gather_object(parts, mine, group=group.cpu_group)
    return {key: value for part in parts for key, value in part.items()}


# ---- the command ----


def run(options: FitOptions) -> str:
    """Fit maps and write them. Returns the report as tables."""
    if options.target is not None or options.engine_arguments:
        given = "an option after --" if options.target is None else f"--target {options.target}"
        raise ConfigError(f"{given} is not allowed without --vocabulary: maps are fitted on the drafter alone")
    output = options.output or Path("lookahead.safetensors")
    check_writable(output)
    if not options.plans:
        plan = LayerParallelConfig().draft_plan(read_drafter(options.drafter, None).num_layers)
        options = replace(options, plans=(plan.group_sizes,))
    report = fit(options.drafter, options.text, output, options.ranks, options)
    r2 = report["r2"]
    pairs = [name.split(".")[1:] for name in r2 if name.startswith("attention.")]
    by_rank = ", ".join(f"{r2:.3f} at {rank}" for rank, r2 in report["r2_by_rank"].items())
    return "\n".join(
        [
            table(
                ("layer", "group start", "R2 of the attention map", "R2 of the MLP map (block scope)"),
                [(i, g, f"{r2[f'attention.{g}.{i}']:.2f}", f"{r2[f'mlp.{g}.{i}']:.2f}") for g, i in pairs],
            ),
            "\nDrafts that the drafter's own precise pass confirms:",
            table(
                ("plan", "scope", "without maps", "with"),
                [
                    (row["plan"], row["scope"], f"{row['without']:.1%}", f"{row['with']:.1%}")
                    for row in report["own_rate"]
                ],
            ),
            f"rank {report['rank']} (mean held-out R2 by rank: {by_rank})",
            f"wrote {output}, {output.stat().st_size:,} bytes",
        ]
    )


def fit(drafter: str, texts: Sequence[Path], output: Path, ranks: int, settings: FitSettings) -> dict[str, Any]:
    """Fit maps and write them to `output`, completely or not at all. Returns the report.

    Raises `ConfigError` or `BenchmarkError` for what can't be used.
    """
    layers = read_drafter(drafter, revision=None).num_layers
    if settings.length < SHORTEST + settings.num_drafts:
        shortest = SHORTEST + settings.num_drafts
        raise ConfigError(f"--length {settings.length} is too short to draft in: give {shortest} tokens or more")
    try:
        plans = [DraftPlan.of_sizes(layers, sizes, name="--plans") for sizes in settings.plans]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not _reach(plans, layers, settings.longest_group):
        raise ConfigError("no map to fit: groups of one layer need none. Give --plans with larger groups")
    sequences = cut(_tokenized(drafter, read_texts(texts)), settings.tokens, settings.length)
    batches = [sequences[start : start + BATCH] for start in range(0, len(sequences) - BATCH + 1, BATCH)]
    if not batches:
        raise ConfigError(
            f"--text holds {len(sequences)} sequences of {SHORTEST} to {settings.length} tokens, and at least {BATCH} "
            "are needed. Give more text"
        )
    tensors, report = run_ranks(ranks, _fit_rank, drafter, batches, settings, timeout_s=7 * 24 * 3600.0)[0]
    report["settings"] = {one.name: getattr(settings, one.name) for one in fields(FitSettings)}
    report["settings"] |= {"ranks": ranks, "sequences": len(batches) * BATCH}
    report["text"] = [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in texts]
    write_maps(output, tensors, report)
    return report


def cut(documents: Iterable[list[int]], tokens: int, length: int) -> list[list[int]]:
    """Pieces of at most `length` ids, spread evenly over the documents: enough for batches of `tokens` in all, if there
    are that many."""
    pieces = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    wanted = min(len(pieces), -(-tokens // (length * BATCH)) * BATCH)
    return [pieces[index * len(pieces) // wanted] for index in range(wanted)]


def _tokenized(drafter: str, texts: Iterable[str]) -> Iterator[list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(drafter)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--drafter {drafter} has no tokenizer: {' '.join(str(error).split())}") from error
    tokenizer.model_max_length = sys.maxsize  # long files are cut afterwards
    return (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)


def _fit_rank(
    path: str, batches: list[list[list[int]]], settings: FitSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    drafter = EnginelessDrafter(path, dtype=settings.dtype, max_num_reqs=BATCH, max_len=settings.length + 32)
    passes = len(batches) * (2 if settings.plans else 1) + 1
    first = drafter.model.rank == 0
    with (
        tqdm(total=passes, desc="fit", unit="batch", disable=not first, file=sys.stderr) as bar,
        torch.inference_mode(),
    ):
        fitting = Fit(drafter, settings, bar.update)
        tensors, report = fitting.run(batches)
    shape = drafter.model.shape
    report |= {
        "model": path,
        "drafter": drafter_identity(path, shape),
        "hidden_size": shape.hidden_size,
        "reach": fitting.reach,
    }
    return tensors, report
