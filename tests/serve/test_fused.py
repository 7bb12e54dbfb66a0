"""The small operators by one kernel: the same numbers, in the models where they belong."""

import shutil

import pytest
import torch
from tiny_models import write_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_serve.serve.engine.fused import FusedNorm, engine_computes, use_fused
from qlora_serve.serve.engine.kernels.native import load_kernels


@pytest.fixture(scope="module")
def kernels():
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler here; torch's operators are used instead")
    return load_kernels()


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


class _Parent(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("width", [64, 576, 50])
@pytest.mark.parametrize("rows", [1, 5, 700])
@torch.inference_mode()
def test_norms_are_recognised_by_what_they_compute(kernels, kind, width, rows) -> None:
    norm = kind(width, eps=1e-5)
    norm.weight.add_(torch.randn(width))
    parent = _Parent(norm)
    use_fused(parent, kernels)
    assert type(parent.child) is FusedNorm
    hidden = torch.randn(1, rows, width) * 3
    assert _close(parent.child(hidden), norm(hidden))
    heads = torch.randn(1, rows, 4, width)[:, :, 1:3]  # as of some heads: not contiguous
    assert _close(parent.child(heads), norm(heads))


def test_a_norm_that_computes_something_else_stays(kernels) -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden):
            return super().forward(hidden) * 1.01

    parent = _Parent(OddRMSNorm(64))
    use_fused(parent, kernels)
    assert type(parent.child) is OddRMSNorm


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi"])
@torch.inference_mode()
def test_a_whole_model_computes_the_same(kernels, family, tmp_path) -> None:
    base = write_tiny_model(tmp_path / "base", family)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    fused = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    use_fused(fused, kernels)
    norms = [m for m in fused.modules() if type(m) is FusedNorm]
    assert bool(norms) == (family != "phi")  # which has LayerNorm
    ids = torch.randint(3, 400, (1, 40))
    expected = plain(ids).logits
    with engine_computes():
        found = fused(ids).logits
    assert (found - expected).abs().max() < 1e-4


def test_activation_and_rotation_equal_torch_far_from_zero(kernels) -> None:
    gate = torch.cat(
        [torch.linspace(-120, 120, 1008), torch.tensor([0.0, -0.0, 1e-30, -1e-30] * 4)]
    )
    up = torch.randn(gate.shape)
    found = torch.empty_like(gate)
    kernels.silu_product(gate.data_ptr(), up.data_ptr(), gate.numel(), found.data_ptr())
    expected = torch.nn.functional.silu(gate) * up
    assert ((found - expected).abs() <= 1e-6 * (1 + expected.abs())).all()


def test_models_outside_the_engine_keep_their_own_rotation(kernels, tmp_path, monkeypatch) -> None:
    """The oracle of the other tests must never be computed by what it is to check."""
    base = write_tiny_model(tmp_path / "base", "qwen3")
    use_fused(AutoModelForCausalLM.from_pretrained(base), kernels)
    use_fused(AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "l")), kernels)
    called = []
    original = modeling_llama.apply_rotary_pos_emb.qlora_serve_original
    q, k = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 3, 64)
    cos, sin = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    monkeypatch.setattr(kernels, "rotate", lambda *a: called.append(a))
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            modeling_llama.apply_rotary_pos_emb(q, k, cos, sin),
            original(q, k, cos, sin),
            strict=True,
        )
    )
    assert called == []
    with engine_computes():
        modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert len(called) == 2
