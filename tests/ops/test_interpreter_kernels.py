"""The plain implementations in `cpu/triton-interpreter` against the kernels they replace, which run interpreted here.

Every case launches both on copies of the same random arguments and compares all tensors afterwards, to the bit: what
was written, what was not, and the padding.
"""

import copy
import importlib
import inspect

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

pytest.importorskip("triton_interpreter_backend", reason="only where kernels run in Triton's interpreter")

from triton_interpreter_backend import plain, vllm_plugin
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

vllm_plugin.register()

V2 = "vllm.v1.worker.gpu."
K = 5
VOCAB = 2500
MAX_REQS = 8
MODEL_LEN = 96
# `run` before `plain.install` replaced it.
INTERPRET = inspect.unwrap(InterpretedFunction.run)


def kernel_of(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def launch_both(name, grid, *args, **kwargs):
    """Launch the kernel, interpreted, and its implementation, on copies, and compare all tensors."""
    name = name if name in plain.IMPLEMENTATIONS else V2 + name
    kernel = kernel_of(name)
    arguments = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    # One deepcopy each, so that tensors which share memory still do.
    expected, got = copy.deepcopy(arguments), copy.deepcopy(arguments)
    INTERPRET(kernel, *expected.values(), grid=grid, warmup=False)
    assert plain.IMPLEMENTATIONS[name](grid, *got.values()) is not NotImplemented
    for parameter, value in expected.items():
        if isinstance(value, torch.Tensor):
            # Uninitialized memory may contain NaN.
            torch.testing.assert_close(
                got[parameter], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, at=parameter: f"{at}: {text}"
            )


@pytest.fixture(params=range(2))
def rng(request):
    return np.random.default_rng(request.param)


def ints(values, dtype=torch.int32):
    return torch.as_tensor(np.asarray(values), dtype=dtype)


def starts_of(lengths, extra=0):
    """Where each of the lengths starts, and the end; `extra` more entries repeat it, as in a padded batch."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return ints(np.concatenate([starts, np.full(extra, starts[-1])]))


def rows_of_requests(rng, num_reqs):
    return ints(rng.permutation(MAX_REQS)[:num_reqs], torch.int64)


def logits_of(rng, num_rows, vocab=VOCAB, dtype=torch.float32):
    """Rows of a wider tensor, so that the stride is not the vocabulary's size; with masked tokens and ties."""
    logits = torch.from_numpy(rng.normal(size=(num_rows, vocab + 7)).astype(np.float32) * 3)
    logits[:, rng.integers(0, vocab, 40)] = -torch.inf
    logits[:, rng.integers(0, vocab, 4)] = logits.max()
    return logits.to(dtype)[:, :vocab]


# --- The table and the hook ---


@pytest.mark.parametrize("name", plain.IMPLEMENTATIONS)
def test_kernel_exists_with_these_parameters(name):
    kernel = kernel_of(name)
    assert isinstance(kernel, InterpretedFunction)
    assert f"{kernel.fn.__module__}.{kernel.fn.__qualname__}" == name
    assert plain.parameters(plain.IMPLEMENTATIONS[name]) == kernel.arg_names


@triton.jit
def _double_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) * 2, mask=offsets < n)


@pytest.fixture
def implement(monkeypatch):
    """Enter implementations of `_double_kernel` for one test."""
    plain._implementation.cache_clear()
    yield lambda implementation: monkeypatch.setitem(
        plain.IMPLEMENTATIONS, f"{__name__}._double_kernel", implementation
    )
    plain._implementation.cache_clear()


def doubled():
    x = torch.arange(5)
    _double_kernel[(2,)](x, 5, BLOCK=4, num_warps=1)
    return x.tolist()


def test_implementation_is_launched(implement):
    implement(lambda grid, x_ptr, n, BLOCK: x_ptr.fill_(grid[0] * BLOCK + n))
    assert doubled() == [13] * 5


def test_a_launch_not_covered_is_interpreted(implement):
    implement(lambda grid, x_ptr, n, BLOCK: NotImplemented)
    assert doubled() == [0, 2, 4, 6, 8]


def test_other_parameters_are_interpreted_with_a_warning(implement, monkeypatch):
    warnings = []
    monkeypatch.setattr(plain.logger, "warning", lambda text, *args: warnings.append(text % args))
    implement(lambda grid, x_ptr, length, BLOCK: x_ptr.zero_())
    assert doubled() == doubled() == [0, 2, 4, 6, 8]
    assert len(warnings) == 1 and "_double_kernel stays interpreted" in warnings[0] and "length" in warnings[0]


