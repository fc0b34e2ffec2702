"""Operators of the look-ahead maps."""

import torch
import torch.nn.functional as F

from vllm_easyspec.ops.registry import operator


@operator(
    "group_features(Tensor h, Tensor previous, float eps) -> Tensor",
    fake=lambda h, previous, eps: h.new_empty(h.shape[0], 4 * h.shape[1]),
)
def group_features(h: torch.Tensor, previous: torch.Tensor, eps: float) -> torch.Tensor:
    """The features of a group's look-ahead maps: h, previous `[tokens, hidden]`, hidden even, to `[tokens, 4 *
    hidden]`.

    With `u = h / rms(h)` and its halves `a` and `b`: `[u, |u|, |a + b|, |a - b|, previous]`. An affine map of these
    can change its slope where an element of u, or the sum or difference of two, changes its sign.
    """
    u = F.rms_norm(h, h.shape[-1:], None, eps)
    a, b = u.chunk(2, dim=-1)
    return torch.cat([u, u.abs(), (a + b).abs(), (a - b).abs(), previous], dim=-1)


@operator(
    "look_ahead(Tensor x, Tensor known, Tensor down, Tensor up, Tensor bias, int count, bool first, float eps) "
    "-> Tensor",
    fake=lambda x, known, down, up, bias, count, first, eps: x.new_empty(count, *x.shape[-2:]),
    of_few_tokens=True,
)
def look_ahead(
    x: torch.Tensor,
    known: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    first: bool,
    eps: float,
) -> torch.Tensor:
    """The inputs of `count` layers of a group, in place of x: `x + features @ down @ up + bias`, `[count, tokens,
    hidden]`.

    known: `[tokens, known]`, of `group_features`; x: `[tokens, hidden]`, where these are the features, or `[count,
    tokens, hidden]`, with `x / rms(x)` after them; down: `[layers, features, rank]`; up: `[layers, rank, hidden]`;
    bias: `[layers, hidden]`, these three of one dtype, x's or another. first: the group's first layer, which reads x as
    it is and has no map, is among the `count`.
    """
    maps = slice(count - first)
    x = x.expand(count, -1, -1) if x.dim() == 2 else x
    later = x[int(first) :]
    features = known
    if down.shape[1] > known.shape[-1]:
        own = F.rms_norm(later, later.shape[-1:], None, eps)
        features = torch.cat([known.expand(later.shape[0], -1, -1), own], dim=-1)
    thin = torch.matmul(features, down[maps].to(x.dtype))
    read = torch.baddbmm(later + bias[maps].to(x.dtype).unsqueeze(1), thin, up[maps].to(x.dtype))
    return torch.cat([x[:1], read]) if first else read
