"""The operators of a draft step's layers: each as exact as its plain-torch reference, on the same arguments.

Errors are measured against the reference in float64. Since an operator sums in another order, its error may be twice
that of the reference at the operator's own precision, plus two units in the last place of the largest number: the
reference's error is one sample, and small by chance on some processors.
"""

from unittest.mock import patch

import pytest
import torch

from vllm_easyspec import ops
from vllm_easyspec.ops import choice, layers
from vllm_easyspec.packing import dequantized, is_packed, pack, quantize, unpack

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPERATORS = torch.ops.vllm_easyspec
PRODUCTS = [getattr(OPERATORS, name).default for name in ops.STACKED_PRODUCTS]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def seed(native):
    torch.manual_seed(0)


def randn(*size, dtype=F32, scale=1.0):
    return (scale * torch.randn(size)).to(dtype)


def in_float64(arguments):
    floating = (F32, BF16, F16)
    return [a.double() if isinstance(a, torch.Tensor) and a.dtype in floating else a for a in arguments]


def as_native(operator, arguments):
    """The arguments that the native operator of this device takes: on a CPU with packed weights."""
    if operator not in PRODUCTS or arguments[0].is_cuda:
        return arguments
    weights = {"norm_and_project": {2: 1}, "project_among_zeros": {1: 1}, "sum_of_mlps": {2: 2, 5: 1}}
    parts = weights[operator._schema.name.split("::")[1]]
    return tuple(pack(a, parts[i]) if i in parts else a for i, a in enumerate(arguments))


def quantized(weights, dtype):
    """The weights in `dtype` and their scales, or as they are and none."""
    return (weights, None) if dtype is None else quantize(weights, dtype)


def check_as_exact(operator, arguments):
    """For an operator that returns one tensor."""
    if (
        operator in PRODUCTS
        and arguments[0].is_cuda
        and not (ops.is_short(arguments[0]) and choice._are_vectors(arguments))
    ):
        pytest.skip("torch's products serve it")
    reference = ops.REFERENCES[operator]
    with patch.object(layers, "group_rms_norm", ops.REFERENCES[OPERATORS.group_rms_norm.default]):
        native = as_native(operator, arguments)
        got, plain, exact = operator(*native), reference(*arguments), reference(*in_float64(arguments))
    assert got.shape == exact.shape and got.dtype == arguments[0].dtype and got.is_contiguous()
    check_close(got, plain, exact)


