"""How much a group of layers loses by running side by side: a cheap score, without drafting.

All positions of a prompt are treated at once as the first fuzzy step of a round: the token's own K/V is fuzzy, all
earlier K/V is precise, as calibration leaves it. The layers outside the group run one after another. The score is the
mean total variation distance between the next-token distributions of this pass and of the precise pass, which is the
probability that a draft of one is rejected by the other: from 0, no loss, to 1.
"""

import torch

from vllm_easyspec.drafter.model import LayerParallelDrafter, Rotate
from vllm_easyspec.drafter.paged_kv import DensePass
from vllm_easyspec.drafter.plan import DraftPlan, Scope
from vllm_easyspec.metrics import PassCounters


class FirstStepPass:
    """A pass in which each token sees precise K/V of all tokens before it, and its own. Implements `Attend`."""

    def __init__(self, precise: DensePass):
        """precise: a pass that has run over the same tokens."""
        self.precise = precise
        earlier = precise.mask.tril(-1)
        self.mask = torch.cat([earlier, torch.eye(len(earlier), dtype=torch.bool, device=earlier.device)], dim=1)

    def attend(self, layers: slice, qkv: torch.Tensor, rotate: Rotate) -> torch.Tensor:
        local = range(layers.start, layers.stop)
        rotated = rotate(layers, qkv, self.precise.positions.repeat(len(local)))
        parts = zip(local, *(tensor.chunk(len(local)) for tensor in rotated), strict=True)
        return torch.cat([self._attend_layer(*part) for part in parts])

    def _attend_layer(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        earlier_k, earlier_v = self.precise.seen[layer]
        keys, values = torch.cat([earlier_k, k]), torch.cat([earlier_v, v])
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=self.mask, enable_gqa=True
        )
        return out.transpose(0, 1)


@torch.inference_mode()
def group_costs(
    model: LayerParallelDrafter, ids: torch.Tensor, scope: Scope, max_size: int
) -> list[tuple[int, int, float]]:
    """First layer, size and score of every group of 2 to `max_size` layers, over one prompt `ids` (`[tokens] int64`).

    With look-ahead maps only groups that they cover are scored. All ranks must call it together: the passes have
    collectives.
    """
    model.counters = PassCounters()  # these passes belong to no stage
    layers = model.shape.num_layers
    precise = DensePass(len(ids), model.shape.sliding_window, ids.device)
    hidden = model(ids, DraftPlan.precise(layers), precise)
    expected = _distributions(model, hidden)
    step, previous = FirstStepPass(precise), torch.nn.functional.pad(hidden[:-1], (0, 0, 1, 0))
    costs = []
    for size in range(2, max_size + 1):
        for start in range(layers - size + 1):
            if model.lookahead is not None and start + size - 1 > model.lookahead.reach.get(start, start):
                continue
            plan = DraftPlan((1,) * start + (size,) + (1,) * (layers - start - size), scope)
            found = _distributions(model, model(ids, plan, step, previous))
            costs.append((start, size, float(0.5 * (found - expected).abs().sum(-1).mean())))
    return costs


def _distributions(model: LayerParallelDrafter, hidden: torch.Tensor) -> torch.Tensor:
    return model.compute_logits(hidden).float().softmax(-1)
