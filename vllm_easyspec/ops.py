"""The drafter's own operators: in plain torch, and natively (csrc/) if the package was built with a compiler.

Each operator `torch.ops.vllm_easyspec.<name>` has its schema and its reference here. If there is a native library, its
kernels replace the references on the devices that it was built for; otherwise one warning says why there is none.
"""

import platform
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from vllm.logger import init_logger

from vllm_easyspec.packing import dequantized, is_packed, is_quantized

logger = init_logger("vllm.easyspec")

NAMESPACE = "vllm_easyspec"
_library = torch.library.Library(NAMESPACE, "DEF")
# The plain-torch reference of each operator, which tests compare the kernels with.
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


# Up to this many tokens look-ahead maps run in one native operator on a CPU; in bfloat16 torch's products use
# instructions that it lacks. Measured by benchmarks/operators.py (docs/results.md); float16 is assumed to be like
# bfloat16.
FEW_TOKENS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
# The same for a sublayer's matrix products on a GPU, in bfloat16: the limit of csrc/skinny_product.h.
FEW_TOKENS_CUDA = 16


def is_short(x: torch.Tensor) -> bool:
    """Whether the native operator of few tokens serves an input `[..., tokens, hidden]`.

    On a CPU it serves packed weights (`packing.py`) whatever the number of tokens.
    """
    if WHY_NOT_NATIVE is not None:
        return False
    if x.device.type == "cpu":
        return x.shape[-2] <= FEW_TOKENS[x.dtype]
    return x.dtype is torch.bfloat16 and x.shape[-2] <= FEW_TOKENS_CUDA and x.is_cuda and _has_clusters(x.device)


# Operators on a drafter's stacked weights: a CPU's are native where the weights are packed.
STACKED_PRODUCTS = ("norm_and_project", "project_among_zeros", "sum_of_mlps")
# The cases in which torch's products were measured to be faster on this GPU (drafter/products.py): an operator's name,
# whether it is called for several layers at once, and the number of tokens, rounded up to a power of two.
TORCHS_PRODUCTS: set[tuple[str, bool, int]] = set()


def serves(arguments: tuple[Any, ...]) -> bool:
    """Whether the native operator of few tokens can serve a call of this one."""
    return is_short(arguments[0]) and _are_vectors(arguments) and not any(is_quantized(w) for w in _tensors(arguments))