def test_an_implementation_without_grid_is_refused():
    with pytest.raises(TypeError, match="must take the launch grid first"):
        plain.parameters(lambda x_ptr, n, BLOCK: None)


def test_two_implementations_of_a_kernel_are_refused():
    with pytest.raises(ValueError, match="already has a plain implementation"):
        plain.stands_for("input_batch._post_update_kernel")(lambda grid: None)


def test_register_is_idempotent_and_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", INTERPRET)
    monkeypatch.setenv("TRITON_INTERPRETER_PLAIN_KERNELS", "0")
    vllm_plugin.register()
    assert InterpretedFunction.run is INTERPRET
    monkeypatch.delenv("TRITON_INTERPRETER_PLAIN_KERNELS")
    vllm_plugin.register()
    installed = InterpretedFunction.run
    assert installed is not INTERPRET
    vllm_plugin.register()
    assert InterpretedFunction.run is installed


# --- plain_batch ---


def test_apply_write(rng):
    table = ints(rng.integers(0, 99, (MAX_REQS, 3000)))
    lengths = [3, 0, 1500, 1]
    launch_both(
        "buffer_utils._apply_write_kernel", (4,), table, table.stride(0), ints([2, 3, 5, 2]), ints([0, 7, 1024, 2]),
        ints(rng.integers(0, 99, sum(lengths))), ints(np.cumsum(lengths)), None, BLOCK_SIZE=1024, MULTI_GROUP=False,
    )  # fmt: skip


def test_apply_write_to_a_vector(rng):
    values = torch.from_numpy(rng.normal(size=MAX_REQS).astype(np.float32))
    launch_both(
        "buffer_utils._apply_write_kernel", (2,), values, 1, ints([6, 0]), ints([0, 0]), torch.tensor([1.5, -2.5]),
        ints([1, 2]), None, BLOCK_SIZE=1024, MULTI_GROUP=False,
    )  # fmt: skip


def pointers(tensors):
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)


def both_through_pointers(name, grid, tables, arguments):
    """Like launch_both, for a kernel that writes int32 tables through pointers; `arguments(tables)` are the call's."""
    expected, got = [copy.deepcopy(tables) for _ in range(2)]
    INTERPRET(kernel_of(V2 + name), *arguments(expected), grid=grid, warmup=False)
    assert plain.IMPLEMENTATIONS[V2 + name](grid, *arguments(got)) is not NotImplemented
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_apply_write_to_groups(rng):
    # 16 int32 apart, as block tables are aligned.
    tables = [ints(rng.integers(0, 99, (MAX_REQS, width))) for width in (16, 48)]
    contents = ints(rng.integers(0, 99, 9))
    strides = ints([16, 48], torch.int64)
    both_through_pointers(
        "buffer_utils._apply_write_kernel", (3,), tables,
        lambda t: (pointers(t), strides, ints([1, 7, 0]), ints([0, 5, 2]), contents, ints([4, 4, 9]), ints([0, 1, 1]),
                   1024, True),
    )  # fmt: skip


@pytest.mark.parametrize(("num_reqs", "num_rows"), [(3, 3), (3, 6), (0, 2)])
def test_gather_block_tables(rng, num_reqs, num_rows):
    tables = [ints(rng.integers(1, 99, (MAX_REQS, width))) for width in (16, 48)]
    outputs = [ints(rng.integers(1, 99, (MAX_REQS, width))) for width in (16, 48)]
    num_blocks = ints(rng.integers(0, 17, (2, MAX_REQS)))
    idx_mapping = rows_of_requests(rng, num_reqs)
    both_through_pointers(
        "block_table._gather_block_tables_kernel", (2, num_rows), outputs,
        lambda out: (idx_mapping, pointers(tables), pointers(out), ints([16, 48], torch.int64), num_blocks,
                     num_blocks.stride(0), num_reqs, 1024),
    )  # fmt: skip


