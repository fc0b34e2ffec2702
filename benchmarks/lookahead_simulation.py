"""Look-ahead maps in simulation: what each idea of the fit is worth, on the tiny pair, without an engine.

Dense attention in plain PyTorch, float32. Greedy output does not depend on drafts, so the target's text is written once
and all of its positions draft at the same time: every row is a position, with the precise K/V of what comes before and
fuzzy K/V of its own drafts. Acceptance comes from walking the rounds through the text; the own rate likewise, with the
drafter in the target's place. Held-out prompts, K = 5. Text for the fit: the pair's training text.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rounds import DRAFTS, PAIR, held_out_ids
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm_easyspec.drafter.plan import SCOPES, DraftPlan
from vllm_easyspec.lookahead import input_features, rms_scaled
from vllm_easyspec.tune.fit import Moments, cut

PROMPT, NEW, LENGTH = 64, 64, 256  # tokens of a prompt, written after it, and of a sequence of the fit
Maps = dict[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor]]  # (kind, group start, layer): weights, bias


class Dense:
    """A Llama checkpoint."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        self.weights = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
        self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]
        self.head_dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.embedding = self.weights["model.embed_tokens.weight"]  # also the LM head
        frequencies = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(config["max_position_embeddings"]).unsqueeze(1) * frequencies
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def weight(self, layer: int, name: str) -> torch.Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, "model.norm")

    def next(self, x: torch.Tensor) -> torch.Tensor:
        return (self.final(x) @ self.embedding.T).argmax(-1)

    def heads(self, layer: int, which: str, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """which: q, k or v of x `[..., hidden]`: `[..., heads, head_dim]`, rotated but for v."""
        normed = self.norm(x, f"model.layers.{layer}.input_layernorm")
        out = (normed @ self.weight(layer, f"self_attn.{which}_proj").T).unflatten(-1, (-1, self.head_dim))
        if which == "v":
            return out
        first, second = out.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return out * self.cos[positions].unsqueeze(-2) + turned * self.sin[positions].unsqueeze(-2)

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x, f"model.layers.{layer}.post_attention_layernorm")
        gate, up = (x @ self.weight(layer, f"mlp.{name}_proj").T for name in ("gate", "up"))
        return (F.silu(gate) * up) @ self.weight(layer, "mlp.down_proj").T

    def read(self, ids: torch.Tensor, past: list | None = None) -> tuple["States", list]:
        """Precise pass over `[sequences, tokens]` after `past`, the (k, v) of each layer."""
        start = past[0][0].shape[1] if past else 0
        positions = torch.arange(start, start + ids.shape[1])
        x, states, kept = self.embedding[ids], States(), []
        for layer in range(self.layers):
            q, k, v = (self.heads(layer, which, x, positions) for which in "qkv")
            if past:
                k, v = torch.cat([past[layer][0], k], dim=1), torch.cat([past[layer][1], v], dim=1)
            kept.append((k, v))
            mask = torch.arange(k.shape[1]) <= positions.unsqueeze(1)
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
            )
            attention = mixed.transpose(1, 2).flatten(2) @ self.weight(layer, "self_attn.o_proj").T
            states.inputs.append(x)
            states.attentions.append(attention)
            x = x + attention
            x = x + self.mlp(layer, x)
        states.inputs.append(x)
        return states, kept

    def write(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """`[sequences, tokens]` and `count` greedy tokens more."""
        states, past = self.read(ids)
        for _ in range(count):
            ids = torch.cat([ids, self.next(states.inputs[-1][:, -1:])], dim=1)
            states, past = self.read(ids[:, -1:], past)
        return ids


@dataclass
class States:
    """inputs: of each layer and after the last; attentions: each layer's attention output. In rows also: prefixes."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    attentions: list[torch.Tensor] = field(default_factory=list)
    starts: dict[int, torch.Tensor] = field(default_factory=dict)  # group inputs
    prefixes: dict[int, torch.Tensor] = field(default_factory=dict)  # MLP inputs in block scope, before their maps


@dataclass(frozen=True)
class Variant:
    name: str
    drafted: bool = False  # a second fit, on what drafting sees
    previous: bool = False  # the last token's final hidden state among the features
    own: float = 0.0  # share of the sequences that the drafter goes on with
    kv_only: bool = False  # the maps serve keys and values, queries read the group's input
    bent: bool = False  # absolute values among the features

    def known(self, h: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """What every map of a group with input h reads; f: the last token's final hidden state."""
        if self.bent:
            return input_features(h, f)
        return torch.cat([rms_scaled(h), f], dim=-1) if self.previous else rms_scaled(h)


VARIANTS = (
    Variant("precise inputs"),
    Variant("+ drafted inputs", drafted=True),
    Variant("+ previous token", drafted=True, previous=True),
    Variant("+ own text", drafted=True, previous=True, own=0.5),
    Variant("keys and values only", drafted=True, previous=True, own=0.5, kv_only=True),
    Variant("+ absolute values", drafted=True, previous=True, own=0.5, bent=True),
)


class Rows:
    """`newest` positions of each sequence, drafting side by side."""

    def __init__(self, model: Dense, ids: torch.Tensor, newest: torch.Tensor):
        self.model, self.newest = model, newest
        self.states, past = model.read(ids)
        groups = model.weight(0, "self_attn.q_proj").shape[0] // model.weight(0, "self_attn.k_proj").shape[0]
        self.past = [tuple(part.repeat_interleave(groups, dim=2) for part in layer) for layer in past]
        self.groups = groups
        self.mask = (torch.arange(ids.shape[1]) > newest.unsqueeze(1)).float() * -1e9

    def attention(self, layer: int, x_q: torch.Tensor, x_kv: torch.Tensor, step: int, own: list) -> torch.Tensor:
        """x: `[sequences, rows, hidden]`; own: the (k, v) of the rows' drafts at this layer, to which it adds."""
        model, positions = self.model, self.newest + 1 + step
        q = model.heads(layer, "q", x_q, positions)
        own.append(
            tuple(model.heads(layer, w, x_kv, positions).repeat_interleave(self.groups, dim=2) for w in ("k", "v"))
        )
        keys, values = (torch.stack(part, dim=2) for part in zip(*own, strict=True))
        before = torch.einsum("bphd,bthd->bhpt", q, self.past[layer][0]) * model.head_dim**-0.5 + self.mask
        after = torch.einsum("bphd,bpjhd->bhpj", q, keys) * model.head_dim**-0.5
        shares = torch.cat([before, after], dim=-1).softmax(-1).split([before.shape[-1], after.shape[-1]], dim=-1)
        mixed = torch.einsum("bhpt,bthd->bphd", shares[0], self.past[layer][1])
        mixed = mixed + torch.einsum("bhpj,bpjhd->bphd", shares[1], values)
        return mixed.flatten(2) @ model.weight(layer, "self_attn.o_proj").T

    def steps(
        self,
        plan: DraftPlan,
        scope: str,
        variant: Variant,
        maps: Maps,
        ids: Callable[[int, torch.Tensor], torch.Tensor],
        count: int = DRAFTS,
    ) -> Iterator[tuple[States, torch.Tensor]]:
        """count - 1 fuzzy steps; `ids` gives a step's tokens from the state before. Yields states and features `f`."""
        own: list[list] = [[] for _ in range(self.model.layers)]
        x = self.states.inputs[-1][:, self.newest]
        for step in range(count - 1):
            f = self.model.final(x)
            x, states = self._step(ids(step, x), plan, scope, variant, maps, f, step, own)
            yield states, f

    def _step(self, ids, plan, scope, variant, maps, f, step, own) -> tuple[torch.Tensor, States]:
        x, states = self.model.embedding[ids], States()
        for group in plan.groups:
            g, h = group.start, x
            known = variant.known(h, f)
            states.starts[g] = h
            attentions = []
            for i in group:
                read = corrected(h, known, maps.get(("attention", g, i)))
                attentions.append(self.attention(i, h if variant.kv_only else read, read, step, own[i]))
            p, mlps = h, torch.zeros_like(h)
            for i, attention in zip(group, attentions, strict=True):
                if scope == "attention" and i > g:
                    p = p + mlps
                    mlps = torch.zeros_like(h)
                states.inputs.append(p)
                p = states.prefixes[i] = p + attention
                features = torch.cat([known, rms_scaled(p)], dim=-1)
                mlps = mlps + self.model.mlp(i, corrected(p, features, maps.get(("mlp", g, i))))
            x = p + mlps
        states.inputs.append(x)
        return x, states

    def drafts(
        self, plan: DraftPlan, scope: str, variant: Variant, maps: Maps, count: int = DRAFTS
    ) -> tuple[torch.Tensor, list]:
        """`[sequences, rows, count]`, and each step's states and features."""
        tokens: list[torch.Tensor] = []

        def ids(step: int, x: torch.Tensor) -> torch.Tensor:
            tokens.append(self.model.next(x))
            return tokens[-1]

        seen = list(self.steps(plan, scope, variant, maps, ids, count))
        return torch.stack([*tokens, self.model.next(seen[-1][0].inputs[-1])], dim=-1), seen


def corrected(x: torch.Tensor, features: torch.Tensor, maps: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    return x if maps is None else x + features @ maps[0] + maps[1]


def fit(model: Dense, text: torch.Tensor, plan: DraftPlan, scope: str, variant: Variant) -> Maps:
    own = int(len(text) * variant.own)
    if own:
        quarter = LENGTH // 4
        text = torch.cat([text[own:], model.write(text[:own, :quarter], LENGTH - quarter)])
    moments: dict[tuple[str, int, int], Moments] = {}

    def add(kind: str, g: int, i: int, features: torch.Tensor, missing: torch.Tensor) -> None:
        kept = moments.setdefault((kind, g, i), Moments(features.shape[-1], model.hidden, features.device))
        kept.add(features.flatten(0, -2), missing.flatten(0, -2))

    def solved() -> Maps:
        parts = {key: kept.solve(1e-3) for key, kept in moments.items()}
        return {key: ((down @ up).float(), bias.float()) for key, (down, up, bias) in parts.items()}

    pairs = [(group.start, i) for group in plan.groups for i in group[1:]]
    for part in text.split(32):
        states, _ = model.read(part)
        x, a = ([s[:, 1:] for s in kind] for kind in (states.inputs, states.attentions))
        f = model.final(states.inputs[-1])[:, :-1]
        for g, i in pairs:
            known = variant.known(x[g], f)
            p = x[g] + sum(a[g : i + 1])
            add("attention", g, i, known, x[i] - x[g])
            if scope == "block":
                add("mlp", g, i, torch.cat([known, rms_scaled(p)], dim=-1), x[i] + a[i] - p)
    maps = solved()
    if not variant.drafted:
        return maps
    moments.clear()
    precise = DraftPlan.precise(model.layers)
    for part in text.split(16):
        rows = Rows(model, part, torch.arange(32, LENGTH - DRAFTS, 2 * (DRAFTS - 1)))
        drafts, seen = rows.drafts(plan, scope, variant, maps)
        true = rows.steps(precise, "attention", Variant(""), {}, lambda step, x, d=drafts: d[..., step])
        for (states, f), (wanted, _) in zip(seen, true, strict=True):
            for g, i in pairs:
                h, p = states.starts[g], states.prefixes[i]
                known = variant.known(h, f)
                add("attention", g, i, known, wanted.inputs[i] - h)
                if scope == "block":
                    add("mlp", g, i, torch.cat([known, rms_scaled(p)], dim=-1), wanted.prefixes[i] - p)
    return solved()


def accepted(drafts: torch.Tensor, text: torch.Tensor) -> float:
    """Mean share of a round's drafts that the text confirms, rounds following one another."""
    rows = drafts.shape[1]
    wanted = torch.stack([text[:, PROMPT + 1 + j : PROMPT + 1 + j + rows] for j in range(DRAFTS)], dim=-1)
    leading = (drafts == wanted).long().cumprod(-1).sum(-1)
    total = rounds = 0
    for sequence in leading.tolist():
        row = 0
        while row < rows:
            total, rounds, row = total + sequence[row], rounds + 1, row + sequence[row] + 1
    return total / (DRAFTS * rounds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what examples/tiny-pair/training_text.py wrote")
    parser.add_argument("--plans", nargs="+", default=["1-4-4-1", "1-8-1", "4-4-2"])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--variants", type=int, nargs="+", default=range(len(VARIANTS)), help="by number, from 0")
    args = parser.parse_args()
    target, drafter = Dense(PAIR / "target"), Dense(PAIR / "drafter")
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "drafter", model_max_length=sys.maxsize)
    lines = [json.loads(line)["text"] for line in args.text.read_text().splitlines()]
    pieces = cut((tokenizer(text)["input_ids"] for text in lines), args.tokens, LENGTH)
    text = torch.tensor([piece for piece in pieces if len(piece) == LENGTH])
    prompts = torch.tensor(held_out_ids(args.prompts, PROMPT))
    newest = torch.arange(PROMPT, PROMPT + NEW)
    written = [model.write(prompts, NEW + DRAFTS + 1) for model in (target, drafter)]
    rows = [Rows(drafter, ids[:, : PROMPT + NEW], newest) for ids in written]

    def show(plan: DraftPlan, scope: str, variant: Variant, maps: Maps) -> None:
        rates = [accepted(r.drafts(plan, scope, variant, maps)[0], ids) for r, ids in zip(rows, written, strict=True)]
        print(f"| {plan.grouping} | {scope} | {variant.name} | {rates[0]:.3f} | {rates[1]:.1%} |", flush=True)

    print("| group sizes | scope | maps | acceptance | own rate |\n|---|---|---|---|---|")
    show(DraftPlan.precise(drafter.layers), "attention", Variant("precise plan"), {})
    for plan in (DraftPlan(tuple(map(int, sizes.split("-")))) for sizes in args.plans):
        for scope in SCOPES:
            show(plan, scope, Variant("none"), {})
            for variant in (VARIANTS[number] for number in args.variants):
                show(plan, scope, variant, fit(drafter, text, plan, scope, variant))


if __name__ == "__main__":
    main()