def check_close(got, plain, exact):
    error, allowed = (got.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
    assert error <= allowed + 2 * torch.finfo(got.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_embed_shard(dtype):
    """Tokens 20 to 29 of 40; the table is padded to 12 rows."""
    table, ids = randn(12, 6, dtype=dtype), torch.tensor([0, 19, 20, 25, 29, 30, 39])
    expected = torch.stack([table[i - 20] if 20 <= i < 30 else torch.zeros(6, dtype=dtype) for i in ids.tolist()])
    operator = OPERATORS.embed_shard.default
    for implementation in (operator, ops.REFERENCES[operator]):
        assert implementation(ids, table, 20, 10).equal(expected)
        column = torch.stack([ids, ids + 1], dim=1)[:, 0]  # drafts are a column of a wider buffer
        assert implementation(column, table, 20, 10).equal(expected)


def norm_arguments(dtype, layers=3, tokens=5, hidden=96, shared=True):
    x = randn(*(() if shared else (layers,)), tokens, hidden, dtype=dtype, scale=3)
    return x, 1 + randn(layers, hidden, dtype=dtype, scale=0.3), 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("hidden", [7, 128, 1536])
def test_group_rms_norm(dtype, shared, hidden):
    check_as_exact(OPERATORS.group_rms_norm.default, norm_arguments(dtype, hidden=hidden, shared=shared))


def test_group_rms_norm_of_no_tokens():
    assert ops.group_rms_norm(*norm_arguments(F32, tokens=0)).shape == (3, 0, 96)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layers", [1, 5])
def test_prefix_sums(dtype, layers):
    check_as_exact(OPERATORS.prefix_sums.default, (randn(3, 40, dtype=dtype), randn(layers, 3, 40, dtype=dtype)))


def rotate_arguments(dtype, *, neox=True, norms=True, cache=False, rotary=32, layers=3, tokens=4):
    """3 query and 2 key heads of 32 numbers; weights of 5 layers, of which the group's begin at the second; pages in
    FlashAttention's order, heads inside a token; every other row is padding."""
    angles = torch.rand(100, rotary // 2) * 7
    pages = randn(20, 16, 2, 64, dtype=dtype).transpose(1, 2) if cache else None
    slots = torch.randperm(20 * 16)[: layers * tokens] if cache else None
    if cache:
        slots[::2] = -1
    return (
        randn(layers, tokens, 3 + 2 * 2, 32, dtype=dtype),
        torch.randint(0, 100, (layers * tokens,)),
        torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype),
        3,
        2,
        neox,
        *((1 + randn(5, 32, dtype=dtype, scale=0.3) for _ in range(2)) if norms else (None, None)),
        1,
        1e-6,
        pages,
        slots,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rotary", [32, 16])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("norms", [True, False])
def test_rotate(dtype, rotary, neox, norms):
    arguments = rotate_arguments(dtype, neox=neox, norms=norms, rotary=rotary)
    results = []
    for operator, own in (
        (OPERATORS.rotate_and_store.default, list(arguments)),
        (ops.REFERENCES[OPERATORS.rotate_and_store.default], list(arguments)),
        (ops.REFERENCES[OPERATORS.rotate_and_store.default], in_float64(arguments)),
    ):
        own[0] = own[0].clone()
        operator(*own)
        results.append(own[0])
    check_close(*results)
    assert results[0][:, :, 5:].equal(arguments[0][:, :, 5:])  # values are left alone
    assert not results[0][:, :, :5].equal(arguments[0][:, :, :5])


def test_rotation_is_the_models_own():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    arguments = rotate_arguments(F32, norms=False)
    qkv, positions, cos_sin = arguments[:3]
    q, k = qkv[:, :, :3].clone(), qkv[:, :, 3:5].clone()
    cos, sin = cos_sin[positions].view(3, 4, 32).chunk(2, dim=-1)
    expected = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), unsqueeze_dim=2)
    ops.rotate_and_store(*arguments)
    torch.testing.assert_close(qkv[:, :, :5], torch.cat(expected, dim=2))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("implementation", ["operator", "reference"])
def test_store_writes_live_slots_and_nothing_else(dtype, implementation):
    arguments = rotate_arguments(dtype, cache=True)
    operator = OPERATORS.rotate_and_store.default
    qkv, pages, slots = arguments[0], arguments[10], arguments[11]
    expected = pages.clone()
    (operator if implementation == "operator" else ops.REFERENCES[operator])(*arguments)
    rows = qkv.flatten(0, 1)
    assert (slots < 0).any() and (slots >= 0).any()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, :, slot % 16, :32] = rows[row, 3:5]
            expected[slot // 16, :, slot % 16, 32:] = rows[row, 5:]
    assert pages.equal(expected)


def project_arguments(dtype, tokens=5, hidden=96, columns=160, bias=True, weights: torch.dtype | None = None):
    """Layers 2 to 4 of 6."""
    return (
        randn(tokens, hidden, dtype=dtype, scale=3),
        1 + randn(6, hidden, dtype=dtype, scale=0.3),
        *quantized(randn(6, hidden, columns, dtype=dtype, scale=hidden**-0.5), weights),
        randn(6, columns, dtype=dtype) if bias else None,
        2,
        3,
        columns,
        1e-6,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [*range(1, 17), 64, 65, 130])
@pytest.mark.parametrize("columns", [160, 64, 77])
def test_norm_and_project(dtype, tokens, columns):
    check_as_exact(OPERATORS.norm_and_project.default, project_arguments(dtype, tokens=tokens, columns=columns))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_and_project_of_an_input_a_layer(dtype):
    _, *arguments = project_arguments(dtype)
    check_as_exact(OPERATORS.norm_and_project.default, (randn(3, 5, 96, dtype=dtype, scale=3), *arguments))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("weights", QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 8, 9, 32, 70])
@pytest.mark.parametrize(("hidden", "columns"), [(96, 160), (301, 77)])
def test_norm_and_project_of_quantized_weights(of_cpu, dtype, weights, tokens, hidden, columns):
    """hidden: also odd, and more than one chunk of a tile."""
    arguments = project_arguments(dtype, tokens=tokens, hidden=hidden, columns=columns, weights=weights)
    check_as_exact(OPERATORS.norm_and_project.default, arguments)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("hidden", [1, 33, 255, 257, 301])
def test_norm_and_project_of_any_width(of_cpu, dtype, hidden):
    check_as_exact(OPERATORS.norm_and_project.default, project_arguments(dtype, hidden=hidden, columns=77))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, *QUANTIZED])
