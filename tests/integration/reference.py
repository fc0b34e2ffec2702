"""The method written out in plain PyTorch, one request at a time, on `transformers` modules.

Nothing here is shared with the drafter: dense attention, one layer after another, K/V in a list. In a group all
attentions read the group's input, so what a fuzzy step appends to the K/V list is fuzzy, and later steps attend to it.
With look-ahead maps each reads what its map predicts from that input and the last token's final hidden state.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

Maps = Mapping[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor]]  # (kind, group start, layer): weights, bias


class DenseRequest:
    def __init__(self, model: PreTrainedModel, sliding_window: int | None):
        """model: a Llama, Mistral, Qwen2 or Qwen3 causal language model of `transformers`."""
        self.model = model
        self.layers = list(model.model.layers)
        self.sliding_window = sliding_window
        empty = torch.zeros(0)
        self.keys: list[torch.Tensor] = [empty] * len(self.layers)  # of each layer, [tokens, kv_heads, head_dim]
        self.values: list[torch.Tensor] = [empty] * len(self.layers)
        self.final = empty  # of the last read, [tokens, hidden]

    @property
    def length(self) -> int:
        return self.keys[0].shape[0]

    def rewind(self, length: int) -> None:
        self.keys = [k[:length] for k in self.keys]
        self.values = [v[:length] for v in self.values]

    @torch.no_grad()
    def read(
        self,
        ids: Sequence[int],
        group_sizes: Sequence[int],
        scope: Literal["attention", "block"],
        maps: Maps | None = None,
    ) -> torch.Tensor:
        """Read more tokens, one at a time if there are maps; returns logits `[tokens, vocab]`."""
        positions = torch.arange(self.length, self.length + len(ids))
        x = self.model.model.embed_tokens(torch.tensor(ids))
        cos, sin = (part[0] for part in self.model.model.rotary_emb(x, positions.unsqueeze(0)))
        first = 0
        for size in group_sizes:
            group = range(first, first + size)
            first += size
            h = x
            known = known_features(h, self.final[-1:]) if maps else None
            inputs = {layer: _corrected(h, known, maps, ("attention", group.start, layer)) for layer in group}
            a = {layer: self._attention(layer, inputs[layer], positions, cos, sin) for layer in group}
            if scope == "attention":
                for layer in group:
                    x = x + a[layer]
                    x = x + self._mlp(layer, x)
            else:
                prefix, mlps = h, torch.zeros_like(h)
                for layer in group:
                    prefix = prefix + a[layer]
                    with_prefix = torch.cat([known, _scaled(prefix)], dim=-1) if maps else None
                    corrected = _corrected(prefix, with_prefix, maps, ("mlp", group.start, layer))
                    mlps = mlps + self._mlp(layer, corrected)
                x = prefix + mlps
        assert first == len(self.layers)
        self.final = self.model.model.norm(x)
        return self.model.lm_head(self.final)

    def _mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        module = self.layers[layer]
        return module.mlp(module.post_attention_layernorm(x))

    def _attention(
        self, layer: int, h: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        module = self.layers[layer].self_attn
        x = self.layers[layer].input_layernorm(h)
        q, k, v = (p(x).unflatten(-1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.keys[layer].shape[0]:
            k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
        self.keys[layer], self.values[layer] = k, v
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * module.head_dim**-0.5
        distance = positions.unsqueeze(1) - torch.arange(k.shape[0])
        hidden = distance < 0
        if self.sliding_window is not None:
            hidden |= distance >= self.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return module.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


def known_features(h: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """The features of look-ahead maps, from a group's input and the token before, number by number."""
    u = _scaled(h)
    half = u.shape[-1] // 2
    pairs = [(u[..., i], u[..., half + i]) for i in range(half)]
    sums, differences = (torch.stack([a + sign * b for a, b in pairs], dim=-1) for sign in (1, -1))
    return torch.cat([u, u.abs(), sums.abs(), differences.abs(), previous], dim=-1)


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def _corrected(
    x: torch.Tensor, features: torch.Tensor | None, maps: Maps | None, key: tuple[str, int, int]
) -> torch.Tensor:
    if features is None or maps is None or key not in maps:
        return x
    weights, bias = maps[key]
    return x + features @ weights + bias


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the two halves: x `[tokens, heads, head_dim]`, cos and sin `[tokens, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
