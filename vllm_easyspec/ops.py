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


def advance_draft_inputs(
    positions: torch.Tensor,
    live: torch.Tensor,
    block_table: torch.Tensor,
    virtual_positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    layer_stride: int,
    max_len: int,
) -> None:
    """Move every request on by one position, in place, and write the inputs of a fuzzy step for all local layers.

    positions: `[reqs] int64`, plus one; live: `[reqs] bool`; block_table: `[reqs, width] int32`; virtual_positions,
    slots: `[layers * reqs] int64`, and seq_lens: `[layers * reqs] int32`, written layer by layer. A request that is not
    live, or past `max_len`, gets slot -1; one that is not live gets one key.
    """
    positions += 1
    layers = slots.shape[0] // positions.shape[0]
    held = positions.clamp(max=max_len - 1)
    columns = (held // block_size).clamp(max=block_table.shape[1] - 1).unsqueeze(1)
    slot = block_table.gather(1, columns).squeeze(1).long() * block_size + held % block_size
    slots.copy_(shift_slots(torch.where(live & (positions < max_len), slot, -1), layers, layer_stride))
    virtual_positions.view(-1, held.shape[0]).copy_(held)
    seq_lens.view(-1, held.shape[0]).copy_(torch.where(live, held + 1, 1))
