"""Operators of the drafter's layers, on stacked weights."""

import torch
import torch.nn.functional as F

from vllm_easyspec.ops.choice import FEW_TOKENS
from vllm_easyspec.ops.registry import operator
from vllm_easyspec.packing import dequantized


def products(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each layer's own product: `[layers, tokens, inner]` with `[layers, inner, columns]`.

    In float32 on a CPU torch's matmul is MKL's, which for many tokens is slower than oneDNN's on AMD processors; torch
    has oneDNN's under the name that its compiler calls.
    """
    is_long = x.device.type == "cpu" and x.dtype is torch.float32 and x.shape[-2] > FEW_TOKENS[x.dtype]
    if not is_long or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.matmul(x, weights)
    linear = torch.ops.mkldnn._linear_pointwise.default
    parts = [linear(one, w.t(), None, "none", [], "") for one, w in zip(x, weights, strict=True)]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


@operator(
    "embed_shard(Tensor ids, Tensor table, int first, int rows) -> Tensor",
    fake=lambda ids, table, first, rows: table.new_empty(ids.shape[0], table.shape[1]),
)
def embed_shard(ids: torch.Tensor, table: torch.Tensor, first: int, rows: int) -> torch.Tensor:
    """A vocabulary shard's rows, zeros for other shards' tokens: ids `[tokens] int64` to `[tokens, hidden]`.

    table: `[at least rows, hidden]`, of the tokens from `first` to `first + rows`.
    """
    local = ids - first
    owned = (local >= 0) & (local < rows)
    return F.embedding(local.masked_fill(~owned, 0), table).masked_fill_(~owned.unsqueeze(1), 0)


def _fake_group_rms_norm(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(weights.shape[0], *x.shape[-2:])


@operator("group_rms_norm(Tensor x, Tensor weights, float eps) -> Tensor", fake=_fake_group_rms_norm)
def group_rms_norm(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of one input, or of one input per layer, with the weights of `G` layers.

    x: `[tokens, hidden]` shared by all layers (the variance is taken once), or `[G, tokens, hidden]`;
    weights: `[G, hidden]`. Returns `[G, tokens, hidden]` in x's dtype.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps) * weights.unsqueeze(1)


@operator("prefix_sums(Tensor x, Tensor outputs) -> Tensor", fake=lambda x, outputs: torch.empty_like(outputs))
def prefix_sums(x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """`x` and the outputs up to each: `[tokens, hidden]` and `[G, tokens, hidden]` to `[G, tokens, hidden]`."""
    return torch.cat([x.unsqueeze(0), outputs]).cumsum(0)[1:]


@operator(
    "rotate_and_store(Tensor(a!) qkv, Tensor positions, Tensor cos_sin, int num_heads, int num_kv_heads, bool neox, "
    "Tensor? q_norms=None, Tensor? k_norms=None, int first=0, float eps=0.0, "
    "Tensor(b!)? cache=None, Tensor? slots=None) -> ()"
)
def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    neox: bool,
    q_norms: torch.Tensor | None = None,
    k_norms: torch.Tensor | None = None,
    first: int = 0,
    eps: float = 0.0,
    cache: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Head norms (where there are any) and rotary embedding of a group's queries and keys, in place, and keys and
    values into the pages where a cache is given.

    qkv: `[layers, tokens, num_heads + 2 * num_kv_heads, head_dim]`; positions: `[layers * tokens] int64`; cos_sin:
    `[positions, rotary_dim]`, cosines before sines; neox: the two parts of a head are its halves, else neighbours;
    q_norms, k_norms: `[all layers, head_dim]`, of which the group's begin at `first`; cache: `[pages, num_kv_heads,
    page tokens, 2 * head_dim]`, a key and then a value, of any strides but the last; slots: `[layers * tokens] int64`,
    nothing is written at negative ones.
    """
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    cos, sin = cos_sin[positions].view(*qkv.shape[:2], 1, -1).float().chunk(2, dim=-1)
    half = cos.shape[-1]
    for heads, norms in ((q, q_norms), (k, k_norms)):
        if norms is not None:
            heads.copy_(
                F.rms_norm(heads, heads.shape[-1:], None, eps) * norms[first : first + qkv.shape[0], None, None]
            )
        rotary = heads[..., : 2 * half]
        one, two = (rotary[..., :half], rotary[..., half:]) if neox else (rotary[..., ::2], rotary[..., 1::2])
        one_rotated, two_rotated = one * cos - two * sin, two * cos + one * sin
        one.copy_(one_rotated)
        two.copy_(two_rotated)
    if cache is not None and slots is not None:
        live = slots >= 0
        pages, rows = slots[live] // cache.shape[2], slots[live] % cache.shape[2]
        cache[pages, :, rows] = torch.cat([k, v], dim=-1).flatten(0, 1)[live]


@operator(
    "norm_and_project(Tensor x, Tensor norms, Tensor weights, Tensor? scales, Tensor? bias, int first, int count, "
    "int columns, float eps) -> Tensor",
    fake=lambda x, norms, weights, scales, bias, first, count, columns, eps: x.new_empty(count, x.shape[-2], columns),
    of_few_tokens=True,
)
def norm_and_project(
    x: torch.Tensor,
    norms: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    first: int,
    count: int,
    columns: int,
    eps: float,
) -> torch.Tensor:
    """Norm and projection by `count` layers from `first` on, of one input `[tokens, hidden]` or one a layer
    `[count, tokens, hidden]`: to `[count, tokens, columns]`.

    norms: `[layers, hidden]`; weights: `[layers, hidden, columns]` in any form of `packing.py`; scales: `[layers,
    columns]` of quantized weights; bias: `[layers, columns]`.
    """
    own = slice(first, first + count)
    matrices = dequantized(weights[own], _rows(scales, own), x.dtype, x.shape[-1], columns)
    out = products(group_rms_norm(x, norms[own], eps), matrices)
    return out if bias is None else out.add_(bias[own].unsqueeze(1))


@operator(
    "project_among_zeros(Tensor x, Tensor weights, Tensor? scales, Tensor? bias, int first, int group, int offset, "
    "int step, int columns) -> Tensor",
    fake=lambda x, weights, scales, bias, first, group, offset, step, columns: x.new_empty(group, x.shape[1], columns),
    of_few_tokens=True,
)
def project_among_zeros(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    first: int,
    group: int,
    offset: int,
    step: int,
    columns: int,
) -> torch.Tensor:
    """Projections by a rank's share of a group, zeros for the other ranks' layers: `[count, tokens, inner]` to
    `[group, tokens, columns]`.

    weights: `[layers, inner, columns]` in any form of `packing.py`; scales: `[layers, columns]` of quantized weights;
    bias: `[layers, columns]`; of all the share's from `first` on. It is every `step`-th layer of the group from its
    `offset`-th.
    """
    count = x.shape[0]
    own = slice(first, first + count)
    local = products(x, dequantized(weights[own], _rows(scales, own), x.dtype, x.shape[-1], columns))
    if bias is not None:
        local += bias[own].unsqueeze(1)
    if group == count:
        return local
    out = local.new_zeros(group, *local.shape[1:])
    out[offset : offset + step * count : step] = local
    return out


@operator(
    "sum_of_mlps(Tensor inputs, Tensor norms, Tensor gate_up, Tensor? gate_up_scales, Tensor? gate_up_bias, "
    "Tensor down, Tensor? down_scales, Tensor? residual, int first, int width, float eps) -> Tensor",
    fake=lambda inputs, *others: torch.empty_like(inputs[0]),
    of_few_tokens=True,
)
def sum_of_mlps(
    inputs: torch.Tensor,
    norms: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_scales: torch.Tensor | None,
    residual: torch.Tensor | None,
    first: int,
    width: int,
    eps: float,
) -> torch.Tensor:
    """The sum of the gated MLPs of the layers from `first` on, each on its own input, and of `residual`
    (`[tokens, hidden]`) if given: `[count, tokens, hidden]` to `[tokens, hidden]`.

    norms: `[layers, hidden]`; gate_up: `[layers, hidden, 2 * width]`, gates first; gate_up_bias: `[layers,
    2 * width]`; down: `[layers, width, hidden]`; gate_up and down in any form of `packing.py`, and if quantized with
    scales `[layers, 2 * width]` and `[layers, hidden]`.
    """
    count, _, size = inputs.shape
    own = slice(first, first + count)
    into = dequantized(gate_up[own], _rows(gate_up_scales, own), inputs.dtype, size, 2 * width, parts=2)
    hidden = products(group_rms_norm(inputs, norms[own], eps), into)
    if gate_up_bias is not None:
        hidden += gate_up_bias[own].unsqueeze(1)
    # The down projections and their sum are one product: the layers' widths lie side by side.
    wide = silu_and_mul(hidden).transpose(0, 1).flatten(1)
    out_of = dequantized(down[own], _rows(down_scales, own), inputs.dtype, width, size)
    total = products(wide.unsqueeze(0), out_of.flatten(0, 1).unsqueeze(0))[0]
    return total if residual is None else residual + total


def _rows(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU: `[..., 2 * n]` (gates first) to `[..., n]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