@pytest.mark.parametrize(("cp_size", "cp_rank", "interleave"), [(1, 0, 1), (2, 1, 1), (2, 0, 4)])
def test_compute_slot_mappings(rng, cp_size, cp_rank, interleave):
    tables = [ints(rng.integers(1, 99, (MAX_REQS, 32))) for _ in range(3)]
    lengths = [4, 1, 3, 0]
    positions = np.concatenate([np.arange(p, p + n) for p, n in zip(rng.integers(0, 60, 4), lengths, strict=True)])
    idx_mapping = rows_of_requests(rng, 4)
    idx_mapping[2] = -1
    launch_both(
        "block_table._compute_slot_mappings_kernel", (3, 5), 12, idx_mapping, starts_of(lengths, extra=2),
        ints(positions, torch.int64), pointers(tables), ints([32, 32, 32], torch.int64), ints([16, 4, 16]),
        torch.tensor([True, True, False]), torch.tensor([True, False, True]), ints(np.full((3, 14), 7), torch.int64),
        14, cp_rank, CP_SIZE=cp_size, CP_INTERLEAVE=interleave, PAD_ID=-1, TRITON_BLOCK_SIZE=1024,
    )  # fmt: skip


@pytest.fixture
def batch(rng):
    """A batch of four: one whose prefill is in chunks, one whose prefill ends, and two past it, with drafts."""
    num_reqs, idx_mapping = 4, rows_of_requests(rng, 4)
    prefill_len, num_computed = np.full(MAX_REQS, 20), np.full(MAX_REQS, 33)
    num_computed[idx_mapping[0]], num_computed[idx_mapping[1]] = 7, 14
    query_lens, num_logits = [5, 6, 1 + K, 3], [1, 1, 1 + K, 3]
    return dict(
        num_reqs=num_reqs,
        idx_mapping=idx_mapping,
        prefill_len=ints(prefill_len),
        num_computed=ints(num_computed),
        query_start_loc=starts_of(query_lens, extra=2),
        seq_lens=ints(np.concatenate([num_computed[idx_mapping] + query_lens, [9, 9, 9, 9]])),
        cu_num_logits=starts_of(num_logits),
        all_token_ids=ints(rng.integers(0, VOCAB, (MAX_REQS, MODEL_LEN))),
        num_tokens=sum(query_lens),
        num_logits=sum(num_logits),
        expanded_idx_mapping=ints(np.repeat(idx_mapping, num_logits), torch.int64),
        expanded_local_pos=ints(np.concatenate([np.arange(n) for n in num_logits])),
        last_sampled=ints(rng.integers(0, VOCAB, (MAX_REQS, 1)), torch.int64),
    )


@pytest.mark.parametrize("num_lookahead", [1, 3])
def test_prepare_prefill_inputs(rng, batch, num_lookahead):
    following = ints(np.full((num_lookahead, MAX_REQS), 7))
    launch_both(
        "input_batch._prepare_prefill_inputs_kernel", (batch["num_reqs"],), ints(np.full(batch["num_tokens"] + 3, 7)),
        following, following.stride(0), num_lookahead, batch["idx_mapping"], batch["query_start_loc"],
        batch["all_token_ids"], MODEL_LEN, batch["prefill_len"], batch["num_computed"], BLOCK_SIZE=1024,
        LOOKAHEAD_BLOCK=4,
    )  # fmt: skip


def test_prepare_pos_seq_lens(batch):
    launch_both(
        "input_batch._prepare_pos_seq_lens_kernel", (batch["num_reqs"] + 1,),
        ints(np.full(batch["num_tokens"] + 3, 7), torch.int64), ints(np.full(MAX_REQS, 7)), batch["idx_mapping"],
        batch["query_start_loc"], batch["num_computed"], MAX_REQS - 1, BLOCK_SIZE=1024,
    )  # fmt: skip


@pytest.mark.parametrize("num_new", [1, 0])
def test_combine_sampled_and_draft_tokens(rng, batch, num_new):
    # The last request crosses its prefill's end within its draft slots, as after a remote prefill.
    prefill_len = batch["prefill_len"].clone()
    prefill_len[batch["idx_mapping"][3]] = 35
    launch_both(
        "input_batch._combine_sampled_and_draft_tokens_kernel", (batch["num_reqs"],),
        ints(np.full(batch["num_tokens"] + 3, 7)), batch["idx_mapping"], batch["last_sampled"],
        batch["query_start_loc"], batch["seq_lens"], prefill_len,
        ints(rng.integers(0, VOCAB, (MAX_REQS, 1 + K)), torch.int64), 1 + K, batch["cu_num_logits"],
        ints(np.full(batch["num_logits"], 7), torch.int64), BLOCK_SIZE=8, NUM_NEW_SAMPLED_TOKENS=num_new,
    )  # fmt: skip


