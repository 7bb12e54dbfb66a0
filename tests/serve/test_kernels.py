"""The native kernels against torch's own operators."""

import ctypes
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from gptq_models import random_gptq_linear
from torch import nn

import qlora_serve.serve.engine.linear as linear_module
from qlora_serve.serve.engine.attention import (
    KvCache,
    LayerShape,
    NativeSpans,
    Span,
    StepContext,
    attach_context,
    attend,
    attention,
)
from qlora_serve.serve.engine.coded import in_panels as as_panels
from qlora_serve.serve.engine.dense import dense_weight
from qlora_serve.serve.engine.kernels.native import AdapterRows, load_kernels
from qlora_serve.serve.engine.linear import (
    CodedLinear,
    FastLinear,
    PanelLinear,
    use_fast_linears,
)
from qlora_serve.serve.engine.pairs import ResidentPair, for_kernels, from_blocks

TOLERANCE = 1e-5  # sums of at most 600 products of unit-size numbers, relative to their size


@pytest.fixture(scope="module")
def kernels():
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler here; torch's operators are used instead")
    loaded = load_kernels()
    assert loaded is not None, "there is a compiler, so the kernels must build"
    return loaded


class _Model(nn.Sequential):
    """As little of a model as `use_fast_linears` looks at."""

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(2, 2)


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 17, 48, 49])
@pytest.mark.parametrize(("inside", "outside"), [(64, 48), (576, 192), (33, 1), (100, 97)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", [FastLinear, PanelLinear])
def test_linear_equals_torch(kernels, rows, inside, outside, has_bias, kind) -> None:
    torch.manual_seed(rows * inside + outside)
    linear = nn.Linear(inside, outside, bias=has_bias)
    hidden = torch.randn(1, rows, inside)
    with torch.inference_mode():
        fast = kind(linear, kernels)
        assert _close(fast(hidden), linear(hidden))
        assert torch.equal(fast.weight, linear.weight)


@pytest.mark.parametrize(("inside", "outside"), [(64, 48), (50, 97)])
@pytest.mark.parametrize("in_panels", [False, True])
def test_linear_adds_each_adapters_update_to_its_own_rows(
    kernels, inside, outside, in_panels
) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(outside, inside), torch.randn(50, inside)
    # first, last, rank; row 2 is the base's, one group leaves this layer alone, and rows 6 and 7
    # have two adapters
    ranges = [(0, 2, 4), (3, 4, 1), (4, 5, 0), (5, 44, 19), (6, 8, 3), (44, 49, 40)]
    pairs = [(torch.randn(rank, inside), torch.randn(rank, outside)) for *_, rank in ranges]
    groups = (AdapterRows * len(ranges))()
    expected = F.linear(hidden, weight)
    native = [for_kernels(ResidentPair(a, b)) if len(b) else None for a, b in pairs]
    scales = [1.0, -0.5, 3.0, 0.25, 2.0, 0.125]
    zipped = zip(groups, ranges, pairs, native, scales, strict=True)
    for group, (first, last, rank), (a, b), pair, scale in zipped:
        group.first, group.last, group.rank, group.scale = first, last, rank, scale
        if pair is not None:
            group.a, group.b = pair.a.data_ptr(), pair.blocks.data_ptr()
            assert torch.equal(pair.a, a)
            assert torch.equal(from_blocks(pair.blocks, outside), b)
        expected[first:last] += scale * (hidden[first:last] @ a.t() @ b)
    found = torch.empty(50, outside)
    kernel = kernels.linear_panels if in_panels else kernels.linear
    held = as_panels(weight) if in_panels else weight
    kernel(
        hidden.data_ptr(), 50, inside, held.data_ptr(), None, found.data_ptr(), outside,
        groups, len(ranges),
    )  # fmt: skip
    assert _close(found, expected)


@pytest.mark.parametrize("kind", [FastLinear, PanelLinear])
def test_nan_stays_in_its_row(kernels, kind) -> None:
    linear = nn.Linear(64, 48)
    hidden = torch.randn(1, 8, 64)
    clean = kind(linear, kernels)(hidden)
    hidden[0, 3, 5] = float("nan")
    found = kind(linear, kernels)(hidden)
    assert found[0, 3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(found[0, others], clean[0, others])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 2, 16), (3, 1, 24), (2, 2, 80), (9, 3, 64), (14, 2, 64), (8, 1, 256), (32, 1, 48)],
)
def test_attention_equals_torch_for_decoding_and_prompts_mixed(
    kernels, window, softcap, heads, kv_heads, dim
) -> None:
    """Two decode, at positions 0 and 200; others bring whole prompts and later parts of some."""
    torch.manual_seed(1)
    starts, counts = [0, 200, 3, 0, 37], [1, 1, 4, 40, 29]
    total = sum(counts)
    # As models hand them over: a transposed view of [tokens, heads, dim].
    query = torch.randn(1, total, heads, dim).transpose(1, 2)
    key, value = (torch.randn(1, total, kv_heads, dim).transpose(1, 2) for _ in range(2))
    pasts = [torch.randn(2, kv_heads, start, dim) for start in starts]
    shapes = {0: LayerShape(kv_heads, dim, torch.float32, torch.device("cpu"), window)}

    def fresh(with_kernels: bool) -> tuple[StepContext, list[Span]]:
        """The past in scattered blocks, as a long-running server has them."""
        context = StepContext(kernels=kernels if with_kernels else None)
        context.cache = KvCache(shapes, [window], [32])
        # Nobody has written there, or someone whose answer was not a number: it must not be seen.
        context.cache.layers[0].fill_(float("nan"))
        order = list(range(32))
        random.Random(3).shuffle(order)
        spans, first = [], 0
        for start, count, past in zip(starts, counts, pasts, strict=True):
            table = [order.pop() for _ in range((start + count + 15) // 16)]
            if start:
                context.cache.layers[0][table] = 0
                context.cache.write(0, Span(0, start, 0, [table]), past[0], past[1])
            spans.append(Span(first, first + count, start, [table]))
            first += count
        context.spans = spans
        if with_kernels:
            context.native_spans = NativeSpans(spans, 1)
        return context, spans

    found = []
    for with_kernels in (True, False):
        module = nn.Module()
        module.layer_idx = 0
        context, spans = fresh(with_kernels)
        attach_context(module, context)
        found.append(
            attention(
                module, query, key, value, None, scaling=0.3, sliding_window=window,
                softcap=softcap,
            )[0]
        )  # fmt: skip
        # What was stored serves the next step.
        for span in spans:
            block, place = span.blocks[0][span.start // 16], span.start % 16
            assert torch.equal(context.cache.keys(0)[block, :, :, place], key[0, :, span.first])
            assert torch.equal(context.cache.values(0)[block, :, place], value[0, :, span.first])
    assert found[0].shape == (1, total, heads, dim)
    assert (found[0] - found[1]).abs().max() < TOLERANCE
    expected = attend(
        query[0, :, 1:2],
        torch.cat([pasts[1][0], key[0, :, 1:2]], 1),
        torch.cat([pasts[1][1], value[0, :, 1:2]], 1),
        200, 0.3, window, softcap,
    )  # fmt: skip
    assert (found[0][0, 1] - expected[:, 0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "environment", [{"QLORA_SERVE_NATIVE": "0"}, {"PATH": "/nowhere", "CXX": ""}]
)
def test_without_a_compiler_or_switched_off_torch_does_it(environment, tmp_path) -> None:
    code = "from qlora_serve.serve.engine.kernels.native import load_kernels as k; print(k())"
    env = {**os.environ, "QLORA_SERVE_CACHE": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "None"
    assert ("no C++ compiler" in done.stderr) == ("PATH" in environment)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 31])
def test_nf4_equals_bitsandbytes(kernels, double, rows) -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(rows)
    linear = Linear4bit(
        128, 97, bias=True, compute_dtype=torch.float32, compress_statistics=double,
        quant_type="nf4",
    )  # fmt: skip
    linear.load_state_dict({"weight": torch.randn(97, 128) * 0.1, "bias": torch.randn(97)})
    linear = linear.to("cpu")  # quantizes
    linear.support_avx512bf16_for_cpu = False
    model = _Model(linear).eval()
    hidden = torch.randn(1, rows, 128)
    with torch.inference_mode():
        expected = model(hidden)
        dense = dense_weight(model[0], "it")
        use_fast_linears(model, kernels)
        assert type(model[0]) is CodedLinear
        assert dense_weight(model[0], "it").equal(dense)
        assert _close(model(hidden), expected)
        many = torch.randn(1, 49, 128)
        assert _close(model(many)[:, :rows], model(many[:, :rows]))


@pytest.mark.parametrize("rows", [1, 3, 8, 13, 31])
@pytest.mark.parametrize(
    ("bits", "group_size", "by_activity"),
    [(4, 32, False), (4, 64, True), (4, -1, False), (8, 16, True), (8, 128, False), (2, 32, True)],
)
def test_gptq_equals_gptqmodel(kernels, bits, group_size, by_activity, rows) -> None:
    pytest.importorskip("gptqmodel")
    linear = random_gptq_linear(160, 96, bits, group_size, by_activity, seed=rows)
    model = _Model(linear).eval()
    hidden = torch.randn(1, rows, 160)
    with torch.inference_mode():
        expected = model(hidden)
        dense = dense_weight(model[0], "it")
        assert _close(F.linear(hidden, dense, linear.bias), expected)
        use_fast_linears(model, kernels)
        assert type(model[0]) is CodedLinear
        assert dense_weight(model[0], "it").equal(dense)
        assert _close(model(hidden), expected)
        assert _close(model[0].by_torch(hidden), expected)
        # An adapter's update has its inputs in their own order.
        a, b = torch.randn(3, 160), torch.randn(3, 96)
        group, pair = AdapterRows(), for_kernels(ResidentPair(a, b))
        group.first, group.last, group.rank, group.scale = 0, rows, 3, 1.0
        group.a, group.b = pair.a.data_ptr(), pair.blocks.data_ptr()
        found = torch.empty_like(expected)
        model[0].call_kernel(hidden, found, ctypes.addressof(group), 1)
        assert _close(found, expected + hidden @ a.t() @ b)


def test_gptq_layers_that_the_kernel_does_not_read_stay(kernels) -> None:
    pytest.importorskip("gptqmodel")
    model = _Model(random_gptq_linear(96, 96, 3, 32, False))
    use_fast_linears(model, kernels)
    assert type(model[0]) is not CodedLinear


def test_layers_stay_where_torch_is_faster(kernels, monkeypatch) -> None:
    """The trial decides; which way it goes depends on the processor, so both ways are forced."""
    monkeypatch.delenv("QLORA_SERVE_NATIVE")
    for is_faster, expected in ((False, nn.Linear), (True, PanelLinear)):
        monkeypatch.setattr(linear_module, "_is_faster", lambda *_, said=is_faster: said)
        model = _Model(nn.Linear(64, 48))
        use_fast_linears(model, kernels)
        assert type(model[0]) is expected


@pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 48, 515, 49152])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_the_largest_of_a_row_is_where_torch_finds_it(kernels, rows, size) -> None:
    """The first of several, in whichever lane; NaN wins wherever it is."""
    generator = torch.Generator().manual_seed(rows * size)

    def check(scores: torch.Tensor) -> None:
        values, places = torch.empty(rows), torch.empty(rows, dtype=torch.long)
        kernels.largest(
            scores.data_ptr(), rows, size, values.data_ptr(), places.data_ptr()
        )  # fmt: skip
        expected = scores.max(dim=-1)
        assert torch.equal(values.nan_to_num(nan=123.5), expected.values.nan_to_num(nan=123.5))
        known = ~expected.values.isnan()
        assert torch.equal(places[known], expected.indices[known])

    check(torch.randn(rows, size, generator=generator))
    check(torch.randint(-3, 3, (rows, size), generator=generator).float())  # many of the largest
    check(torch.zeros(rows, size))
    check(torch.full((rows, size), float("-inf")))
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in {0, size // 2, size - 1, min(size, 16) - 1}:
            scores = torch.randn(rows, size, generator=generator)
            scores[rows // 2, place] = value
            check(scores)
