"""Products by oneDNN against torch's own, and what they are not used for."""

import pytest
import torch
from torch.nn import functional

from qlora_serve.base import matmul
from qlora_serve.base.matmul import linear, product


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize(("inside", "outside"), [(64, 96), (576, 16), (16, 1536), (37, 5)])
def test_products_equal_float64(rows: int, inside: int, outside: int) -> None:
    generator = torch.Generator().manual_seed(rows * inside)
    x = torch.randn(rows, inside, generator=generator)
    weight = torch.randn(outside, inside, generator=generator)
    bias = torch.randn(outside, generator=generator)
    gradient = torch.randn(rows, outside, generator=generator)
    for found, expected in (
        (linear(x, weight), x.double() @ weight.double().T),
        (linear(x, weight, bias), x.double() @ weight.double().T + bias.double()),
        (product(gradient, weight), gradient.double() @ weight.double()),
        (product(gradient.T, x), gradient.double().T @ x.double()),
    ):
        assert found.shape == expected.shape
        assert found.is_contiguous()
        limit = 1e-5 * float(expected.abs().max())
        assert float((found.double() - expected).abs().max()) <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_no_rows_are_torchs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> bool:
        raise AssertionError("oneDNN was asked for")

    monkeypatch.setattr(matmul, "_has_onednn", never)
    x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert linear(torch.empty(0, 4), torch.randn(5, 4)).shape == (0, 5)


def test_without_onednn_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_has_onednn", lambda: False)
    x, weight = torch.randn(9, 64), torch.randn(32, 64)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