def test_get_num_sampled_and_rejected(batch):
    launch_both(
        "input_batch._get_num_sampled_and_rejected_kernel", (batch["num_reqs"],), ints([1, 1, 4, 2]),
        ints([7, 7, 7, 7]), batch["seq_lens"], batch["cu_num_logits"], batch["idx_mapping"], batch["prefill_len"],
    )  # fmt: skip


@pytest.mark.parametrize("with_counts", [True, False])
@pytest.mark.parametrize("with_query", [True, False])
def test_post_update(rng, batch, with_counts, with_query):
    idx_mapping = batch["idx_mapping"].clone()
    idx_mapping[0] = -1
    counts = ints(rng.integers(0, 3, (MAX_REQS, VOCAB))) if with_counts else None
    sampled = ints(rng.integers(0, VOCAB, (4, 1 + K)), torch.int64)
    sampled[2, 1:4] = sampled[2, 0]
    launch_both(
        "input_batch._post_update_kernel", (4,), idx_mapping, batch["num_computed"], batch["last_sampled"], counts,
        VOCAB if with_counts else 0, sampled, 1 + K, ints([1, 0, 5, 1]), ints([0, 0, 1, 2]),
        batch["query_start_loc"] if with_query else None, batch["all_token_ids"], MODEL_LEN,
        ints(np.full(MAX_REQS, 40)),
    )  # fmt: skip


def test_post_update_num_computed_tokens(batch):
    launch_both(
        "input_batch._post_update_num_computed_tokens_kernel", (batch["num_reqs"],), batch["idx_mapping"],
        batch["num_computed"], batch["query_start_loc"],
    )  # fmt: skip


def test_expand_idx_mapping(batch):
    n = batch["num_logits"] + 2
    launch_both(
        "input_batch._expand_idx_mapping_kernel", (batch["num_reqs"],), batch["idx_mapping"],
        ints(np.full(n, 7), torch.int64), ints(np.full(n, 7)), batch["cu_num_logits"], BLOCK_SIZE=8,
    )  # fmt: skip


@pytest.mark.parametrize("max_model_len", [MODEL_LEN, 36])
def test_prepare_draft_prefill_inputs(rng, batch, max_model_len):
    positions = [p for i in range(4) for p in range(*batch_positions(batch, i))]
    n = batch["num_tokens"] + MAX_REQS
    launch_both(
        "spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel", (4,),
        ints(rng.integers(0, VOCAB, batch["num_tokens"])), ints(positions, torch.int64), batch["last_sampled"].int(),
        batch["idx_mapping"], ints(np.full(n, 7)), ints(np.full(n, 7), torch.int64),
        ints(np.full(MAX_REQS, 7), torch.int64), ints(np.full(MAX_REQS + 1, 7)), ints(np.full(MAX_REQS, 7)),
        batch["query_start_loc"], batch["seq_lens"], ints([0, 0, 3, 2]), MAX_REQS, max_model_len, BLOCK_SIZE=4,
    )  # fmt: skip


def batch_positions(batch, i):
    first = int(batch["num_computed"][batch["idx_mapping"][i]])
    return first, first + int(batch["query_start_loc"][i + 1] - batch["query_start_loc"][i])


def test_gather_draft_sampled(rng, batch):
    n = batch["num_logits"]
    # Positions on both sides of the prefill's end, 20.
    launch_both(
        "spec_decode.rejection_sampler._gather_draft_sampled_kernel", (1,), ints(np.full(n + 2, 7)),
        ints(np.full(n + 2, 7), torch.int64), ints(rng.integers(0, VOCAB, 30)),
        ints(rng.integers(15, 30, 30), torch.int64), ints(rng.integers(0, 30, n), torch.int64),
        batch["expanded_idx_mapping"], batch["expanded_local_pos"], batch["prefill_len"], n, BLOCK_SIZE=1024,
    )  # fmt: skip


def test_flatten_sampled(rng, batch):
    sampled = ints(rng.integers(0, VOCAB, (4, 1 + K)), torch.int64)
    launch_both(
        "spec_decode.rejection_sampler._flatten_sampled_kernel", (4,),
        ints(np.full(batch["num_logits"], 7), torch.int64), sampled, 1 + K, ints([1, 0, 5, 2]), batch["cu_num_logits"],
    )  # fmt: skip


