"""Where weights lie in the host's memory."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model
from torch import nn

from qlora_serve.adapters.weights import LoraPair
from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.attention import KvCache, LayerShape
from qlora_serve.serve.engine.host_memory import ALIGNMENT, Arena, huge_pages, own_memory
from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.large_pages import LARGE_PAGE
from qlora_serve.serve.engine.pairs import (
    ResidentPair,
    for_kernels,
    from_blocks,
    is_stored_plainly,
    laid_out,
    packed,
)
from qlora_serve.serve.engine.runner import Runner


def test_an_arena_hands_out_memory_that_nobody_else_has() -> None:
    arena = Arena(chunk=4096)
    shapes = [(3, 5), (1,), (700,), (2000,), (7, 11, 2)]  # one of them larger than a chunk
    tensors = [arena.copy(torch.full(shape, float(n))) for n, shape in enumerate(shapes)]
    halves = arena.copy(torch.full((9,), 0.5, dtype=torch.float16))
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 128 == 0
        assert (tensor == number).all()
    assert (halves == 0.5).all()


def test_large_pages_begin_at_one() -> None:
    memory = huge_pages(5_000_000)
    assert memory.numel() == 5_000_000
    assert memory.data_ptr() % (2 << 20) == 0


def test_tied_weights_stay_tied_and_keep_their_numbers() -> None:
    model = nn.ModuleDict({"inside": nn.Embedding(8, 4), "out": nn.Linear(4, 8, bias=False)})
    model["out"].weight = model["inside"].weight
    before, address = model["out"].weight.detach().clone(), model["out"].weight.data_ptr()
    own_memory(model, Arena())
    assert model["out"].weight.data_ptr() != address
    assert model["out"].weight is model["inside"].weight
    assert torch.equal(model["out"].weight, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_nothing_of_a_served_base_lies_in_its_files(tmp_path) -> None:
    tiny_base = write_tiny_model(tmp_path / "tiny")
    base = load_base(str(tiny_base), dtype="float32")
    runner = Runner(base)
    maps = Path("/proc/self/maps").read_text()
    assert str(tiny_base) not in maps
    assert runner.base is base


def test_packed_updates_are_the_same_updates() -> None:
    torch.manual_seed(0)
    pairs = [
        for_kernels(ResidentPair(torch.randn(rank, 40), torch.randn(rank, out)))
        for rank, out in ((4, 48), (16, 97), (1, 16))
    ]
    only_bias = ResidentPair(None, None, offset=torch.randn(8))
    found = packed([pairs[0], None, only_bias, *pairs[1:]])
    assert found[1] is None
    assert found[2] is only_bias
    for old, new in zip(pairs, (found[0], *found[3:]), strict=True):
        assert new is not None
        assert torch.equal(new.a, old.a)
        assert new.a.stride() == old.a.stride()
        out = old.blocks.shape[0] * 16
        assert torch.equal(from_blocks(new.blocks, out), from_blocks(old.blocks, out))


def test_updates_that_are_laid_out_by_one_call_are_the_same_updates() -> None:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    shapes = {7: (4, 40, 48), 2: (16, 61, 97), 0: (1, 16, 1), 9: (33, 5, 130)}
    plain = {
        index: LoraPair(torch.randn(rank, width), torch.randn(out, rank), scaling=rank / 7)
        for index, (rank, width, out) in shapes.items()
    }
    assert all(map(is_stored_plainly, plain.values()))
    found = laid_out(plain, kernels)
    assert found.keys() == plain.keys()
    for index, pair in plain.items():
        expected = for_kernels(ResidentPair(pair.a, (pair.b * pair.scaling).t().contiguous()))
        assert torch.equal(found[index].a, expected.a)
        assert found[index].a.stride() == expected.a.stride()
        assert torch.equal(found[index].blocks, expected.blocks)
        assert found[index].size_bytes == expected.size_bytes
        assert found[index].a.data_ptr() % 128 == found[index].blocks.data_ptr() % 128 == 0


def test_what_one_call_cannot_lay_out_is_told() -> None:
    a, b = torch.randn(2, 8), torch.randn(4, 2)
    others = [
        LoraPair(a.half(), b, 1.0),
        LoraPair(a, b.t().contiguous().t(), 1.0),
        LoraPair(a, b, 1.0, magnitude=torch.randn(4)),
        LoraPair(a, b, 1.0, b_bias=torch.randn(4)),
    ]
    assert not any(map(is_stored_plainly, others))


def test_no_two_layers_of_the_cache_reach_a_large_page_together() -> None:
    shape = LayerShape(2, 64, torch.float32, torch.device("cpu"), None)
    cache = KvCache(dict.fromkeys(range(30), shape), [None], [128])  # 2 MB a layer
    begins = sorted(store.data_ptr() % LARGE_PAGE for store in cache.layers.values())
    begins.append(begins[0] + LARGE_PAGE)
    apart = [later - earlier for earlier, later in pairwise(begins)]
    assert min(apart) > LARGE_PAGE // 30 - 2 * ALIGNMENT
    for number, store in cache.layers.items():
        store.fill_(number)
    assert all((store == number).all() for number, store in cache.layers.items())