@pytest.mark.parametrize(("inner", "columns", "parts"), [(4, 64, 1), (7, 154, 2), (130, 33, 1), (1, 256, 2)])
@pytest.mark.parametrize("layers", [3, 0])
def test_packed_weights_unpack(dtype, inner, columns, parts, layers):
    """Also those of a rank without layers."""
    weights = randn(layers, inner, columns)
    weights = quantize(weights, dtype)[0] if dtype in QUANTIZED else weights.to(dtype)
    packed = pack(weights, parts)
    assert packed.dtype is dtype and packed.is_contiguous() and is_packed(packed) and not is_packed(weights)
    assert unpack(packed, inner, columns, parts).equal(weights)
    assert dequantized(packed, None, dtype, inner, columns, parts).equal(weights), "what a reference computes with"


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_every_quantized_number_is_read_as_it_is(of_cpu, dtype):
    """All codes but NaN's, in every column of a tile and beside one another; by both ways to multiply."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(dtype) if dtype is not torch.int8 else codes.view(dtype).clamp(min=-127)
    numbers = numbers[numbers.float().isfinite()]
    count = len(numbers)
    weights = torch.stack([numbers.roll(shift) for shift in range(128)], dim=1).unsqueeze(0)
    scales = torch.ones(1, 128)
    for x_dtype in (F32, BF16):
        rows = torch.eye(count, dtype=x_dtype).unsqueeze(0)
        got = OPERATORS.project_among_zeros(rows, pack(weights), scales, None, 0, 1, 0, 1, 128)
        assert got[0].float().equal(weights[0].float())


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_quantized_column_is_within_half_a_step(dtype):
    weights = randn(2, 96, 5, scale=0.05)
    weights[1, :, 3] = 0
    codes, scales = quantize(weights, dtype)
    assert codes.dtype is dtype and scales.shape == (2, 5)
    error = (codes.float() * scales.unsqueeze(1) - weights).abs()
    largest = weights.abs().amax(dim=1, keepdim=True)
    if dtype is torch.int8:
        assert (error <= largest / 254 * 1.001).all()
    else:
        assert (error <= torch.maximum(weights.abs() / 16, largest / 448 * 2**-10) * 1.001).all()


def test_norm_and_project_without_bias():
    check_as_exact(OPERATORS.norm_and_project.default, project_arguments(F32, bias=False))


def among_zeros_arguments(dtype, tokens=5, columns=96, bias=True, inner=48, weights: torch.dtype | None = None):
    """Layers 1 and 2 of 4 are the second and the fifth of a group of 6."""
    return (
        randn(2, tokens, inner, dtype=dtype),
        *quantized(randn(4, inner, columns, dtype=dtype, scale=0.15), weights),
        randn(4, columns, dtype=dtype) if bias else None,
        1,
        6,
        1,
        3,
        columns,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("columns", [96, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_project_among_zeros(dtype, columns, bias):
    arguments = among_zeros_arguments(dtype, columns=columns, bias=bias)
    check_as_exact(OPERATORS.project_among_zeros.default, arguments)
    out = OPERATORS.project_among_zeros(*as_native(OPERATORS.project_among_zeros.default, arguments))
    assert [bool(layer.any()) for layer in out] == [False, True, False, False, True, False]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("weights", QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("inner", [48, 51])
def test_project_among_zeros_of_quantized_weights(of_cpu, dtype, weights, tokens, inner):
    arguments = among_zeros_arguments(dtype, tokens=tokens, columns=70, inner=inner, weights=weights)
    check_as_exact(OPERATORS.project_among_zeros.default, arguments)


def mlp_arguments(
    dtype, layers=2, tokens=5, width=80, bias=True, residual=True, hidden=96, weights: torch.dtype | None = None
):
    """The layers from the third of 6 on."""
    return (
        randn(layers, tokens, hidden, dtype=dtype, scale=3),
        1 + randn(6, hidden, dtype=dtype, scale=0.3),
        *quantized(randn(6, hidden, 2 * width, dtype=dtype, scale=hidden**-0.5), weights),
        randn(6, 2 * width, dtype=dtype) if bias else None,
        *quantized(randn(6, width, hidden, dtype=dtype, scale=width**-0.5), weights),
        randn(tokens, hidden, dtype=dtype) if residual else None,
        2,
        width,
        1e-6,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("weights", QUANTIZED)
@pytest.mark.parametrize("tokens", [1, 3, 8, 70])
@pytest.mark.parametrize(("layers", "width", "hidden"), [(1, 96, 96), (4, 80, 130), (3, 23, 77)])
def test_sum_of_quantized_mlps(of_cpu, dtype, weights, tokens, layers, width, hidden):
    arguments = mlp_arguments(dtype, layers=layers, tokens=tokens, width=width, hidden=hidden, weights=weights)
    check_as_exact(OPERATORS.sum_of_mlps.default, arguments)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 3, 8, 70])
@pytest.mark.parametrize(("layers", "width"), [(1, 96), (4, 80), (3, 23)])
def test_sum_of_mlps(dtype, tokens, layers, width):
    arguments = mlp_arguments(dtype, layers=layers, tokens=tokens, width=width)
    check_as_exact(OPERATORS.sum_of_mlps.default, arguments)


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True), (False, False)])
def test_sum_of_mlps_without(bias, residual):
    check_as_exact(OPERATORS.sum_of_mlps.default, mlp_arguments(F32, bias=bias, residual=residual))


def test_gates_far_from_zero_saturate(of_cpu):
    """e^x is computed natively: a gate of -200 lets nothing through, one of 200 all, and none gives NaN."""
    inputs, norms, gate_up, *others = mlp_arguments(F32, bias=False, residual=False)
    for scale in (300.0, -300.0):
        arguments = (inputs, norms, gate_up * scale, *others)
        assert OPERATORS.sum_of_mlps(*as_native(OPERATORS.sum_of_mlps.default, arguments)).isfinite().all()
        check_as_exact(OPERATORS.sum_of_mlps.default, arguments)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("hidden", [96, 130])
def test_group_features(dtype, tokens, hidden):
    check_as_exact(OPERATORS.group_features.default, feature_arguments(dtype, tokens, hidden))


def feature_arguments(dtype, tokens=3, hidden=40):
    return randn(tokens, hidden, dtype=dtype, scale=3), randn(tokens, hidden, dtype=dtype), 1e-6


def look_ahead_arguments(
    dtype, layers=3, tokens=5, hidden=96, rank=40, own=True, first=False, maps_dtype: torch.dtype | None = None
):
    """The first `layers` of 5."""
    maps_dtype = maps_dtype or dtype
    inputs = (5 if own else 4) * hidden
    return (
        randn(*((layers,) if own else ()), tokens, hidden, dtype=dtype, scale=3),
        randn(tokens, 4 * hidden, dtype=dtype),
        randn(5, inputs, rank, dtype=maps_dtype, scale=inputs**-0.5),
        randn(5, rank, hidden, dtype=maps_dtype, scale=rank**-0.5),
        randn(5, hidden, dtype=maps_dtype),
        layers,
        first,
        1e-6,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("rank", [7, 64, 100])
@pytest.mark.parametrize("own", [True, False])
def test_look_ahead(dtype, tokens, rank, own):
    check_as_exact(
        OPERATORS.look_ahead.default, look_ahead_arguments(dtype, layers=4, tokens=tokens, rank=rank, own=own)
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 2, 6, 8, 9, 16])
@pytest.mark.parametrize(("layers", "hidden", "width"), [(1, 896, 4864), (4, 896, 4864), (4, 4096, 8960)])
def test_sum_of_mlps_at_real_widths(of_gpu, dtype, tokens, layers, hidden, width):
    """On a GPU a tile's rows are divided among the blocks of a cluster, and read in several chunks."""
    arguments = mlp_arguments(dtype, layers=layers, tokens=tokens, width=width, hidden=hidden)
    check_as_exact(OPERATORS.sum_of_mlps.default, arguments)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 2, 6, 13])