def is_chosen(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the native operator of few tokens serves a call of this one."""
    x = arguments[0]
    if x.device.type == "cpu" and name in STACKED_PRODUCTS:
        return any(is_packed(w) for w in _tensors(arguments))
    if not serves(arguments):
        return False
    if not (TORCHS_PRODUCTS and x.is_cuda):
        return True
    layers = arguments[6] if name == "norm_and_project" else x.shape[0]
    return (name, layers > 1, 1 << (x.shape[-2] - 1).bit_length()) not in TORCHS_PRODUCTS


def arguments(*args: Any) -> tuple[Any, ...]:
    """The arguments of a call, in place of calling an operator."""
    return args


def reference_of(name: str) -> Callable[..., Any]:
    """The plain-torch reference of the operator `name`."""
    return REFERENCES[getattr(getattr(torch.ops, NAMESPACE), name).default]


@lru_cache
def _has_clusters(device: torch.device) -> bool:
    """Whether this GPU has clusters of blocks, which the skinny product needs: Hopper and newer."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def _are_vectors(arguments: tuple[Any, ...]) -> bool:
    """Whether a GPU's kernel reads whole vectors of 16 bytes, in half a row of a gated product too."""
    tensors = _tensors(arguments)
    if not tensors[0].is_cuda:
        return True
    return tensors[0].shape[-1] % 8 == 0 and all(w.shape[-1] % 16 == 0 for w in tensors[1:] if w.dim() == 3)


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


P = ParamSpec("P")
R = TypeVar("R")


def _operator(
    schema: str, fake: Callable[..., Any] | None = None, of_few_tokens: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Define `torch.ops.vllm_easyspec.<schema>`; the decorated function, which then calls it, is its reference.

    fake: as in `torch.library.register_fake`; by default the operator returns nothing. of_few_tokens: the operator
    serves few tokens, its first argument being `[..., tokens, hidden]`; all else takes the reference's parts.
    """

    def define(reference: Callable[P, R]) -> Callable[P, R]:
        name = schema.partition("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *arguments: None), lib=_library)
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        REFERENCES[operator] = reference

        @wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return operator(*args, **kwargs)

        @wraps(reference)
        def choose(*args: P.args, **kwargs: P.kwargs) -> R:
            return (operator if is_chosen(name, args) else reference)(*args, **kwargs)

        return choose if of_few_tokens else call

    return define


@_operator(
    "advance_draft_inputs(Tensor sampled, Tensor(a!) positions, Tensor live, Tensor block_table, Tensor(b!) input_ids, "
    "Tensor(c!) query_positions, Tensor(d!) seq_lens, Tensor(e!) slots, int block_size, int num_blocks, int max_len) "
    "-> ()"
)
def advance_draft_inputs(
    sampled: torch.Tensor,
    positions: torch.Tensor,
    live: torch.Tensor,
    block_table: torch.Tensor,
    input_ids: torch.Tensor,
    query_positions: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
    num_blocks: int,
    max_len: int,
) -> None:
    """The inputs of the next draft step of all local layers, from the last step's drafts, in one launch and in place.

    Read: sampled `[rows] int64` of any stride, the drafts; live `[rows] bool`, rows whose K/V is written; block_table
    `[at least rows, width] int32`, its rows contiguous; block_size; num_blocks, pages of a layer; max_len, the
    drafter's context.

    Read and written: positions `[rows] int64`, of the tokens read last, each advanced by one, also past `max_len`. A
    negative position marks a row that pads the batch; it becomes -1.

    Written: input_ids `[rows] int64`, the drafts (0 in padding rows); and for `layers` layers one after another, in
    contiguous tensors of `layers * rows` elements of which a smaller group takes a prefix: query_positions `int64`,
    clamped to `max_len - 1` (0 in padding rows); seq_lens `int32`, one more than that (so that no kernel meets an empty
    sequence); slots `int64`, shifted by `num_blocks * block_size` a layer, and -1 for padding rows, rows that are not
    live and positions past `max_len`.

    Raises RuntimeError (native only) for another dtype, size or layout.
    """
    rows = positions.shape[0]
    if rows == 0:
        return
    padding = positions < 0
    positions.add_(~padding)
    query = positions.clamp(min=0, max=max_len - 1)
    written = live & ~padding & (positions < max_len)
    of_row = torch.arange(rows, device=query.device)
    own = torch.where(written, slots_of(block_table, of_row, query, block_size), -1)
    input_ids.copy_(sampled.masked_fill(padding, 0))
    query_positions.view(-1, rows).copy_(query)
    seq_lens.view(-1, rows).copy_(query + 1)
    slots.copy_(shift_slots(own, slots.numel() // rows, num_blocks * block_size).view_as(slots))


def _fake_calibration_inputs(*arguments: Any) -> tuple[torch.Tensor, ...]:
    of_req, starts = arguments[7], arguments[10]
    reqs = starts.shape[0] - 1
    of_rows = (torch.empty_like(of_req) for _ in range(3))
    return (*of_rows, starts.new_empty(reqs), of_req.new_empty(reqs), of_req.new_empty(reqs))


@_operator(
    "calibration_inputs(Tensor read, Tensor query_starts, Tensor start_positions, Tensor num_valid, Tensor sampled, "
    "Tensor newest, Tensor block_table, Tensor of_req, Tensor offset, Tensor known, Tensor starts, int block_size, "
    "int max_len, int vocab_size, bool write) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_calibration_inputs,
)
def calibration_inputs(
    read: torch.Tensor,
    query_starts: torch.Tensor,
    start_positions: torch.Tensor,
    num_valid: torch.Tensor,
    sampled: torch.Tensor,
    newest: torch.Tensor,
    block_table: torch.Tensor,
    of_req: torch.Tensor,
    offset: torch.Tensor,
    known: torch.Tensor,
    starts: torch.Tensor,
    block_size: int,
    max_len: int,
    vocab_size: int,
    write: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of a calibration pass, from what the target read and how much of it is kept.

    read: `[tokens] int32`, what the target read; query_starts, start_positions, num_valid, newest: `[reqs] int64`;
    sampled: `[reqs] bool`; block_table: `[at least reqs, width] int32`, its rows contiguous (these as in `DraftBatch`);
    of_req, offset: `[rows] int64`, known: `[reqs] int64`, starts: `[reqs + 1] int32` (these as in
    `CalibrationLayout`); max_len: the drafter's context; write: False for a batch that owns no pages.

    Returns input_ids, positions (clamped to `max_len - 1`) and slots (-1 for rows past the newest token and positions
    past `max_len`), `[rows] int64`; seq_lens `[reqs] int32`, up to the last row, padding or not; and newest_rows and
    newest_positions `[reqs] int64`, the row and position of each request's newest token.

    Raises RuntimeError (native only) for another dtype, size or layout.
    """
    num_tokens = num_valid - known + sampled
    source = offset + known[of_req]
    ids = read[(query_starts[of_req] + source).clamp_(max=read.shape[0] - 1)].long()
    ids = torch.where(source == num_valid[of_req], newest[of_req], ids).clamp_(0, vocab_size - 1)
    first = start_positions + known
    positions = first[of_req] + offset
    slots = slots_of(block_table, of_req, positions, block_size)
    written = (offset < num_tokens[of_req]) & (positions < max_len) & write
    return (
        ids,
        positions.clamp(max=max_len - 1),
        torch.where(written, slots, -1),
        first.int() + starts.diff(),
        (starts[:-1] + num_tokens - 1).clamp_(min=0),  # a row that a graph adds has no token
        first + num_tokens - 1,
    )


@_operator(
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


@_operator("group_rms_norm(Tensor x, Tensor weights, float eps) -> Tensor", fake=_fake_group_rms_norm)
def group_rms_norm(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of one input, or of one input per layer, with the weights of `G` layers.

    x: `[tokens, hidden]` shared by all layers (the variance is taken once), or `[G, tokens, hidden]`;
    weights: `[G, hidden]`. Returns `[G, tokens, hidden]` in x's dtype.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps) * weights.unsqueeze(1)


@_operator("prefix_sums(Tensor x, Tensor outputs) -> Tensor", fake=lambda x, outputs: torch.empty_like(outputs))
def prefix_sums(x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """`x` and the outputs up to each: `[tokens, hidden]` and `[G, tokens, hidden]` to `[G, tokens, hidden]`."""
    return torch.cat([x.unsqueeze(0), outputs]).cumsum(0)[1:]


@_operator(
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


@_operator(
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


@_operator(
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


@_operator(
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


@_operator(
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


@_operator(
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


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU: `[..., 2 * n]` (gates first) to `[..., n]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def slots_of(block_table: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Cache slots `int64` of positions of the requests `rows`; a position past the table takes its last block."""
    columns = (positions // block_size).clamp(max=block_table.shape[1] - 1)
    return block_table[rows, columns].long() * block_size + positions % block_size


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


def _load_native() -> str | None:
    """Put the native kernels in the place of the references. Returns why there are none, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() == "x86_64" and capability == "DEFAULT":
        return "this processor has no AVX2"
    on_gpu = torch.version.cuda or torch.version.hip
    # With a GPU one build contains everything; an AVX-512 build may be left over.
    names = ["_native_avx512", "_native"] if capability == "AVX512" and not on_gpu else ["_native"]
    built = [path for name in names for path in Path(__file__).parent.glob(f"{name}.*so")]
    if not built:
        return "they have not been built"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return f"they do not load: {error}"
    if on_gpu and not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::group_rms_norm", "CUDA"):
        return "they were built without nvcc, for the CPU only"
    return None


# Why this process has no native operators; None where it has them.
WHY_NOT_NATIVE = _load_native()
if WHY_NOT_NATIVE is not None:
    logger.warning(
        "native operators are not used, since %s. Drafting runs on plain torch, slower. To build them, install a C++ "
        "compiler (on a GPU host nvcc too) and then vllm-easyspec again with pip's --no-build-isolation",
        WHY_NOT_NATIVE,
    )
