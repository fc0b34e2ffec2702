"""The drafter's own operators: in plain torch, and natively (csrc/) where the package was built with a compiler.

Each operator `torch.ops.vllm_easyspec.<name>` has its schema and its reference here. Where the native library is there,
its kernels stand in for the references on the devices that it was built for; where it is not, one warning says why.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from vllm.logger import init_logger

logger = init_logger("vllm.easyspec")

NAMESPACE = "vllm_easyspec"
_library = torch.library.Library(NAMESPACE, "DEF")
# The plain-torch reference of each operator, which tests compare the kernels with.
REFERENCES: dict[torch._ops.OpOverload, Callable] = {}


def _operator(schema: str, fake: Callable | None = None) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define `torch.ops.vllm_easyspec.<schema>` with the decorated reference as its implementation on every device.

    fake: as in `torch.library.register_fake`; by default the operator returns nothing.
    """

    def define(reference: Callable) -> torch._ops.OpOverload:
        name = schema.partition("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *arguments: None), lib=_library)
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        REFERENCES[operator] = reference
        return operator

    return define


@_operator(
    "advance_draft_inputs(Tensor sampled, Tensor(a!) positions, Tensor live, Tensor block_table, Tensor(b!) input_ids, "
    "Tensor(c!) query_positions, Tensor(d!) seq_lens, Tensor(e!) slots, int block_size, int num_blocks, int max_len) "
    "-> ()"
)
def _advance_draft_inputs(
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
    rows = positions.shape[0]
    if rows == 0:
        return
    padding = positions < 0
    positions.add_(~padding)
    query = positions.clamp(min=0, max=max_len - 1)
    columns = (query // block_size).clamp(max=block_table.shape[1] - 1)
    blocks = block_table[:rows].gather(1, columns.unsqueeze(1)).squeeze(1).long()
    written = live & ~padding & (positions < max_len)
    own = torch.where(written, blocks * block_size + query % block_size, -1)
    input_ids.copy_(sampled.masked_fill(padding, 0))
    query_positions.view(-1, rows).copy_(query)
    seq_lens.view(-1, rows).copy_((query + 1).masked_fill(padding, 0))
    slots.copy_(shift_slots(own, slots.numel() // rows, num_blocks * block_size).view_as(slots))


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
    clamped to `max_len - 1` (0 in padding rows); seq_lens `int32`, one more than that (0 in padding rows); slots
    `int64`, shifted by `num_blocks * block_size` a layer, and -1 for padding rows, rows that are not live and positions
    past `max_len`.

    Raises RuntimeError (native only) for another dtype, size or layout.
    """
    torch.ops.vllm_easyspec.advance_draft_inputs(
        sampled,
        positions,
        live,
        block_table,
        input_ids,
        query_positions,
        seq_lens,
        slots,
        block_size,
        num_blocks,
        max_len,
    )


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


def _load_native() -> str | None:
    """Put the native kernels in the place of the references. Returns why there are none, or None."""
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return "they have not been built"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return f"they do not load: {error}"
    return None


# Why this process has no native operators; None where it has them.
WHY_NOT_NATIVE = _load_native()
if WHY_NOT_NATIVE is not None:
    logger.warning(
        "native operators are not used, since %s. Drafting runs on plain torch, slower. To build them, install a C++ "
        "compiler and then vllm-easyspec again with pip's --no-build-isolation",
        WHY_NOT_NATIVE,
    )
