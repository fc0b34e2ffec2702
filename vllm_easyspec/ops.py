"""The drafter's own operators, in plain torch."""

import torch
import torch.nn.functional as F


def group_rms_norm(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of one input, or of one input a layer, by the weights of `G` layers.

    x: `[tokens, hidden]` shared by all layers (the variance is taken once), or `[G, tokens, hidden]`;
    weights: `[G, hidden]`. Returns `[G, tokens, hidden]` in x's dtype.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps) * weights.unsqueeze(1)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU: `[..., 2 * n]` (gates first) to `[..., n]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def shift_slots(slots: torch.Tensor, num_layers: int, layer_stride: int) -> torch.Tensor:
    """Cache slots of `num_layers` layers, one after another: `[tokens] int64` to `[num_layers * tokens] int64`.

    Padding stays `-1`: kernels skip only negative slots, and a shifted `-1` would be a live slot of the layer before.
    layer_stride: slots from one layer's pages to the next.
    """
    shifts = torch.arange(num_layers, device=slots.device).unsqueeze(1) * layer_stride
    return torch.where(slots < 0, -1, slots + shifts).view(-1)


def shift_block_table(block_table: torch.Tensor, num_layers: int, num_blocks: int) -> torch.Tensor:
    """Block tables of `num_layers` layers, one after another: `[reqs, width]` to `[num_layers * reqs, width]` int32."""
    shifts = torch.arange(num_layers, device=block_table.device, dtype=block_table.dtype) * num_blocks
    return (block_table + shifts[:, None, None]).view(-1, block_table.shape[1])