def test_prompt_logprobs_token_ids(batch):
    launch_both(
        "sample.prompt_logprob._prompt_logprobs_token_ids_kernel", (4,),
        ints(np.full(batch["num_tokens"] + 2, 7), torch.int64), batch["query_start_loc"], batch["idx_mapping"],
        batch["num_computed"], batch["all_token_ids"], MODEL_LEN, BLOCK_SIZE=1024,
    )  # fmt: skip


# --- plain_sampling ---


@pytest.fixture
def rows(rng):
    """Five rows of logits; temperatures 0, 1 and others; seeds of all sizes and signs."""
    idx_mapping = ints([3, 0, 5, 3, 6], torch.int64)
    temperature = torch.tensor([0.7, 0.0, 0.0, 1.0, 0.0, 1.3, 0.0, 0.2])
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, MAX_REQS, dtype=np.int64))
    seeds[0] = 7
    pos = ints(rng.integers(0, 2**40, 5), torch.int64)
    pos[1] = 3
    return dict(idx_mapping=idx_mapping, temperature=temperature, seeds=seeds, pos=pos)


@pytest.mark.parametrize(
    ("dtype", "fp64", "drafting", "per_token"),
    [
        (torch.float32, False, False, None),
        (torch.float32, False, True, False),
        (torch.float32, True, False, True),
        (torch.bfloat16, False, False, None),
        (torch.bfloat16, False, True, True),
        (torch.bfloat16, True, True, False),
    ],
)
def test_gumbel_sample(rng, rows, dtype, fp64, drafting, per_token):
    """`per_token`: whether each row has its own column in the cache of logits; None without a cache."""
    logits, num_blocks = logits_of(rng, 5, dtype=dtype), -(-VOCAB // 1024)
    rows["idx_mapping"][4] = -1
    cache = column = None
    if per_token is not None:
        cache = torch.full((MAX_REQS, K, VOCAB + 3), 7, dtype=dtype)
        column = ints([0, 1, 2, 4, 1]) if per_token else torch.tensor(2)
    launch_both(
        "sample.gumbel._gumbel_sample_kernel", (5, num_blocks), ints(np.full((5, num_blocks), 7), torch.int64),
        num_blocks, torch.zeros(5, num_blocks, dtype=torch.float64 if fp64 else torch.float32), num_blocks, cache,
        cache.stride(0) if cache is not None else 0, cache.stride(1) if cache is not None else 0, column,
        logits if cache is not None else None, logits.stride(0), logits, logits.stride(0), rows["idx_mapping"],
        rows["seeds"], rows["pos"], rows["temperature"], VOCAB, BLOCK_SIZE=1024, IS_DRAFTING=drafting,
        APPLY_TEMPERATURE=drafting, USE_FP64=fp64, PER_TOKEN_COL=bool(per_token),
    )  # fmt: skip


def test_temperature(rng, rows):
    # Only in float32, of which vLLM makes a copy: the interpreter rounds a stored bfloat16 towards zero.
    logits = logits_of(rng, 5)
    launch_both(
        "sample.gumbel._temperature_kernel", (5, 1), logits, logits.stride(0), rows["idx_mapping"],
        rows["temperature"], VOCAB, BLOCK_SIZE=8192,
    )  # fmt: skip


def test_min_p(rng, rows):
    logits = logits_of(rng, 5)
    min_p = torch.tensor([0.1, 0.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0])
    launch_both("sample.min_p._min_p_kernel", (5,), logits, logits.stride(0), rows["idx_mapping"], min_p, VOCAB, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_grammar_bitmask(rng, dtype):
    logits, stride = logits_of(rng, 10, dtype=dtype), K + 1
    bitmask = ints(rng.integers(-(2**31), 2**31 - 1, (6, -(-VOCAB // 32)), dtype=np.int64))
    bitmask[2] = -1
    # Request 2 has lost its third position.
    places = ints([0 * stride, 1 * stride, 1 * stride + 1, 2 * stride, 2 * stride + 1, 2 * stride + 2])
    launch_both(
        "structured_outputs._apply_grammar_bitmask_kernel", (6, 1), logits, logits.stride(0), places,
        ints([0, 1, 4, 6, 10]), bitmask, bitmask.stride(0), VOCAB, MASK_STRIDE=stride, BLOCK_SIZE=8192,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topk", [1, 4, 20])
def test_topk_log_softmax(rng, dtype, topk):
    logits, ids = logits_of(rng, 5, dtype=dtype), ints(rng.integers(0, VOCAB, (5, topk)), torch.int64)
    launch_both(
        "sample.logprob._topk_log_softmax_kernel", (5,), torch.zeros(5, topk), logits, logits.stride(0), ids,
        ids.stride(0), topk, VOCAB, BLOCK_SIZE=1024, TOPK_BLOCK_SIZE=16,
    )  # fmt: skip


def test_ranks(rng):
    logits, ids = logits_of(rng, 5), ints(rng.integers(0, VOCAB, 5), torch.int64)
    ids[0] = logits[0].argmax()
    ids[1] = logits[1].argmin()
    launch_both(
        "sample.logprob._ranks_kernel", (5,), ints(np.full(5, 7), torch.int64), logits, logits.stride(0), ids, VOCAB,
        BLOCK_SIZE=8192,
    )  # fmt: skip


@pytest.mark.parametrize("num_topk", [0, 3])
def test_fill_logprob_token_ids(rng, rows, num_topk):
    num_ids = ints([0, 0, 0, 2, 0, 5, 0, 0])
    launch_both(
        "sample.logprob._fill_logprob_token_ids_kernel", (5,), ints(np.zeros((5, 6)), torch.int64), 6,
        torch.zeros(5, 6, dtype=torch.bool), 6, ints(rng.integers(0, VOCAB, 5), torch.int64),
        ints(rng.integers(0, VOCAB, (5, 4))), 4, rows["idx_mapping"], num_ids,
        ints(rng.integers(0, VOCAB, (MAX_REQS, 16))), 16, NUM_TOPK=num_topk, PADDED_COLS=8,
    )  # fmt: skip


# --- plain_logits ---


@pytest.fixture
def drafted(rng):
    """Rows of logits of two requests, the first with three drafts: their place, and the tokens put in."""
    return dict(
        idx_mapping=ints([3, 3, 3, 3, 5], torch.int64),
        local_pos=ints([0, 1, 2, 3, 0]),
        input_ids=ints([9, 4, 4, -1, 7]),
        all_token_ids=ints(rng.integers(0, VOCAB, (MAX_REQS, MODEL_LEN))),
        prompt_len=ints(np.full(MAX_REQS, 12)),
    )


def test_bincount(rng, drafted):
    drafted["all_token_ids"][:, 3:6] = 31
    drafted["all_token_ids"][:, 14:17] = 31
    prefill_len = ints([12, 12, 12, 12, 12, 60, 12, 12])
    launch_both(
        "sample.penalties._bincount_kernel", (2, 1), ints([3, 5], torch.int64), drafted["all_token_ids"], MODEL_LEN,
        drafted["prompt_len"], prefill_len, ints(np.zeros((MAX_REQS, -(-VOCAB // 32)))), -(-VOCAB // 32),
        ints(np.zeros((MAX_REQS, VOCAB))), VOCAB, BLOCK_SIZE=1024,
    )  # fmt: skip


@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.8])
@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 0.0), (0.4, 0.0), (0.0, -0.7), (0.3, 0.9)])
def test_penalties(rng, drafted, repetition, frequency, presence):
    logits, words = logits_of(rng, 5), -(-VOCAB // 32)
    launch_both(
        "sample.penalties._penalties_kernel", (5, 1), logits, logits.stride(0), drafted["idx_mapping"],
        drafted["input_ids"], drafted["local_pos"], torch.full((MAX_REQS,), repetition),
        torch.full((MAX_REQS,), frequency), torch.full((MAX_REQS,), presence),
        ints(rng.integers(-(2**31), 2**31 - 1, (MAX_REQS, words), dtype=np.int64)), words,
        ints(rng.integers(0, 3, (MAX_REQS, VOCAB))), VOCAB, VOCAB, BLOCK_SIZE=8192,
    )  # fmt: skip


def test_bad_words(rng, drafted):
    logits = logits_of(rng, 5)
    # Words of request 3: one token; ends of the output and of the drafts; one longer than the output.
    output = drafted["all_token_ids"][3, 12:20].tolist()
    words = [[8], [*output[-2:], 11], [output[-1], 4, 12], [4, 4, 13], [5, 4, 14], [*range(15), 15]]
    tokens, offsets = ints(np.zeros((MAX_REQS, 64))), ints(np.zeros((MAX_REQS, 17)))
    for req_idx, its_words in ((3, words), (5, [[7]])):
        flat = [token for word in its_words for token in word]
        tokens[req_idx, : len(flat)] = ints(flat)
        offsets[req_idx, : len(its_words) + 1] = starts_of([len(word) for word in its_words])
    num_words = ints([0, 0, 0, len(words), 0, 0, 0, 0])
    launch_both(
        "sample.bad_words._bad_words_kernel", (5, len(words)), logits, logits.stride(0), drafted["idx_mapping"],
        tokens, 64, offsets, 17, num_words, drafted["all_token_ids"], MODEL_LEN, drafted["prompt_len"],
        ints(np.full(MAX_REQS, 20)), drafted["input_ids"], drafted["local_pos"],
    )  # fmt: skip


@pytest.mark.parametrize("num_allowed", [0, 2, 5])
@pytest.mark.parametrize("check_all_masked", [False, True])
def test_bias(rng, drafted, num_allowed, check_all_masked):
    """Allowed tokens, biases and stop tokens; two allowed tokens are also the stop tokens, so that nothing is left."""
    logits = logits_of(rng, 5)
    logits[0, 40] = 1.0
    allowed = ints(np.tile([40, 41, 7, 8, 9, 10], (MAX_REQS, 1)))
    biases = torch.from_numpy(rng.normal(size=(MAX_REQS, 4)).astype(np.float32))
    launch_both(
        "sample.logit_bias._bias_kernel", (5,), logits, logits.stride(0), VOCAB, drafted["idx_mapping"],
        ints(np.full(MAX_REQS, num_allowed)), allowed, 6, ints([0, 0, 0, 3, 0, 0, 0, 0]),
        ints(np.tile([7, 9, VOCAB - 1, 0], (MAX_REQS, 1))), 4, biases, 4, ints([10, 11, 12, 13, 10], torch.int64),
        ints(np.full(MAX_REQS, 13)), ints([0, 0, 0, 2, 0, 1, 0, 0]), ints([0, 0, 0, 1, 0, 0, 0, 0]),
        ints(np.tile([40, 41], (MAX_REQS, 1))), 2, BLOCK_SIZE=8, LOGITS_BLOCK_SIZE=8192,
        CHECK_ALL_MASKED_ROWS=check_all_masked,
    )  # fmt: skip


class LanguageWithTensorRange:
    """`triton.language`, its `range` giving tensors: the interpreter's gives numbers, and the kernel below stops."""

    def __getattr__(self, name):
        return getattr(tl, name)

    @staticmethod
    def range(*bounds):
        numbers = (int(b.handle.data[0]) if isinstance(b, tl.tensor) else b for b in bounds)
        return (tl.tensor(TensorHandle(np.array([i], np.int32), tl.int32), tl.int32) for i in range(*numbers))


@pytest.mark.parametrize(
    ("k", "p"),
    [
        (None, [0.9, 0.5, 0.05, 1.0]),
        ([20, 1, 300, 600], None),
        ([20, 1, 300, 600], [0.9, 0.5, 0.3, 0.6]),
        ([600, 250, 1, 600], [0.8, 1.0, 1.0, 1.0]),
    ],
)
def test_topk_topp(rng, monkeypatch, k, p):
    """Whole numbers among the logits, so that there are ties; one row of few tokens, as a grammar leaves it."""
    monkeypatch.setattr(topk_topp_triton, "tl", LanguageWithTensorRange())
    monkeypatch.setattr(topk_topp_triton, "triton_language", tl, raising=False)
    vocab, num_rows = 600, 4
    logits = torch.from_numpy(rng.normal(size=(num_rows, vocab)).astype(np.float32) * 3)
    logits[:, ::3] = logits[:, ::3].round()
    logits[2, 5:] = -torch.inf
    kernel = topk_topp_triton._topk_topp_kernel
    expected, got = logits.clone(), logits.clone()
    for launch, out in ((INTERPRET, expected), (InterpretedFunction.run, got)):
        launch(
            kernel, out, vocab, torch.zeros(1, vocab), torch.tensor(topk_topp_triton._PERCENTILE_TO_STD_TABLE),
            torch.tensor(topk_topp_triton._NORMAL_CDF_TO_SIGMA_TABLE), ints(k) if k else out,
            torch.tensor(p) if p else out, num_rows, VOCAB_SIZE=vocab, MASK_VALUE=-float("inf"), BLOCK_SIZE=256,
            BLOCK_SIZE_TRUNC=128, TOPK_ENABLED=bool(k), TOPP_ENABLED=bool(p), SPLIT_COVERS_PONLY=False, grid=(1,),
            warmup=False,
        )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if k:
        assert (got > -torch.inf).sum(dim=1).le(ints(k)).all()


# --- plain_rejection ---


@pytest.fixture
def compared(monkeypatch):
    """Compare both ways at every launch that follows, then launch as usual. Gives the names of the kernels launched."""
    launched, run = set(), InterpretedFunction.run

    def compare_and_run(self, *args, grid, warmup, **kwargs):
        name = f"{self.fn.__module__}.{self.fn.__qualname__}"
        launched.add(name)
        launch_both(name, grid, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", compare_and_run)
    return launched


class Libdevice:
    """The one function of libdevice these kernels call. The interpreter has none of them: a verification with draft
    logits stops there."""

    @staticmethod
    def log1p(x):
        return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)


@pytest.mark.parametrize(
    ("dtype", "vocab", "draft_logits", "method", "fp64"),
    [
        (torch.float32, VOCAB, None, "standard", False),
        (torch.float32, VOCAB, torch.float32, "standard", False),
        (torch.float32, VOCAB, torch.float32, "synthetic", True),
        (torch.bfloat16, 9000, None, "standard", True),
        (torch.bfloat16, 9000, torch.bfloat16, "standard", False),
        (torch.float32, VOCAB, None, "block", False),
        (torch.bfloat16, 9000, torch.bfloat16, "block", False),
    ],
)
def test_rejection_sample(rng, rows, compared, monkeypatch, dtype, vocab, draft_logits, method, fp64):
    """All of a verification: greedy and sampled requests, all accepted and none, placeholders, no drafts at all."""
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", Libdevice)
    num_logits = [1 + K, 1 + K, 1, 4, 1 + K, 1 + K]
    idx_mapping = ints([3, 1, 5, 7, 4, 0], torch.int64)
    starts = starts_of(num_logits)
    target = logits_of(rng, sum(num_logits), vocab, dtype)
    # A drafter close to the target, so that drafts are accepted and rejected.
    drafter = target.float() + torch.from_numpy(rng.normal(size=target.shape).astype(np.float32))
    drafts = drafter.argmax(dim=-1).roll(1).int()
    # Request 1 is greedy and gets what the target would say; request 7's second draft is a placeholder.
    drafts[starts[1] + 1 : starts[2]] = target[starts[1] : starts[2] - 1].argmax(dim=-1).int()
    drafts[starts[3] + 2] = -1
    # Of request 4, greedy, the third.
    drafts[starts[4] + 1 : starts[5]] = target[starts[4] : starts[5] - 1].argmax(dim=-1).int()
    drafts[starts[4] + 3] = -1
    cache = None
    if draft_logits is not None:
        cache = torch.zeros(MAX_REQS, K, vocab, dtype=draft_logits)
        for i, req_idx in enumerate(idx_mapping.tolist()):
            rows_of_drafts = drafter[starts[i] : starts[i + 1] - 1]
            cache[req_idx, : len(rows_of_drafts)] = rows_of_drafts.to(draft_logits)
    sampled, num_sampled = rejection_sampler_utils.rejection_sample(
        target, cache, drafts, starts, ints(rng.integers(0, 99, sum(num_logits)), torch.int64), idx_mapping,
        ints(np.repeat(idx_mapping, num_logits), torch.int64),
        ints(np.concatenate([np.arange(n) for n in num_logits])), rows["temperature"], rows["seeds"], K,
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]) if method == "synthetic" else None, use_fp64=fp64,
        use_block_verification=method == "block",
    )  # fmt: skip
    assert len(compared) == 4 + (method == "block") + (method == "block" and draft_logits is not None)
    if method != "synthetic":
        assert num_sampled[1] == 1 + K and num_sampled[4] == 3 and num_sampled[2] == 1
        assert (sampled[1, :K] == drafts[starts[1] + 1 : starts[2]]).all()


def test_another_vllm_keeps_its_kernels_interpreted(monkeypatch):
    """A kernel of another version may compute something else behind the same parameters."""
    import vllm.version

    installed = []
    monkeypatch.setattr(plain, "install", lambda: installed.append(True))
    vllm_plugin.register()
    assert installed == [True]
    monkeypatch.setattr(vllm.version, "__version__", "0.33.0")
    vllm_plugin.register()
    assert installed == [True]