@pytest.mark.parametrize(("hidden", "columns"), [(896, 1152), (1536, 2048), (8192, 144), (104, 4096)])
def test_norm_and_project_at_real_widths(of_gpu, dtype, tokens, hidden, columns):
    arguments = project_arguments(dtype, tokens=tokens, hidden=hidden, columns=columns)
    check_as_exact(OPERATORS.norm_and_project.default, arguments)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("maps_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("own", [True, False])
def test_look_ahead_with_the_first_layer_and_maps_of_another_dtype(dtype, maps_dtype, own):
    arguments = look_ahead_arguments(dtype, layers=5, own=own, first=True, maps_dtype=maps_dtype)
    check_as_exact(OPERATORS.look_ahead.default, arguments)
    x = arguments[0]
    assert OPERATORS.look_ahead.default(*arguments)[0].equal(x[0] if own else x), "the first layer reads x itself"


def test_results_do_not_depend_on_the_number_of_threads(of_cpu):
    """Ranks with different numbers of cores must draft the same bits: a thread takes whole columns."""
    calls = [
        (OPERATORS.norm_and_project, project_arguments(F32, tokens=16, hidden=512, columns=1024)),
        (OPERATORS.sum_of_mlps, mlp_arguments(F32, layers=4, tokens=16, width=512, hidden=512)),
        (OPERATORS.look_ahead, look_ahead_arguments(F32, layers=4, tokens=16, hidden=512, rank=512)),
    ]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([operator(*as_native(operator.default, arguments)) for operator, arguments in calls])
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert one.equal(three)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("embed_shard", (torch.tensor([3, 9]), randn(5, 6), 5, 5)),
        ("group_rms_norm", norm_arguments(F32)),
        ("prefix_sums", (randn(3, 40), randn(2, 3, 40))),
        ("rotate_and_store", rotate_arguments(F32)),
        ("rotate_and_store", rotate_arguments(F32, cache=True)),
        ("norm_and_project", project_arguments(F32)),
        ("norm_and_project", project_arguments(F32, weights=torch.int8)),
        ("project_among_zeros", among_zeros_arguments(F32)),
        ("sum_of_mlps", mlp_arguments(F32)),
        ("sum_of_mlps", mlp_arguments(F32, weights=torch.int8)),
        ("group_features", feature_arguments(F32)),
        ("look_ahead", look_ahead_arguments(F32)),
        ("look_ahead", look_ahead_arguments(F32, own=False, first=True)),
    ],
)
def test_schema_and_fake(operator, arguments):
    overload = getattr(OPERATORS, operator).default
    torch.library.opcheck(overload, as_native(overload, arguments))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_look_ahead_of_long_passes_takes_torchs_products(of_cpu, dtype):
    """The native product of plain matrices is for few tokens."""
    few = ops.FEW_TOKENS[dtype]
    assert ops.is_short(torch.zeros(3, few, 8, dtype=dtype))
    assert not ops.is_short(torch.zeros(3, few + 1, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layers", [1, 3])
def test_products_of_many_tokens(dtype, layers):
    x, weights = randn(layers, 100, 48, dtype=dtype), randn(5, 48, 33, dtype=dtype, scale=48**-0.5)[1 : 1 + layers]
    got = ops.products(x, weights)
    assert got.shape == (layers, 100, 33) and got.dtype == dtype and got.is_contiguous()
    check_close(got, torch.matmul(x, weights), torch.matmul(x.double(), weights.double()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.group_rms_norm(randn(3, 8), randn(2, 9), 1e-6), "x has 24 elements, not 27"),
        (lambda: ops.group_rms_norm(randn(3, 8), randn(2, 8, dtype=BF16), 1e-6), "weights has another dtype"),
        (lambda: ops.group_rms_norm(randn(3, 8).double(), randn(2, 8).double(), 1e-6), "x is neither float32"),
        (lambda: ops.group_rms_norm(randn(3, 16)[:, ::2], randn(2, 8), 1e-6), "x is not contiguous"),
        (
            lambda: ops.norm_and_project(randn(3, 8), randn(2, 8), pack(randn(2, 8, 4)), None, None, 1, 2, 4, 1e-6),
            "norms has 2 layers",
        ),
        (
            lambda: OPERATORS.norm_and_project(randn(3, 8), randn(2, 8), randn(2, 8, 4), None, None, 0, 2, 4, 1e-6),
            "weights is not packed",
        ),
        (
            lambda: ops.norm_and_project(randn(3, 8), randn(2, 8), pack(randn(2, 8, 4)), None, None, 0, 2, 65, 1e-6),
            "weights is not packed, or not for these sizes",
        ),
        (
            lambda: ops.project_among_zeros(
                randn(2, 3, 8), pack(randn(2, 8, 4).to(torch.int8)), None, None, 0, 2, 0, 1, 4
            ),
            "weights has scales without being quantized, or none",
        ),
        (lambda: ops.group_features(randn(3, 7), randn(3, 7), 1e-6), "even hidden"),
        (lambda: ops.group_features(randn(3, 8), randn(2, 8), 1e-6), "previous has 16 elements, not 24"),
        (
            lambda: ops.project_among_zeros(randn(2, 3, 8), pack(randn(2, 8, 4)), None, None, 0, 4, 1, 3, 4),
            "do not fit",
        ),
    ],
)
def test_native_refuses_what_it_would_misread(of_cpu, call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
