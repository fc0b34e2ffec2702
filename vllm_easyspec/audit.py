"""The audit: whether the drafter's pages hold what a precise pass over the requests' tokens would have written."""

from dataclasses import dataclass

import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_easyspec.drafter.paged_kv import DensePass, DrafterAttention, PagedKV
from vllm_easyspec.speculator import EasySpecSpeculator


@dataclass(frozen=True)
class AuditedRequest:
    """The result of one request on one rank."""

    request_id: str
    tokens: int  # positions compared, from 0
    uncalibrated: int  # positions after them that paused rounds (K = 0) left for later
    largest_difference: float  # over this rank's layers and all positions; 0.0 where the rank holds no layer


@torch.inference_mode()
def audit(runner: GPUModelRunner, speculator: EasySpecSpeculator) -> list[AuditedRequest]:
    """Recompute the precise K/V of every live request and compare this rank's pages with it.

    All ranks must call it together, between engine steps: the precise pass has collectives. Each request is recomputed
    in one pass with quadratic attention, so this is for tests and debugging, too slow for production.
    """
    states = runner.req_states
    found = [
        _audit_request(request_id, index, runner, speculator)
        for request_id, index in sorted(states.req_id_to_index.items())
    ]
    return [request for request in found if request.tokens or request.uncalibrated]


def _calibrated_tokens(index: int, runner: GPUModelRunner, speculator: EasySpecSpeculator) -> tuple[int, int]:
    """How many positions should be precise: what the target has computed, and the newest token if there is one.

    For a request that paused rounds left behind only those before its first marked block; and how many are missing.
    """
    computed = int(runner.req_states.num_computed_tokens.gpu[index])
    if not computed:
        return 0, 0
    has_newest = computed >= int(runner.req_states.prefill_len.np[index])
    tokens = min(computed + has_newest, speculator.runtime.bounds.max_len)
    table = runner.block_tables.block_tables[0].gpu[index : index + 1]
    last = torch.tensor([computed - 1], device=table.device)
    read = min(tokens, int(speculator.runtime.uncalibrated.first_uncalibrated(table, last)))
    return read, tokens - read


def _audit_request(
    request_id: str, index: int, runner: GPUModelRunner, speculator: EasySpecSpeculator
) -> AuditedRequest:
    model, pages = speculator.model, speculator.runtime.pages
    tokens, uncalibrated = _calibrated_tokens(index, runner, speculator)
    if tokens == 0:
        return AuditedRequest(request_id, tokens, uncalibrated, 0.0)
    ids = runner.req_states.all_token_ids.gpu[index, :tokens].to(speculator.device).long()
    oracle = DensePass(tokens, model.shape.sliding_window, speculator.device)
    model(ids.clamp(max=model.vocab_size - 1), speculator.precise, oracle)
    blocks = -(-tokens // pages.block_size)
    table = runner.block_tables.block_tables[0].gpu[index, :blocks].long()
    differences = [
        _page_difference(layer, pages, table, *oracle.seen[index]) for index, layer in enumerate(pages.layers)
    ]
    return AuditedRequest(request_id, tokens, uncalibrated, max(differences, default=0.0))


def _page_difference(
    layer: DrafterAttention, pages: PagedKV, blocks: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> float:
    """The largest change when k and v are written over a copy of the request's pages, in the backend's own layout.

    blocks: `[blocks] int64`; k, v: `[tokens, kv_heads, head_dim]`.
    """
    cache = layer.kv_cache
    pages_a_block = cache.shape[0] // pages.num_blocks
    page_ids = (blocks.unsqueeze(1) * pages_a_block + torch.arange(pages_a_block, device=blocks.device)).view(-1)
    present = cache[page_ids]
    size = (len(page_ids), *cache.shape[1:])
    rewritten = torch.empty_strided(size, cache.stride(), dtype=cache.dtype, device=cache.device)
    rewritten.copy_(present)
    slots = torch.arange(k.shape[0], device=blocks.device)
    layer.impl.do_kv_cache_update(layer, k, v, rewritten, slots)
    return (rewritten.float() - present.float()).abs().max().item()
